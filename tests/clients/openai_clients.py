"""The openai package and LangChain against a running server: BASE_URL MODEL, with adapter `pirate`."""

import json
import sys

import jsonschema
import openai
from langchain_openai import ChatOpenAI

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


def test_langchain(base_url, model):
    chat = ChatOpenAI(
        base_url=base_url + "/v1", api_key="unused", model=model, temperature=0, max_tokens=10)
    whole = chat.invoke("Say hello").content
    assert whole and "".join(chunk.content for chunk in chat.stream("Say hello")) == whole


if __name__ == "__main__":
    test_openai(*sys.argv[1:])
    test_langchain(*sys.argv[1:])
    print("openai and LangChain: everything as it should be")
