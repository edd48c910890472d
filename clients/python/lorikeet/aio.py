"""The client for asyncio."""

from __future__ import annotations

import pathlib
from typing import Any, AsyncIterator, Mapping, Optional, Sequence, Tuple, Union

import grpc
import grpc.aio

from lorikeet import _common, _requests
from lorikeet._common import Answer, Piece
from lorikeet._requests import Prompt
from lorikeet.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc


class Client:
    """One connection, for any number of tasks of one event loop.

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
            self._channel = grpc.aio.insecure_channel(target, options=_common.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(
                target, credentials, options=_common.CHANNEL_OPTIONS)
        self._metadata = _common.metadata(api_key)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self.adapters = Adapters(self._channel, self._metadata)

    async def close(self) -> None:
        await self._channel.close(None)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self.close()

    async def model(self) -> generation_pb2.GetModelResponse:
        """What the server serves."""
        with _common.errors():
            return await self._generation.GetModel(
                generation_pb2.GetModelRequest(), metadata=self._metadata)

    async def generate(
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
            return Answer.of(await self._generation.GenerateUnary(
                request, timeout=timeout, metadata=self._metadata))

    async def embed(
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
            response = await self._generation.Embed(
                request, timeout=timeout, metadata=self._metadata)
        return list(response.values)

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Optional[str] = None,
        adapters: Optional[Mapping[str, float]] = None,
        timeout: Optional[float] = None,
        **options: Any,
    ) -> AsyncIterator[Piece]:
        """The same as it comes. Closing the iterator stops the work."""
        request = _requests.generate(prompt, adapter, adapters, options)
        return self._stream(request, timeout)

    async def _stream(
        self, request: generation_pb2.GenerateRequest, timeout: Optional[float]
    ) -> AsyncIterator[Piece]:
        call = self._generation.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            with _common.errors():
                async for message in call:
                    yield Piece.of(message)
        finally:
            call.cancel()


class Adapters:
    """AdapterService."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Optional[Sequence[Tuple[str, str]]]):
        self._stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        self._metadata = metadata

    async def _call(self, method: Any, request: Any, timeout: Optional[float] = None) -> Any:
        with _common.errors():
            return await method(request, metadata=self._metadata, timeout=timeout)

    async def list(
        self, prefix: str = "", *, version: str = "", in_host_only: bool = False
    ) -> AsyncIterator[adapters_pb2.Adapter]:
        """All of them, by name, fetched page by page."""
        request = _requests.list_adapters(prefix, version, in_host_only)
        while True:
            page = await self._call(self._stub.ListAdapters, request)
            for adapter in page.adapters:
                yield adapter
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get(self, name: str) -> adapters_pb2.Adapter:
        return (await self._call(self._stub.GetAdapter, _requests.get(name))).adapter

    async def load(
        self, name: str, path: str, *, replace: bool = False, pin: bool = False
    ) -> adapters_pb2.Adapter:
        """Loads a directory of the server's machine, below one of its adapter roots."""
        request = _requests.load(name, path, replace, pin)
        return (await self._call(self._stub.LoadAdapter, request)).adapter

    async def upload(
        self,
        name: str,
        directory: Union[str, pathlib.Path],
        *,
        replace: bool = False,
        pin: bool = False,
    ) -> adapters_pb2.Adapter:
        """Sends a directory of this machine and loads it."""
        messages = _requests.upload(name, directory, replace, pin)
        return (await self._call(self._stub.UploadAdapter, messages)).adapter

    async def reload(self, name: str) -> adapters_pb2.Adapter:
        return (await self._call(self._stub.ReloadAdapter, _requests.reload(name))).adapter

    async def unload(
        self, name: str, *, drain_ms: Optional[int] = None
    ) -> adapters_pb2.UnloadAdapterResponse:
        return await self._call(self._stub.UnloadAdapter, _requests.unload(name, drain_ms))

    async def pin(self, name: str, pinned: bool = True) -> adapters_pb2.Adapter:
        return (await self._call(self._stub.PinAdapter, _requests.pin(name, pinned))).adapter

    async def prefetch(self, name: str) -> adapters_pb2.Adapter:
        return (await self._call(self._stub.PrefetchAdapter, _requests.prefetch(name))).adapter

    async def alias(self, alias: str, targets: Mapping[str, int]) -> adapters_pb2.Adapter:
        """Leads `alias` to names or versions, by weight."""
        return (await self._call(self._stub.SetAlias, _requests.alias(alias, targets))).adapter

    async def watch(self) -> AsyncIterator[adapters_pb2.AdapterEvent]:
        """Changes from now on. Closing the iterator ends it."""
        call = self._stub.WatchAdapters(
            adapters_pb2.WatchAdaptersRequest(), metadata=self._metadata)
        try:
            with _common.errors():
                async for event in call:
                    yield event
        finally:
            call.cancel()

    async def plan(
        self, rank: int, linears: Sequence[str] = (), bytes_per_value: int = 0
    ) -> adapters_pb2.PlanCapacityResponse:
        """How many adapters of a shape fit."""
        request = _requests.plan(rank, linears, bytes_per_value)
        return await self._call(self._stub.PlanCapacity, request)
