"""The requests of both clients."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from lorikeet.v1 import adapters_pb2, generation_pb2

#: Text, a conversation of (role, content) pairs, or token ids.
Prompt = Union[str, Sequence[Tuple[str, str]], Sequence[int]]

UPLOAD_PIECE_BYTES = 1 << 20
# What an adapter may bring of a tokenizer and a chat template.
TEXT_NAMES = (
    "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "chat_template.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty",
             "presence_penalty", "frequency_penalty", "logit_bias", "bad_words")
_STOP = {"max_tokens": "max_tokens", "stop": "strings", "stop_token_ids": "token_ids",
         "ignore_eos": "ignore_eos", "min_tokens": "min_tokens",
         "include_stop_string": "include_string"}
_WHOLE = ("logprobs", "echo", "cache_salt", "skip_prefix_cache", "n", "best_of")
_FORM = ("json_schema", "json_object", "regex", "lark", "choices")


def generate(
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
        adapters=_weighted(adapters),
        sampling=generation_pb2.SamplingParams(**sampling),
        stop=generation_pb2.StopConditions(**stop),
        form=generation_pb2.Form(**form) if form else None,
        **whole,
    )
    _set_prompt(request, prompt)
    return request


def embed(
    prompt: Union[str, Sequence[int]],
    adapter: Optional[str],
    adapters: Optional[Mapping[str, float]],
    pooling: str,
    dimensions: int,
) -> generation_pb2.EmbedRequest:
    """ValueError: no such pooling."""
    request = generation_pb2.EmbedRequest(
        adapter=adapter or "",
        adapters=_weighted(adapters),
        pooling=f"POOLING_{pooling.upper()}",
        dimensions=dimensions)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


def _weighted(adapters: Optional[Mapping[str, float]]) -> List[generation_pb2.WeightedAdapter]:
    return [generation_pb2.WeightedAdapter(id=name, weight=weight)
            for name, weight in (adapters or {}).items()]


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


def upload(
    name: str, directory: Union[str, pathlib.Path], replace: bool, pin: bool
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    folder = pathlib.Path(directory)
    config = (folder / "adapter_config.json").read_bytes()
    weights = folder / "adapter_model.safetensors"
    digest = hashlib.sha256()
    for piece in _pieces(weights):
        digest.update(piece)
    texts = {text: folder / text for text in TEXT_NAMES if (folder / text).exists()}
    yield adapters_pb2.UploadAdapterRequest(header=adapters_pb2.UploadHeader(
        name=name, replace=replace, pin=pin, weights_bytes=weights.stat().st_size,
        weights_sha256=digest.hexdigest(), config_sha256=hashlib.sha256(config).hexdigest(),
        text_sha256={text: hashlib.sha256(path.read_bytes()).hexdigest()
                     for text, path in texts.items()}))
    yield adapters_pb2.UploadAdapterRequest(config=config)
    for text, path in texts.items():
        for piece in _pieces(path):
            yield adapters_pb2.UploadAdapterRequest(
                text=adapters_pb2.UploadText(name=text, piece=piece))
    for piece in _pieces(weights):
        yield adapters_pb2.UploadAdapterRequest(weights=piece)


def _pieces(path: pathlib.Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(UPLOAD_PIECE_BYTES):
            yield piece


def alias(name: str, targets: Mapping[str, int]) -> adapters_pb2.SetAliasRequest:
    return adapters_pb2.SetAliasRequest(
        alias=name,
        targets=[adapters_pb2.AdapterTarget(target=target, weight=weight)
                 for target, weight in targets.items()])


def list_adapters(
    prefix: str, version: str, in_host_only: bool
) -> adapters_pb2.ListAdaptersRequest:
    return adapters_pb2.ListAdaptersRequest(
        name_prefix=prefix, version=version, in_host_only=in_host_only)


def get(name: str) -> adapters_pb2.GetAdapterRequest:
    return adapters_pb2.GetAdapterRequest(name=name)


def load(name: str, path: str, replace: bool, pin: bool) -> adapters_pb2.LoadAdapterRequest:
    return adapters_pb2.LoadAdapterRequest(name=name, path=path, replace=replace, pin=pin)


def reload(name: str) -> adapters_pb2.ReloadAdapterRequest:
    return adapters_pb2.ReloadAdapterRequest(name=name)


def unload(name: str, drain_ms: Optional[int]) -> adapters_pb2.UnloadAdapterRequest:
    return adapters_pb2.UnloadAdapterRequest(name=name, drain_ms=drain_ms)


def pin(name: str, pinned: bool) -> adapters_pb2.PinAdapterRequest:
    return adapters_pb2.PinAdapterRequest(name=name, pinned=pinned)


def prefetch(name: str) -> adapters_pb2.PrefetchAdapterRequest:
    return adapters_pb2.PrefetchAdapterRequest(name=name)


def plan(
    rank: int, linears: Sequence[str], bytes_per_value: int
) -> adapters_pb2.PlanCapacityRequest:
    return adapters_pb2.PlanCapacityRequest(
        rank=rank, linears=linears, bytes_per_value=bytes_per_value)
