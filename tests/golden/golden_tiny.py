"""Tiny random models of every family in Hugging Face layout, PEFT adapters on them, and their logits."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from golden_common import ROOT, draw_case, fresh_directory, setup_torch, write_json, write_tensors
from golden_tokenizers import VOCAB, write_tokenizer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_config(architecture, model_type, **keys):
    config = {
        "architectures": [architecture], "model_type": model_type, "vocab_size": VOCAB,
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": True, "torch_dtype": "float32",
    }
    return {k: v for k, v in {**config, **keys}.items() if v is not None}


# Written as the published checkpoints write them: some with `rope_theta`/`rope_scaling`, some with
# `rope_parameters`, `torch_dtype` or `dtype`, with and without `head_dim`.
FAMILIES = {
    "llama": base_config("LlamaForCausalLM", "llama", num_key_value_heads=4,
                         tie_word_embeddings=False),
    "llama3": base_config(
        "LlamaForCausalLM", "llama", head_dim=32, intermediate_size=64, rope_theta=10000.0,
        eos_token_id=[2, 4], attention_bias=False, mlp_bias=False,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    "smollm3": base_config(
        "SmolLM3ForCausalLM", "smollm3", num_hidden_layers=4, intermediate_size=48,
        torch_dtype=None, dtype="float32", rms_norm_eps=1e-6, no_rope_layers=[1, 1, 1, 0],
        no_rope_layer_interval=4, layer_types=["full_attention"] * 4, use_sliding_window=False,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}, pad_token_id=2),
    "mistral": base_config("MistralForCausalLM", "mistral", head_dim=16, rope_theta=1000.0,
                           sliding_window=8),
    "qwen2": base_config("Qwen2ForCausalLM", "qwen2", rope_theta=1000000.0, rms_norm_eps=1e-6,
                         use_sliding_window=False, sliding_window=128, max_window_layers=2),
    "qwen3": base_config(
        "Qwen3ForCausalLM", "qwen3", head_dim=24, torch_dtype=None, dtype="float32",
        rms_norm_eps=1e-6, attention_bias=False, use_sliding_window=False, sliding_window=None,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}),
    "mixtral": base_config("MixtralForCausalLM", "mixtral", rope_theta=1000000.0, intermediate_size=48,
                           num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "qwen3-moe": base_config(  # a dense layer between two with experts, whose weights do not sum to 1
        "Qwen3MoeForCausalLM", "qwen3_moe", num_hidden_layers=3, head_dim=24, rope_theta=1000000.0,
        rms_norm_eps=1e-6, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=3,
        norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[1], attention_bias=False,
        use_sliding_window=False),
}
WITH_EXPERTS = ("mixtral", "qwen3-moe")
# The same weights rounded to a half-precision file; the oracle computes on them in fp32.
HALF_COPIES = {"llama3-bf16": ("llama3", torch.bfloat16), "qwen2-f16": ("qwen2", torch.float16)}
SHARDED = "mistral"
HEAD_ADAPTED = ("llama", "qwen2")  # one with its own head, one with a tied one

ADAPTERS = {
    "lora": dict(r=3, lora_alpha=6, target_modules=LINEAR),
    "lora_qv": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
                    rank_pattern={"layers.0.self_attn.q_proj": 2, "v_proj": 6},
                    alpha_pattern={r"model\.layers\.1\.self_attn\.v_proj": 3,
                                   r".*\.0\.self_attn\.v_proj": 12}),
    "rslora": dict(r=5, lora_alpha=4, use_rslora=True,
                   target_modules=["q_proj", "k_proj", "o_proj", "gate_proj"]),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear"),
    "lora_bias": dict(r=2, lora_alpha=3, lora_bias=True,
                      target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
    "lora_head": dict(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head", "embed_tokens"]),
}
STORED_AS = {"lora_qv": torch.bfloat16, "rslora": torch.float16}


def random_weight(name, shape, generator):
    """Scales at which attention is sharp, norms differ from one and logits spread over several nats."""
    w = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1.0 + 0.25 * w
    if name.endswith("bias"):
        return 0.5 * w
    if "embed_tokens" in name or "lm_head" in name:
        return 0.4 * w
    gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
    return w * gain / shape[-1] ** 0.5


def write_model(family, config, directory, seed):
    fresh_directory(directory)
    write_json(directory / "config.json", config, indent=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: random_weight(name, p.shape, generator)
               for name, p in model.named_parameters()}  # a tied head is not listed twice
    if family in WITH_EXPERTS:
        weights = as_published(model, weights)
    save_weights(directory, weights, sharded=family == SHARDED)
    write_tokenizer(family, directory)


def as_published(model, weights):
    """Transformers 5 has one tensor for all experts of a layer, published files one for each."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_file(Path(directory) / "model.safetensors")


def save_weights(directory, weights, sharded):
    if not sharded:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({n: weights[n] for n in members}, directory / file, metadata={"format": "pt"})
    total = sum(w.numel() * w.element_size() for w in weights.values())
    write_json(directory / "model.safetensors.index.json",
               {"metadata": {"total_size": total},
                "weight_map": {n: f for f, members in shards.items() for n in sorted(members)}}, 2)


def write_half_copy(name, family, dtype):
    source, target = ROOT / "models" / family, ROOT / "models" / name
    fresh_directory(target)
    for file in source.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config, indent=2)
    weights = load_file(source / "model.safetensors")
    save_weights(target, {n: w.to(dtype) for n, w in weights.items()}, sharded=False)


def load_model(directory):
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def write_adapter(family, name, seed):
    directory = fresh_directory(ROOT / "adapters" / family / name)
    torch.manual_seed(seed)
    model = get_peft_model(load_model(ROOT / "models" / family),
                           LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
    for parameter_name, p in model.named_parameters():
        if "lora_magnitude_vector" in parameter_name:
            p.mul_(1.0 + 0.3 * torch.randn(p.shape))
        elif "lora_B" in parameter_name or "lora_embedding_A" in parameter_name:
            p.copy_(0.15 * torch.randn(p.shape))  # they start at zero
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"golden/{family}"
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set whose order changes from run to run
    write_json(directory / "adapter_config.json", config, indent=2)
    file = directory / "adapter_model.safetensors"
    dtype = STORED_AS.get(name, torch.float32)
    save_file({n: w.to(dtype) for n, w in load_file(file).items()}, file, metadata={"format": "pt"})


def load_adapted(family, name, model_directory=None):
    model = load_model(model_directory or ROOT / "models" / family)
    model = PeftModel.from_pretrained(model, ROOT / "adapters" / family / name)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model.eval()


def adapter_names(family):
    if family in WITH_EXPERTS:
        return ["lora_qv"]  # golden_moe.py has those on experts
    return [a for a in ADAPTERS if a != "lora_head" or family in HEAD_ADAPTED]


def make_cases(family):
    cases, logits, base = [], {}, load_model(ROOT / "models" / family)
    generator = torch.Generator().manual_seed(1000 + list(FAMILIES).index(family))

    def add(model, adapter, label, lengths, directory=family):
        for length in lengths:
            prompt, out, tokens, margin = draw_case(model, length, VOCAB, generator)
            if adapter:
                change = (out - base(torch.tensor([prompt])).logits[0]).abs().max()
                assert change > 0.5, f"{family}/{adapter} hardly changes the base: {change}"
            key = f"{label}.{length}"
            logits[key] = out
            cases.append({
                "model": f"models/{directory}",
                "adapter": f"adapters/{family}/{adapter}" if adapter else None,
                "prompt_ids": prompt, "logits_file": f"logits/{family}.safetensors",
                "logits": key, "greedy_ids": tokens, "min_margin": round(margin, 5)})

    add(base, None, "base", [1, 5, 13, 40])
    for copy, (source, _) in HALF_COPIES.items():
        if source == family:
            add(load_model(ROOT / "models" / copy), None, copy, [17], directory=copy)
            add(load_adapted(family, "dora", ROOT / "models" / copy), "dora", f"{copy}.dora", [11],
                directory=copy)
    for name in adapter_names(family):
        add(load_adapted(family, name), name, name, [7, 21])
    write_tensors(ROOT / "logits" / f"{family}.safetensors", logits)
    return cases


def main():
    setup_torch()
    for i, (family, config) in enumerate(FAMILIES.items()):
        write_model(family, config, ROOT / "models" / family, seed=100 + i)
        for j, name in enumerate(adapter_names(family)):
            write_adapter(family, name, seed=10 * (i + 1) + j)
    for name, (family, dtype) in HALF_COPIES.items():
        write_half_copy(name, family, dtype)
    cases = [case for family in FAMILIES for case in make_cases(family)]
    write_json(ROOT / "cases.json", cases)
    print(f"tiny: {len(cases)} cases, smallest margin {min(c['min_margin'] for c in cases)}")
