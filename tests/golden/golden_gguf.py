"""GGUF versions of the tiny models: each file, gguf-py's own dequantisation of it, and Transformers on that."""

import json
import math
import re

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import golden_tiny
from golden_common import ROOT, draw_case, setup_torch, write_json, write_tensors
from golden_tokenizers import CHATML, SPECIAL, STYLE, VOCAB

FILES = [("llama", Type.F32), ("llama", Type.Q8_0), ("llama", Type.Q4_0), ("llama", Type.Q4_1),
         ("llama3", Type.BF16), ("smollm3", Type.Q8_0), ("qwen2", Type.F16), ("qwen3", Type.Q8_0),
         ("wide", Type.Q4_K), ("wide", Type.Q5_K), ("wide", Type.Q6_K), ("mixtral", Type.Q8_0)]
# K types hold 256 weights a block, so their model is wider. It exists as GGUF alone.
WIDE = golden_tiny.base_config(
    "LlamaForCausalLM", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
ADAPTED = {"llama-F32": ["lora", "dora", "lora_head"], "llama-Q8_0": ["rslora"],
           "llama-Q4_1": ["lora", "dora"], "llama3-BF16": ["lora"], "smollm3-Q8_0": ["lora"],
           "qwen2-F16": ["dora", "lora_bias"], "qwen3-Q8_0": ["lora"], "mixtral-Q8_0": ["lora_qv"]}

ARCH = {"llama": gguf.MODEL_ARCH.LLAMA, "llama3": gguf.MODEL_ARCH.LLAMA,
        "smollm3": gguf.MODEL_ARCH.SMOLLM3, "qwen2": gguf.MODEL_ARCH.QWEN2,
        "qwen3": gguf.MODEL_ARCH.QWEN3, "wide": gguf.MODEL_ARCH.LLAMA,
        "mixtral": gguf.MODEL_ARCH.LLAMA}
ROTATES_NEIGHBOURS = ("llama", "llama3", "smollm3", "wide", "mixtral")  # q, k rows stored in that order
PRE_TOKENIZER = {"smollm": "smollm", "llama3": "llama-bpe", "qwen2": "qwen2"}


def config_of(family):
    if family == "wide":
        return AutoConfig.for_model(**WIDE)
    return AutoConfig.from_pretrained(ROOT / "models" / family)


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def heads_of(name, family, config):
    """Heads whose rows are reordered in this tensor, or None."""
    if family not in ROTATES_NEIGHBOURS:
        return None
    if "q_proj" in name:
        return config.num_attention_heads
    return config.num_key_value_heads if "k_proj" in name else None


def to_neighbours(w, heads):
    """Rotary pairs (j, j + d/2) of each head become neighbours (2j, 2j + 1)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def to_halves(w, heads):
    return w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def pack_scales(scale, minimum):
    """Eight 6-bit scales and minima [blocks, 8] to the 12 bytes of Q4_K and Q5_K."""
    low = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    middle = minimum[:, :4] | (minimum[:, 4:] >> 4) << 6
    high = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return np.concatenate([low, middle, high], axis=1).astype(np.uint8)


def random_k_blocks(shape, kind, spread, rng):
    """Valid random blocks whose weights have about the given standard deviation and mean zero.

    gguf-py reads K types but cannot write them.
    """
    blocks = shape[0] * shape[1] // 256
    half = lambda x: np.full((blocks, 1), x, np.float16).view(np.uint8)
    raw = lambda n: rng.integers(0, 256, (blocks, n), dtype=np.uint8)
    if kind == Type.Q6_K:
        sign = rng.choice([-1, 1], (blocks, 16))
        scales = (sign * rng.integers(20, 128, (blocks, 16))).astype(np.int8).view(np.uint8)
        parts = [raw(128), raw(64), scales, half(spread / (18.5 * 80))]
    else:
        levels, high_bits = (16, []) if kind == Type.Q4_K else (32, [raw(32)])
        scale = rng.integers(20, 62, (blocks, 8))
        minimum = scale + rng.integers(-2, 3, (blocks, 8))
        step = spread / (levels / math.sqrt(12) * 43)
        parts = [half(step), half(step * (levels - 1) / 2), pack_scales(scale, minimum),
                 *high_bits, raw(128)]
    data = np.concatenate(parts, axis=1)
    return data.reshape(shape[0], -1)


def storable(name, shape, kind):
    """Norms and biases stay F32; rows that no whole number of blocks fills are kept in F16."""
    if len(shape) == 1:
        return Type.F32
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F16


def stored_tensors(family, kind, config):
    """HF name -> (type, bytes or values as stored), rows in GGUF's order."""
    if family == "wide":
        rng, generator = np.random.default_rng(5), torch.Generator().manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
        for name, p in model.named_parameters():
            if p.dim() == 1:
                yield name, Type.F32, golden_tiny.random_weight(name, p.shape, generator).numpy()
            else:
                spread = 0.3 if "embed" in name else p.shape[1] ** -0.5
                yield name, kind, random_k_blocks(tuple(p.shape), kind, spread, rng)
        return
    tensors = stacked(load_file(ROOT / "models" / family / "model.safetensors"))
    for name, w in sorted(tensors.items()):
        w, stored = w.numpy(), storable(name, w.shape, kind)
        heads = heads_of(name, family, config)
        w = to_neighbours(w, heads) if heads else w
        yield name, stored, (w if stored == Type.F32 else gguf.quants.quantize(w, stored))


EXPERT = re.compile(r"(.*\.experts)\.\d+\.(w[123])\.weight")


def stacked(tensors):
    """One tensor of all experts in place of one each."""
    out, experts = {}, {}
    for name, w in tensors.items():
        match = EXPERT.fullmatch(name)
        if match:
            experts.setdefault(".".join([*match.groups(), "weight"]), []).append(w)
        else:
            out[name] = w
    return out | {name: torch.stack(each) for name, each in experts.items()}


def as_transformers_has_them(weights):
    """Transformers 5's names of Mixtral's block; gate and up are one tensor there."""
    out = {name.replace("block_sparse_moe", "mlp"): w for name, w in weights.items()}
    for name in [n for n in out if n.endswith("experts.w1.weight")]:
        block = name.removesuffix("w1.weight")
        out[block + "gate_up_proj"] = torch.cat([out.pop(name), out.pop(block + "w3.weight")], 1)
        out[block + "down_proj"] = out.pop(block + "w2.weight")
    return out


def rope_factors(config):
    """Llama 3.1's divisors of the rotary frequencies, as its published rule has them."""
    rope = config.rope_parameters
    base, d = rope["rope_theta"], head_dim(config)
    longest = rope["original_max_position_embeddings"]
    factors = []
    for j in range(d // 2):
        wavelength = 2 * math.pi * base ** (2 * j / d)
        if wavelength < longest / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > longest / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            blend = (longest / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - blend) / rope["factor"] + blend))
    return np.array(factors, np.float32)


def write_metadata(writer, family, config):
    rope = config.rope_parameters
    writer.add_name(f"golden {family}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_dimension_count(head_dim(config))
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))


def write_tokenizer(writer, family):
    source = "llama" if family == "wide" else family
    state = json.loads((ROOT / "models" / source / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER[STYLE[source]])
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL
                            for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(STYLE[source] == "llama3")
    writer.add_chat_template(CHATML)


def write_file(family, kind, config):
    """Writes the file; returns its name and the weights it stands for, in HF order and in fp32."""
    name = f"{family}-{kind.name}"
    writer = gguf.GGUFWriter(ROOT / "models" / f"{name}.gguf", gguf.MODEL_ARCH_NAMES[ARCH[family]])
    write_metadata(writer, family, config)
    write_tokenizer(writer, family)
    names = gguf.get_tensor_name_map(ARCH[family], config.num_hidden_layers)
    weights, rows = {}, {}
    for hf_name, stored, data in stored_tensors(family, kind, config):
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(gguf_name, np.ascontiguousarray(data), raw_dtype=stored)
        values = np.asarray(data if stored == Type.F32 else gguf.quants.dequantize(data, stored),
                            np.float32)
        if values.ndim == 2:
            rows[f"{name}.gguf/{gguf_name}"] = torch.from_numpy(values[[0, -1]].copy())
        heads = heads_of(hf_name, family, config)
        weights[hf_name] = torch.from_numpy((to_halves(values, heads) if heads else values).copy())
    if family == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return name, weights, rows


def model_with(config, weights):
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(as_transformers_has_them(weights), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def check_by_transformers(name, model):
    """Transformers' own reader must find the same weights in the file."""
    read = AutoModelForCausalLM.from_pretrained(
        str(ROOT / "models"), gguf_file=f"{name}.gguf", dtype=torch.float32).state_dict()
    for key, w in model.state_dict().items():
        assert torch.equal(read[key], w), f"{name}: {key} differs in Transformers' reader"


def make_cases(name, family, config, weights, generator, logits):
    base = model_with(config, weights)
    if family == "llama3":
        plain = config.rope_parameters["rope_theta"] ** -(
            torch.arange(0, head_dim(config), 2) / head_dim(config))
        torch.testing.assert_close(base.model.rotary_emb.inv_freq,
                                   plain / torch.from_numpy(rope_factors(config)))
    elif family in ("llama", "qwen2", "wide"):  # its reader knows no SmolLM3 and no head_dim of Qwen3
        check_by_transformers(name, base)
    runs = [(None, length) for length in (6, 23)] + [(a, 12) for a in ADAPTED.get(name, [])]
    for adapter, length in runs:
        model, path = base, None
        if adapter:
            path = f"adapters/{family}/{adapter}"
            model = PeftModel.from_pretrained(model_with(config, weights), ROOT / path).eval()
        prompt, out, tokens, margin = draw_case(model, length, VOCAB, generator)
        key = f"{name}.{adapter or 'base'}.{length}"
        logits[key] = out
        yield {"model": f"models/{name}.gguf", "adapter": path, "prompt_ids": prompt,
               "logits_file": "gguf/logits.safetensors", "logits": key, "greedy_ids": tokens,
               "min_margin": round(margin, 5)}


def main():
    setup_torch()
    generator = torch.Generator().manual_seed(77)
    cases, logits, dequantised = [], {}, {}
    for family, kind in FILES:
        config = config_of(family)
        name, weights, rows = write_file(family, kind, config)
        dequantised.update(rows)
        cases += make_cases(name, family, config, weights, generator, logits)
    write_tensors(ROOT / "gguf" / "logits.safetensors", logits)
    write_tensors(ROOT / "gguf" / "dequantised.safetensors", dequantised)
    write_json(ROOT / "gguf_cases.json", cases)
    print(f"gguf: {len(cases)} cases, smallest margin {min(c['min_margin'] for c in cases)}")
