"""The client for threads."""

from __future__ import annotations

import pathlib
from typing import Any, Iterator, Mapping, Optional, Sequence, Tuple, Union

import grpc

from lorikeet import _common, _requests
from lorikeet._common import Answer, Piece
from lorikeet._requests import Prompt
from lorikeet.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc


class Client:
    """One connection, for any number of threads.

    `ca` (PEM) turns TLS on; `certificate` and `key` (PEM) are shown to a server that asks.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        api_key: Optional[str] = None,
        ca: Optional[bytes] = None,
        certificate: Optional[bytes] = None,
        key: Optional[bytes] = None,
    ):
        credentials = _common.channel_credentials(ca, certificate, key)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=_common.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(
                target, credentials, options=_common.CHANNEL_OPTIONS)
        self._metadata = _common.metadata(api_key)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self.adapters = Adapters(self._channel, self._metadata)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def model(self) -> generation_pb2.GetModelResponse:
        """What the server serves."""
        with _common.errors():
            return self._generation.GetModel(
                generation_pb2.GetModelRequest(), metadata=self._metadata)

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: Optional[str] = None,
        adapters: Optional[Mapping[str, float]] = None,
        timeout: Optional[float] = None,
        **options: Any,
    ) -> Answer:
        """The whole answer. `adapters` is a weighted sum; `options` are the fields of
        SamplingParams, StopConditions, Form and GenerateRequest by their names, but `stop` (a string
        or several) and `stop_token_ids`."""
        request = _requests.generate(prompt, adapter, adapters, options)
        with _common.errors():
            return Answer.of(self._generation.GenerateUnary(
                request, timeout=timeout, metadata=self._metadata))

    def embed(
        self,
        prompt: Union[str, Sequence[int]],
        *,
        adapter: Optional[str] = None,
        adapters: Optional[Mapping[str, float]] = None,
        pooling: str = "last",
        dimensions: int = 0,
        timeout: Optional[float] = None,
    ) -> Sequence[float]:
        """Text or token ids as a vector of length 1. `pooling`: "last" or "mean"."""
        request = _requests.embed(prompt, adapter, adapters, pooling, dimensions)
        with _common.errors():
            return list(self._generation.Embed(
                request, timeout=timeout, metadata=self._metadata).values)

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Optional[str] = None,
        adapters: Optional[Mapping[str, float]] = None,
        timeout: Optional[float] = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """The same as it comes. Closing the iterator stops the work."""
        request = _requests.generate(prompt, adapter, adapters, options)
        return self._stream(request, timeout)

    def _stream(
        self, request: generation_pb2.GenerateRequest, timeout: Optional[float]
    ) -> Iterator[Piece]:
        call = self._generation.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            with _common.errors():
                for message in call:
                    yield Piece.of(message)
        finally:
            call.cancel()


class Adapters:
    """AdapterService."""

    def __init__(self, channel: grpc.Channel, metadata: Optional[Sequence[Tuple[str, str]]]):
        self._stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        self._metadata = metadata

    def _call(self, method: Any, request: Any, timeout: Optional[float] = None) -> Any:
        with _common.errors():
            return method(request, metadata=self._metadata, timeout=timeout)

    def list(
        self, prefix: str = "", *, version: str = "", in_host_only: bool = False
    ) -> Iterator[adapters_pb2.Adapter]:
        """All of them, by name, fetched page by page."""
        request = _requests.list_adapters(prefix, version, in_host_only)
        while True:
            page = self._call(self._stub.ListAdapters, request)
            yield from page.adapters
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def get(self, name: str) -> adapters_pb2.Adapter:
        return self._call(self._stub.GetAdapter, _requests.get(name)).adapter

    def load(
        self, name: str, path: str, *, replace: bool = False, pin: bool = False
    ) -> adapters_pb2.Adapter:
        """Loads a directory of the server's machine, below one of its adapter roots."""
        return self._call(self._stub.LoadAdapter, _requests.load(name, path, replace, pin)).adapter

    def upload(
        self,
        name: str,
        directory: Union[str, pathlib.Path],
        *,
        replace: bool = False,
        pin: bool = False,
    ) -> adapters_pb2.Adapter:
        """Sends a directory of this machine and loads it."""
        messages = _requests.upload(name, directory, replace, pin)
        return self._call(self._stub.UploadAdapter, messages).adapter

    def reload(self, name: str) -> adapters_pb2.Adapter:
        return self._call(self._stub.ReloadAdapter, _requests.reload(name)).adapter

    def unload(
        self, name: str, *, drain_ms: Optional[int] = None
    ) -> adapters_pb2.UnloadAdapterResponse:
        return self._call(self._stub.UnloadAdapter, _requests.unload(name, drain_ms))

    def pin(self, name: str, pinned: bool = True) -> adapters_pb2.Adapter:
        return self._call(self._stub.PinAdapter, _requests.pin(name, pinned)).adapter

    def prefetch(self, name: str) -> adapters_pb2.Adapter:
        return self._call(self._stub.PrefetchAdapter, _requests.prefetch(name)).adapter

    def alias(self, alias: str, targets: Mapping[str, int]) -> adapters_pb2.Adapter:
        """Leads `alias` to names or versions, by weight."""
        return self._call(self._stub.SetAlias, _requests.alias(alias, targets)).adapter

    def watch(self) -> Iterator[adapters_pb2.AdapterEvent]:
        """Changes from now on. Closing the iterator ends it."""
        call = self._stub.WatchAdapters(
            adapters_pb2.WatchAdaptersRequest(), metadata=self._metadata)
        try:
            with _common.errors():
                yield from call
        finally:
            call.cancel()

    def plan(
        self, rank: int, linears: Sequence[str] = (), bytes_per_value: int = 0
    ) -> adapters_pb2.PlanCapacityResponse:
        """How many adapters of a shape fit."""
        return self._call(self._stub.PlanCapacity, _requests.plan(rank, linears, bytes_per_value))
