#!/usr/bin/env python3
"""Makes the tokenizer goldens from Hugging Face's own libraries.

Run:  python make_tokenizer_goldens.py            (seeds are fixed; the output does not change)
With: tokenizers 0.23.3, transformers 5.23.0, gguf 0.19.0, sentencepiece 0.2.3, protobuf 7.36.2
Needs the real model in the cache folder (scripts/setup brings it).

Written here:
  strings.json       the strings, once
  ids_NAME.json      per tokenizer: ids of every string, what BOS/EOS add, decodings of random ids
  NAME/              a small trained tokenizer as a Hugging Face directory
  NAME.gguf          the same tokenizer as a GGUF file without tensors
The real model's vocabulary is not written; only its ids are.
"""

import json
import os
import random
import tempfile
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from golden_strings import WORDS, all_strings

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lorikeet"
MODEL = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
STRINGS = all_strings()
UNSEEN = "xylophones"  # no merges for this word
CORPUS = [s for s in STRINGS if UNSEEN not in s] + [" ".join(WORDS[i:] + WORDS[:i]) for i in range(0, len(WORDS), 3)]

LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_WORDS = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def special(token):
    return AddedToken(token, special=True, normalized=False)


def byte_level_bpe(pre, added, normalizer=None, whole_word=None):
    """A small byte-level BPE; `whole_word`: a token that no merge makes (needs ignore_merges)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_word is not None))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if whole_word:
        content = json.loads(tokenizer.to_str())
        content["model"]["vocab"][whole_word] = len(content["model"]["vocab"])
        tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens(added)
    return tokenizer


def split(words):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def around(tokenizer, before="", after=""):
    """The post-processor that puts tokens around a text."""
    single = [f"{before}:0"] * bool(before) + ["$A:0"] + [f"{after}:0"] * bool(after)
    return processors.TemplateProcessing(
        single=single, pair=single + [part.replace(":0", ":1").replace("$A", "$B") for part in single],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (before, after) if token])


def sentencepiece_bpe():
    """A SentencePiece BPE model with byte fallback as the tokenizer.json of Llama 2 has it.

    Transformers makes the merges from the scores.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "spm")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(s.replace("\x00", " ") for s in CORPUS), model_prefix=prefix, model_type="bpe",
            vocab_size=1400, byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
            remove_extra_whitespaces=False, split_digits=True, max_sentence_length=100000, num_threads=1,
            minloglevel=2)
        spm = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    ids = range(spm.get_piece_size())
    vocab = {spm.id_to_piece(i): i for i in ids}
    merges = generate_merges(vocab, [(spm.id_to_piece(i), spm.get_score(i)) for i in ids])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([special(t) for t in ("<unk>", "<s>", "</s>")])
    kinds = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in ids]
    return tokenizer, kinds, [spm.get_score(i) for i in ids]


def write_gguf(name, tokenizer, model, pre, named, flags, kinds=None, scores=None):
    content = json.loads(tokenizer.to_str())
    added = {t["id"]: t for t in content["added_tokens"]}
    size = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(i) for i in range(size)]
    if kinds is None:
        kinds = [1 if i not in added else 3 if added[i]["special"] else 4 for i in range(size)]
    writer = gguf.GGUFWriter(HERE / f"{name}.gguf", "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if scores is None:
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    else:
        writer.add_token_scores(scores)
    for role, token in named.items():
        getattr(writer, f"add_{role}_token_id")(tokenizer.token_to_id(token))
    for flag, value in flags.items():
        getattr(writer, f"add_{flag}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def write_directory(name, tokenizer, config, generation=None):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    content = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def write_ids(name, tokenizer, add_special):
    """`add_special`: string -> ids with BOS/EOS; must be the same ids between a prefix and a suffix."""
    ids = [tokenizer.encode(s, add_special_tokens=False).ids for s in STRINGS]
    both = add_special("")
    cut = next((i for i in range(len(both) + 1) if all(
        add_special(s) == both[:i] + x + both[i:] for s, x in zip(STRINGS, ids))), None)
    assert cut is not None, name
    rng = random.Random(name)
    decodings = []
    for i in range(240):
        size = tokenizer.get_vocab_size()
        # A third of the ids from the single bytes and special tokens, where text goes wrong.
        pool = [rng.randrange(size), rng.randrange(min(300, size)), rng.randrange(size)]
        some = [rng.choice(pool) if rng.random() < 0.5 else rng.randrange(size) for _ in range(rng.randint(1, 14))]
        some += rng.choice(ids)[:6] if i % 2 else []
        decodings.append([some, tokenizer.decode(some, skip_special_tokens=False), tokenizer.decode(some)])
    content = {"prefix": both[:cut], "suffix": both[cut:], "ids": ids, "decodings": decodings}
    (HERE / f"ids_{name}.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{name}: {len(ids)} strings, {sum(map(len, ids))} ids, prefix {both[:cut]}, suffix {both[cut:]}")


def check_same(name, tokenizer, loaded):
    """Transformers reads the directory as the tokenizer that was written."""
    for text in STRINGS:
        assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(
            text, add_special_tokens=False).ids, (name, text)


def small(name, tokenizer, model, pre, named, config, generation, flags, **spec):
    config = {**{f"{role}_token": token for role, token in named.items()}, **config}
    loaded = write_directory(name, tokenizer, config, generation)
    check_same(name, tokenizer, loaded)
    write_gguf(name, tokenizer, model, pre, named, flags, **spec)
    write_ids(name, tokenizer, lambda text: loaded(text)["input_ids"])


def make_small():
    gpt2 = byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), [special("<|endoftext|>")])
    small("gpt2", gpt2, "gpt2", "gpt-2", {"eos": "<|endoftext|>"}, {}, None, {})

    smollm = byte_level_bpe(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]),
        [special(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    small("smollm", smollm, "gpt2", "smollm", {"bos": "<|im_start|>", "eos": "<|im_end|>"}, {}, None,
          {"add_bos_token": False})

    llama3 = byte_level_bpe(split(LLAMA3_WORDS), [special(t) for t in (
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")],
        whole_word="Ġ" + UNSEEN)
    llama3.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True),
                                                 around(llama3, "<|begin_of_text|>")])
    ends = [llama3.token_to_id("<|end_of_text|>"), llama3.token_to_id("<|eot_id|>")]
    small("llama3", llama3, "gpt2", "llama-bpe", {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}, {},
          {"eos_token_id": ends}, {})

    qwen2 = byte_level_bpe(split(QWEN2_WORDS), [special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>"),
                                                AddedToken("<tool_call>", normalized=False),
                                                AddedToken("</tool_call>", normalized=False)], normalizers.NFC())
    small("qwen2", qwen2, "gpt2", "qwen2", {"eos": "<|im_end|>", "pad": "<|endoftext|>"}, {},
          {"eos_token_id": [qwen2.token_to_id("<|im_end|>"), qwen2.token_to_id("<|endoftext|>")]},
          {"add_bos_token": False})

    tekken = byte_level_bpe(split(TEKKEN_WORDS), [special(t) for t in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")],
                            whole_word="Ġ" + UNSEEN)
    tekken.post_processor = around(tekken, "<s>", "</s>")
    small("tekken", tekken, "gpt2", "tekken", {"bos": "<s>", "eos": "</s>"},
          {"add_bos_token": False}, None, {"add_bos_token": True, "add_eos_token": True})

    llama2, kinds, scores = sentencepiece_bpe()
    llama2.post_processor = around(llama2, "<s>")
    small("llama2", llama2, "llama", None, {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, {}, {"eos_token_id": 2}, {},
          kinds=kinds, scores=scores)


def make_real():
    """SmolLM2's tokenizer.json, put together from the GGUF file.

    Its pre-tokenizer splits digits off one by one first; a conversion that leaves this step out
    encodes white space before digits differently.
    """
    fields = gguf.GGUFReader(MODEL).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([special(t) for t, kind in zip(tokens, kinds) if kind == 3])
    assert tokenizer.get_vocab_size() == len(tokens)
    write_ids("smollm2", tokenizer, lambda text: tokenizer.encode(text).ids)


if __name__ == "__main__":
    (HERE / "strings.json").write_text(json.dumps(STRINGS, ensure_ascii=False, separators=(",\n", ":")) + "\n")
    print(len(STRINGS), "strings")
    make_small()
    make_real()
