"""The demo's base model and its tokenizer, as Transformers sees them."""

import hashlib
import os
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3  # GGUF's token type for tokens that text never spells


def gguf_path():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "lorikeet" / FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{path}: SHA-256 is {digest}, expected {SHA256}")
    return path


def load_model():
    """The 4-bit file dequantised to fp32."""
    path = gguf_path()
    return AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32,
        attn_implementation="eager").eval()


def load_tokenizer():
    """Built from the file's own vocabulary and merges.

    Not through Transformers' GGUF conversion: it leaves out that the `smollm` pre-tokenizer splits
    digits one by one, so that blanks before digits come out as other tokens.
    """
    fields = GGUFReader(str(gguf_path())).fields
    value = lambda key: fields[f"tokenizer.{key}"].contents()
    tokens = value("ggml.tokens")
    merges = [tuple(m.split(" ")) for m in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(t, normalized=False, special=True)
        for t, kind in zip(tokens, value("ggml.token_type")) if kind == CONTROL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False)
    fast.chat_template = value("chat_template")
    return fast


def chat_ids(tokenizer, question):
    """Token ids of a one-question chat, ready for the assistant to answer."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                         add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
