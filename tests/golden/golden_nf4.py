"""Makes tiny bases whose linears bitsandbytes has quantised to NF4, as Transformers saves them.

Versions: torch 2.15.0, transformers 5.23.0, bitsandbytes 0.50.2, safetensors 0.8.0. Seed 30.
Run: python golden_nf4.py   (writes models/*-nf4 and nf4/; golden_variants.py makes adapters on them)

models/NAME/   llama-nf4: double quantisation; qwen2-nf4: none, biases
nf4/dequantised.safetensors   per linear NAME/TENSOR: f32 [out, in], by bitsandbytes.functional
"""

import json
import tempfile

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from golden_common import ROOT, fresh_directory, setup_torch, write_tensors
from golden_tiny import FAMILIES, random_weight

SEED = 30
WIDTHS = {"intermediate_size": 128, "max_position_embeddings": 128}  # whole blocks of 64
BASES = {"llama-nf4": ("llama", True), "qwen2-nf4": ("qwen2", False)}


def float_model(family):
    config = FAMILIES[family] | WIDTHS
    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/config.json", "w") as file:
            json.dump(config, file)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        parameter.data = random_weight(name, parameter.shape, generator)
    return model


def make(name, family, double):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                      bnb_4bit_use_double_quant=double,
                                      bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as directory:
        float_model(family).save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                     quantization_config=quantization)
    directory = fresh_directory(ROOT / "models" / name)
    model.save_pretrained(directory)
    for extra in directory.iterdir():
        if extra.name not in ("config.json", "model.safetensors"):
            extra.unlink()
    return {f"{name}/{path}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
            for path, module in model.named_modules() if isinstance(module, Linear4bit)}


def main():
    setup_torch()
    torch.use_deterministic_algorithms(False)
    dequantised = {}
    for name, (family, double) in BASES.items():
        dequantised |= make(name, family, double)
    write_tensors(ROOT / "nf4" / "dequantised.safetensors", dequantised)


if __name__ == "__main__":
    main()
