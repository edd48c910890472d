"""Answers that must fit a schema, by the official test suite's schemas: BASE_URL MODEL SUITE_FOLDER.

SUITE_FOLDER: json/tests/draft2020-12 of the source archive of PyPI's jsonschema
(pip download --no-deps --no-binary :all: jsonschema==4.26.0). Asks for
schemas until 100 answers have ended by themselves, eight at a time, and checks each; then
times eight streams of one answer with a schema and without, in pairs of short rounds: a machine
that others share is as fast as it is for a second or two.

Where a schema allows any text, a weak model does not end: tokens that close something are likelier
here than the model has them. What may come is the schema's alone, bias or not.
"""

import asyncio
import json
import pathlib
import statistics
import sys
import time

import httpx
import jsonschema

WANTED = 100
STREAMS = 8
TRIES = 4
ROUNDS = 60
ROUND_TOKENS = 40
CLOSING = ['"', '}', ']', '"}', '"]', '}}', '<|im_end|>']
BIAS = 6
PROMPT = "Give an example value as JSON:"
LONG = {"type": "array", "items": {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"], "additionalProperties": False}, "minItems": 40}


def suite(folder):
    """Its schemas, each once, without those that need another document."""
    seen = {}
    for file in sorted(pathlib.Path(folder).glob("*.json")):
        for case in json.loads(file.read_text()):
            text = json.dumps(case["schema"])
            if "http" not in text.replace("https://json-schema.org/draft/2020-12/schema", ""):
                seen.setdefault(text, f"{file.stem}: {case['description']}")
    return seen


async def closing_bias(client):
    ids = []
    for text in CLOSING:
        answer = await client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
        tokens = answer.raise_for_status().json()["tokens"]
        if len(tokens) == 1:
            ids += tokens
    return {str(token): BIAS for token in ids}


def body(model, schema, **more):
    made = {"model": model, "prompt": PROMPT, "max_tokens": 120, "temperature": 0.7, "seed": 7}
    if schema is not None:
        made["response_format"] = {
            "type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {**made, **more}


async def check(client, model, folder):
    valid = refused = 0
    cut, wrong = [], []
    schemas = list(suite(folder).items())
    bias = await closing_bias(client)
    gate = asyncio.Semaphore(STREAMS)

    async def one(text, name):
        nonlocal valid, refused
        schema = json.loads(text)
        for seed in range(TRIES):
            async with gate:
                if valid + len(wrong) >= WANTED:
                    return
                answer = await client.post(
                    "/v1/completions", json=body(model, schema, seed=seed, logit_bias=bias))
            if answer.status_code == 400:
                refused += 1
                return
            choice = answer.raise_for_status().json()["choices"][0]
            if choice["finish_reason"] != "length":
                break
        else:
            cut.append(name)
            return
        try:
            jsonschema.Draft202012Validator(schema).validate(json.loads(choice["text"]))
            valid += 1
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append(f"{name}: {choice['text']!r}: {str(error).splitlines()[0]}")

    await asyncio.gather(*[one(text, name) for text, name in schemas])
    print(f"schemas: {valid} answers valid, {len(wrong)} not, {len(cut)} without an end in "
          f"{TRIES} times 120 tokens; "
          f"{refused} schemas refused on the way")
    for line in wrong:
        print("  not valid:", line)
    return wrong


async def stream(client, model, schema, seed):
    """Milliseconds a token, from the first to the last."""
    request = body(model, schema, max_tokens=ROUND_TOKENS, seed=seed, stream=True,
                   stream_options={"include_usage": True}, ignore_eos=schema is None)
    first = last = None
    async with client.stream("POST", "/v1/completions", json=request) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["text"]:
                last = time.perf_counter()
                first = first or last
            if event.get("usage"):
                return 1000 * (last - first) / (event["usage"]["completion_tokens"] - 1)


async def overhead(client, model):
    times = {"plain": [], "schema": []}
    kinds = [("plain", None), ("schema", LONG)]
    for round_ in range(ROUNDS + 1):  # the first warms up
        for kind, schema in kinds:
            found = await asyncio.gather(*[
                stream(client, model, schema, seed) for seed in range(STREAMS)])
            if round_:
                times[kind].append(statistics.median(found))
        kinds.reverse()
    plain, constrained = (statistics.median(times[kind]) for kind in ("plain", "schema"))
    pairs = [100 * (b / a - 1) for a, b in zip(times["plain"], times["schema"])]
    low, middle, high = statistics.quantiles(pairs, n=4)
    print(f"{STREAMS} streams: {plain:.2f} ms a token, {constrained:.2f} ms with a schema; in a pair "
          f"of rounds {middle:+.1f} % (median of {ROUNDS}; half lie in {low:+.1f} to {high:+.1f})")


async def main():
    base_url, model, folder = sys.argv[1:]
    async with httpx.AsyncClient(base_url=base_url, timeout=600) as client:
        wrong = await check(client, model, folder)
        await overhead(client, model)
    sys.exit(bool(wrong))


asyncio.run(main())
