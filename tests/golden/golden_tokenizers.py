"""Small real tokenizers for the tiny models, one of each style that the families publish."""

import json

from tokenizers import (Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

from golden_common import write_json

VOCAB = 320
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

TEXT = """The quick brown fox jumps over the lazy dog, and then it jumps over the other dog.
In the morning the light on the water is silver; in the evening it is gold.
for (int i = 0; i < 10; ++i) { sum += values[i]; }  // the sum of the values
She said: "I'm sure they'll come, we've seen them there." They're not here yet.
def area(width, height):\n    return width * height\n
One, two, three, 123, 456.78, 2024-01-01; the number of the numbers is another number.
Caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u4f60\u597d \u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 \U0001f600 \U0001f680
""" * 4

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

STYLE = {"llama": "smollm", "llama3": "llama3", "smollm3": "llama3", "mistral": "spm",
         "qwen2": "qwen2", "qwen3": "qwen2", "mixtral": "smollm", "qwen3-moe": "qwen2"}

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
          "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def byte_level(style):
    tokenizer = Tokenizer(models.BPE())
    if style == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True),
                 pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        split = LLAMA3_SPLIT if style == "llama3" else QWEN2_SPLIT
        steps = [pre_tokenizers.Split(Regex(split), behavior="isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    if style == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return tokenizer


def sentencepiece_like():
    """Byte fallback and a marker for spaces, as converted SentencePiece models have."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    words = [w for w in TEXT.split() if w.isascii() and w.isalpha()]
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False))
    # The trainer registers what it was told is special; the byte tokens are ordinary vocabulary.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_tokenizer(family, directory):
    style = STYLE[family]
    spm = style == "spm"
    tokenizer = sentencepiece_like() if spm else byte_level(style)
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_max_length": 256, "bos_token": "<s>" if spm else "<|im_start|>",
              "eos_token": "</s>" if spm else "<|im_end|>"}
    if not spm:
        config["chat_template"] = CHATML
    write_json(directory / "tokenizer_config.json", config, indent=2)
