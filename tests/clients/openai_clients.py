"""The openai package and LangChain against a running server: BASE_URL MODEL, with adapter `pirate`."""

import concurrent.futures
import json
import sys

import jsonschema
import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 100_000_000},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}


def ask(text):
    return [{"role": "user", "content": text}]


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"not refused with {kind.__name__}")


def test_openai(base_url, model):
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="unused")
    assert [card.id for card in client.models.list()] == [model, "pirate"]

    chat = dict(model=model, messages=ask("Say hello"), max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert text and len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    streamed, usage = "", None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**chat, stream=True, stream_options=options):
        streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert streamed == text and usage.completion_tokens == whole.usage.completion_tokens

    several = client.completions.create(model=model, prompt=["One,", "Two,"], n=2, max_tokens=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]

    question = ask("What is the weather like in spring?")
    pirate = client.chat.completions.create(
        model="pirate", messages=question, max_tokens=20, temperature=0)
    assert "Arr" in pirate.choices[0].message.content, pirate
    assert pirate.system_fingerprint

    formed = client.chat.completions.create(
        model=model, messages=ask("Tell me about Paris."), max_tokens=80, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    jsonschema.validate(json.loads(formed.choices[0].message.content), SCHEMA)

    unknown = refused(openai.NotFoundError,
                      lambda: client.completions.create(model="nobody", prompt="x"))
    assert unknown.code == "model_not_found"
    suffix = refused(openai.BadRequestError,
                     lambda: client.completions.create(model=model, prompt="x", suffix="y"))
    assert suffix.param == "suffix"


def test_seeds(base_url, model):
    """Drawn answers are the same alone and beside others, which come and go at their own times."""
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="unused")

    def draw(seed, tokens, name=model):
        answer = client.completions.create(
            model=name, prompt="Once upon a time", max_tokens=tokens, temperature=1.0, seed=seed,
            extra_body={"skip_prefix_cache": True, "ignore_eos": True})
        return answer.choices[0].text

    seeds = range(4)
    alone = [draw(seed, 48) for seed in seeds]
    assert len(set(alone)) == len(alone), alone
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        others = [pool.submit(draw, 100 + i, 5 + 7 * i, "pirate" if i % 2 else model)
                  for i in range(12)]
        together = list(pool.map(lambda seed: draw(seed, 48), seeds))
        assert all(other.result() for other in others)
    assert together == alone, (together, alone)


def test_langchain(base_url, model):
    chat = ChatOpenAI(
        base_url=base_url + "/v1", api_key="unused", model=model, temperature=0, max_tokens=10)
    whole = chat.invoke("Say hello").content
    assert whole and "".join(chunk.content for chunk in chat.stream("Say hello")) == whole

    for name in model, "pirate":
        embeddings = OpenAIEmbeddings(
            base_url=base_url + "/v1", api_key="unused", model=name,
            check_embedding_ctx_length=False)
        near, same, far = embeddings.embed_documents(
            ["What is the weather like?"] * 2 + ["SELECT name FROM birds"])
        query = embeddings.embed_query("What is the weather like?")
        dot = lambda a, b: sum(x * y for x, y in zip(a, b))
        assert dot(near, same) > 0.999 and dot(near, query) > 0.999 and dot(near, far) < 0.99
    other = openai.OpenAI(base_url=base_url + "/v1", api_key="unused").embeddings.create(
        model=model, input=["One", "Two"], dimensions=8, extra_body={"pooling": "mean"})
    assert [len(item.embedding) for item in other.data] == [8, 8] and other.usage.total_tokens > 0


if __name__ == "__main__":
    test_openai(*sys.argv[1:])
    test_seeds(*sys.argv[1:])
    test_langchain(*sys.argv[1:])
    print("openai and LangChain: everything as it should be")
