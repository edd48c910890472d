"""Both clients against a running server with an adapter directory and a chat template.

LORIKEET_SERVER=host:port  LORIKEET_ADAPTER=a directory of an adapter that fits its model
"""

import asyncio
import json
import os
import threading

import grpc
import pytest

from lorikeet import Client, LorikeetError, Piece
from lorikeet import aio

SERVER = os.environ["LORIKEET_SERVER"]
ADAPTER = os.environ["LORIKEET_ADAPTER"]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture
def client():
    with Client(SERVER) as made:
        yield made


@pytest.fixture
def adapter(client):
    """One that was sent by the client itself."""
    uploaded = client.adapters.upload("client-test", ADAPTER, replace=True)
    yield uploaded
    try:
        client.adapters.unload(uploaded.name)
    except LorikeetError as error:
        assert error.code is grpc.StatusCode.NOT_FOUND


def test_an_answer_is_its_stream(client):
    options = dict(max_tokens=12, temperature=0, skip_prefix_cache=True)
    prompts = ["One, two,", [("user", "Say hello")], [1, 2, 3]]
    for prompt in prompts:
        whole = client.generate(prompt, **options)
        pieces = list(client.stream(prompt, **options))
        assert all(isinstance(piece, Piece) for piece in pieces)
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [id for piece in pieces for id in piece.token_ids] == list(whole.token_ids)
        assert pieces[-1].finish.usage == whole.usage
        assert whole.usage.completion_tokens == len(whole.token_ids)
        assert whole.finish_reason in ("stop", "length")


def test_options_reach_the_server(client):
    answer = client.generate("Ready?", json_schema=SCHEMA, max_tokens=32)
    assert isinstance(json.loads(answer.text)["ok"], bool)
    several = client.generate("Hi", n=3, max_tokens=4, seed=1)
    assert len(several.choices) == 3
    assert client.generate("Hi", choices=["yes", "no"]).text in ("yes", "no")
    stopped = client.generate("One, two, three,", temperature=0, max_tokens=40, stop=",")
    assert "," not in stopped.text and stopped.message.finish.string == ","
    with pytest.raises(TypeError, match="'temprature'"):
        client.generate("Hi", temprature=1)


def test_embeddings_are_vectors_of_length_1(client, adapter):
    for name in None, adapter.name:
        values = client.embed("What is the weather like?", adapter=name)
        assert len(values) == client.model().hidden_size
        assert abs(sum(value * value for value in values) - 1) < 1e-4
    assert len(client.embed([1, 2, 3], pooling="mean", dimensions=8)) == 8
    with pytest.raises(ValueError, match="POOLING_MAX"):
        client.embed("Hi", pooling="max")


def test_errors_name_what_is_wrong(client):
    with pytest.raises(LorikeetError, match="top_p") as bad:
        client.generate("Hi", top_p=7)
    assert bad.value.code is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(LorikeetError, match="nobody") as absent:
        list(client.stream("Hi", adapter="nobody"))
    assert absent.value.code is grpc.StatusCode.NOT_FOUND


def test_leaving_a_stream_stops_it(client):
    stream = client.stream("Once upon a time", max_tokens=400, ignore_eos=True)
    assert next(stream)
    stream.close()
    assert client.generate("Hi", max_tokens=1).usage.completion_tokens == 1


def test_adapters(client, adapter):
    adapters = client.adapters
    assert adapters.get("client-test").version == adapter.version
    assert [a.version for a in adapters.list("client-test")] == [adapter.version]
    assert adapters.pin("client-test").pinned
    assert not adapters.pin("client-test", False).pinned
    assert adapters.prefetch("client-test").in_host
    assert adapters.reload("client-test").version == adapter.version
    alias = adapters.alias("client-alias", {"client-test": 1})
    assert alias.version == adapter.version
    answer = client.generate("Hi", adapter="client-alias", max_tokens=4, temperature=0)
    assert answer.adapter_version == adapter.version
    half = client.generate("Hi", adapters={"client-test": 0.5}, max_tokens=4)
    assert half.usage.completion_tokens > 0
    assert adapters.unload("client-alias").version == adapter.version
    assert adapters.plan(16).adapter_bytes > 0
    assert client.model().max_context_tokens > 0


def test_watching(client, adapter):
    seen = []
    started = threading.Event()

    def watch():
        with Client(SERVER) as own:
            started.set()
            for event in own.adapters.watch():
                seen.append(event)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    started.wait()
    while thread.is_alive():  # the watch may begin after a change
        client.adapters.alias("client-watched", {"client-test": 1})
        client.adapters.unload("client-watched")
        thread.join(0.1)
    assert seen[0].name == "client-watched"


def test_asyncio(adapter):
    async def run():
        async with aio.Client(SERVER) as client:
            options = dict(adapter="client-test", max_tokens=8, temperature=0)
            answers = await asyncio.gather(*[
                client.generate(f"Say {i}", **options) for i in range(4)])
            assert all(answer.adapter_version == adapter.version for answer in answers)
            text = ""
            async for piece in client.stream("Say 0", **options):
                text += piece.text
            assert text == answers[0].text
            assert [a.name async for a in client.adapters.list("client-t")] == ["client-test"]
            assert (await client.adapters.get("client-test")).version == adapter.version
            assert (await client.adapters.upload("client-test", ADAPTER)).name == "client-test"
            with pytest.raises(LorikeetError):
                await client.generate("Hi", top_p=7)
            stream = client.stream("Once", max_tokens=400, ignore_eos=True)
            await stream.__anext__()
            await stream.aclose()

    asyncio.run(run())
