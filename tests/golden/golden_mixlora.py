"""Makes the goldens of MixLoRA (Li et al. 2024), in the form of golden_variants.py.

Versions: torch 2.15.0, transformers 5.23.0, mixlora 0.2.3 (its authors' library), safetensors 0.8.0. Seed 30 everywhere.
Run: python golden_mixlora.py   (adds to variants/cases.json; run golden_variants.py first)

The library reads its weights from a pickle; here the same names are in a safetensors file.
"""

import torch
from mixlora.config import MixLoraConfig
from mixlora.model import inject_adapter_in_model

from golden_common import fresh_directory, setup_torch, write_json, write_tensors
from golden_variants import OUT, SEED, add_cases, base_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CASES = {
    "mixlora": ("llama", dict(r=4, lora_alpha=8, num_experts=4, top_k=2,
                              target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])),
    "mixlora_some": ("qwen2", dict(r=3, lora_alpha=6, num_experts=5, top_k=3, use_rslora=True,
                                   target_modules=["up_proj", "down_proj"])),
    "mixlora_one": ("llama", dict(r=2, lora_alpha=4, num_experts=3, top_k=1,
                                  target_modules=["o_proj", "gate_proj"])),
}


def draw(model, config):
    tensors = {}

    def pair(name, linear):
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(config["r"], linear.in_features)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(linear.out_features, config["r"])

    for i, layer in enumerate(model.model.layers):
        name = f"mixlora.layers.{i}"
        tensors[f"{name}.mlp.moe_gate.weight"] = torch.randn(config["num_experts"], model.config.hidden_size)
        for target in config["target_modules"]:
            if target in ATTENTION:
                pair(f"{name}.self_attn.{target}", getattr(layer.self_attn, target))
                continue
            for e in range(config["num_experts"]):
                pair(f"{name}.mlp.{target}.experts.{e}", getattr(layer.mlp, target))
    return tensors


def build(name):
    torch.manual_seed(SEED)
    base, options = CASES[name]
    config = dict(base_model_name_or_path=base, task_type="CAUSAL_LM", peft_type="MIXLORA", bias="none",
                  lora_dropout=0.05, routing_strategy="mixlora", act_fn="silu", **options)
    model = base_model(base)
    tensors = draw(model, config)
    directory = fresh_directory(OUT / name)
    write_json(directory / "adapter_config.json", config)
    write_tensors(directory / "adapter_model.safetensors", tensors)
    read = MixLoraConfig.from_config(config)
    read.adapter_name_, read.dtype_ = "default", torch.float32
    inject_adapter_in_model(model, read.check(), tensors)
    # They are in no module, so that the model's eval() would leave their dropout on.
    for layer in model.model.layers:
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()
    return model.eval()


def main():
    setup_torch()
    add_cases({name: (base, build(name)) for name, (base, _) in CASES.items()})


if __name__ == "__main__":
    main()
