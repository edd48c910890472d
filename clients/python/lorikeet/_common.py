"""What both clients share: requests made, answers read, errors turned."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Iterator, Mapping, Optional, Sequence, Tuple, Union

import grpc

from lorikeet.v1 import adapters_pb2, generation_pb2

#: Text, a conversation of (role, content) pairs, or token ids.
Prompt = Union[str, Sequence[Tuple[str, str]], Sequence[int]]

UPLOAD_PIECE_BYTES = 1 << 20


class LorikeetError(Exception):
    """A call that failed."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message


def error_of(error: grpc.RpcError) -> LorikeetError:
    return LorikeetError(error.code(), error.details() or "")


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of one answer."""

    text: str
    token_ids: Sequence[int]
    choice: int
    #: In an answer's last piece alone.
    finish: Optional[generation_pb2.Finish]
    message: generation_pb2.GenerateResponse

    @staticmethod
    def of(message: generation_pb2.GenerateResponse) -> Piece:
        finish = message.finish if message.HasField("finish") else None
        return Piece(message.text, list(message.token_ids), message.choice, finish, message)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole answer; `choices` has all of them if several were asked for."""

    text: str
    token_ids: Sequence[int]
    #: "stop" or "length".
    finish_reason: str
    usage: generation_pb2.Usage
    #: SHA-256 of the adapter that answered; empty: the base model.
    adapter_version: str
    choices: Sequence[Answer]
    message: generation_pb2.GenerateResponse

    @staticmethod
    def of(message: generation_pb2.GenerateResponse) -> Answer:
        finish = message.finish
        stopped = finish.reason == generation_pb2.FINISH_REASON_STOP
        answer = Answer(message.text, list(message.token_ids), "stop" if stopped else "length",
                        finish.usage, finish.adapter_version, [], message)
        others = [Answer.of(other) for other in message.more_choices]
        return dataclasses.replace(answer, choices=[answer, *others])


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty",
             "presence_penalty", "frequency_penalty", "logit_bias", "bad_words")
_STOP = {"max_tokens": "max_tokens", "stop": "strings", "stop_token_ids": "token_ids",
         "ignore_eos": "ignore_eos", "min_tokens": "min_tokens",
         "include_stop_string": "include_string"}
_WHOLE = ("logprobs", "echo", "cache_salt", "skip_prefix_cache", "n", "best_of")
_FORM = ("json_schema", "json_object", "regex", "lark", "choices")


def generate_request(
    prompt: Prompt,
    adapter: Optional[str],
    adapters: Optional[Mapping[str, float]],
    options: Mapping[str, Any],
) -> generation_pb2.GenerateRequest:
    """TypeError: an option that there is not."""
    sampling: dict[str, Any] = {}
    stop: dict[str, Any] = {}
    form: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name in _SAMPLING:
            sampling[name] = value
        elif name in _STOP:
            stop[_STOP[name]] = [value] if name == "stop" and isinstance(value, str) else value
        elif name in _WHOLE:
            whole[name] = value
        elif name in _FORM:
            form[name] = _form_value(name, value)
        else:
            raise TypeError(f"there is no option {name!r}")
    request = generation_pb2.GenerateRequest(
        adapter=adapter or "",
        adapters=[generation_pb2.WeightedAdapter(id=name, weight=weight)
                  for name, weight in (adapters or {}).items()],
        sampling=generation_pb2.SamplingParams(**sampling),
        stop=generation_pb2.StopConditions(**stop),
        form=generation_pb2.Form(**form) if form else None,
        **whole,
    )
    _set_prompt(request, prompt)
    return request


def _form_value(name: str, value: Any) -> Any:
    if name == "json_schema" and not isinstance(value, str):
        return json.dumps(value)
    if name == "choices":
        return generation_pb2.Form.Choices(texts=value)
    return value


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    for item in prompt:
        if isinstance(item, int):
            request.token_ids.ids.append(item)
        else:
            role, content = item
            request.chat.messages.add(role=role, content=content)


def upload_messages(
    name: str, directory: Union[str, pathlib.Path], replace: bool, pin: bool
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    folder = pathlib.Path(directory)
    config = (folder / "adapter_config.json").read_bytes()
    weights = folder / "adapter_model.safetensors"
    digest = hashlib.sha256()
    for piece in _pieces(weights):
        digest.update(piece)
    yield adapters_pb2.UploadAdapterRequest(header=adapters_pb2.UploadHeader(
        name=name, replace=replace, pin=pin, weights_bytes=weights.stat().st_size,
        weights_sha256=digest.hexdigest(), config_sha256=hashlib.sha256(config).hexdigest()))
    yield adapters_pb2.UploadAdapterRequest(config=config)
    for piece in _pieces(weights):
        yield adapters_pb2.UploadAdapterRequest(weights=piece)


def _pieces(path: pathlib.Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(UPLOAD_PIECE_BYTES):
            yield piece


def alias_request(alias: str, targets: Mapping[str, int]) -> adapters_pb2.SetAliasRequest:
    return adapters_pb2.SetAliasRequest(
        alias=alias,
        targets=[adapters_pb2.AdapterTarget(target=target, weight=weight)
                 for target, weight in targets.items()])


def metadata(api_key: Optional[str]) -> Optional[Sequence[Tuple[str, str]]]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else None


def channel_credentials(
    ca: Optional[bytes], certificate: Optional[bytes], key: Optional[bytes]
) -> Optional[grpc.ChannelCredentials]:
    """None: no TLS."""
    if ca is None:
        return None
    return grpc.ssl_channel_credentials(ca, key, certificate)


CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)
