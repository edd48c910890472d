"""Lorikeet by LangChain: pip install langchain-openai. Needs the adapter `pirate` of scripts/demo."""

import os

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

server = {"base_url": os.environ.get("LORIKEET_URL", "http://localhost:8080") + "/v1",
          "api_key": os.environ.get("LORIKEET_API_KEY", "none"),
          "model": "pirate"}  # an adapter, or the base model
print(ChatOpenAI(**server, max_tokens=24).invoke("What is the weather like in spring?").content)
# Texts are sent as they are: the tokens that LangChain would make are another model's.
embeddings = OpenAIEmbeddings(**server, check_embedding_ctx_length=False)
print(len(embeddings.embed_query("a text")))
