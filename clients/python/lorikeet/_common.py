"""What both clients share: answers read, errors turned, connections made."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Iterator, Optional, Sequence, Tuple

import grpc

from lorikeet.v1 import generation_pb2


class LorikeetError(Exception):
    """A call that failed."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """What gRPC raises becomes a LorikeetError."""
    try:
        yield
    except grpc.RpcError as error:
        raise LorikeetError(error.code(), error.details() or "") from None


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
