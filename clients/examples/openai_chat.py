"""Lorikeet by the openai package: pip install openai. Needs the adapter `pirate` of scripts/demo."""

import os

import openai

client = openai.OpenAI(
    base_url=os.environ.get("LORIKEET_URL", "http://localhost:8080") + "/v1",
    api_key=os.environ.get("LORIKEET_API_KEY", "none"))
question = [{"role": "user", "content": "What is the weather like in spring?"}]
for chunk in client.chat.completions.create(  # the adapter is the model's name
        model="pirate", messages=question, max_tokens=24, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# What OpenAI's API does not have goes into extra_body: here a weighted sum of adapters.
summed = client.chat.completions.create(
    model=client.models.list().data[0].id, messages=question, max_tokens=24,
    extra_body={"adapters": [{"id": "pirate", "weight": 0.5}], "min_p": 0.1})
print(summed.choices[0].message.content)
