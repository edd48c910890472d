"""Makes tiny bases in FP8 (e4m3), as compressed-tensors and Transformers write them.

Versions: torch 2.15.0, transformers 5.23.0, compressed-tensors 0.20.1, safetensors 0.8.0. Seed 40.
Run: python golden_fp8.py   (writes models/*-fp8, fp8/ and fp8_cases.json)

models/llama-fp8: a scale a row; mistral-fp8: a scale a weight and one for inputs (both by
compressed-tensors); qwen2-fp8: a scale a block of 128 x 128 (by torch, read by Transformers)
fp8/dequantised.safetensors   per linear of layer 1 NAME/TENSOR: f32 [out, in], as the same libraries
widen them
"""

import json
import tempfile

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from golden_common import ROOT, draw_case, fresh_directory, setup_torch, write_json, write_tensors
from golden_tiny import FAMILIES, random_weight
from golden_tokenizers import VOCAB

SEED = 40
LARGEST = 448.0
# Whole blocks of 128: Transformers cuts what is left over in its own way.
WIDTHS = {"intermediate_size": 256, "max_position_embeddings": 128}


def float_model(family, **keys):
    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/config.json", "w") as file:
            json.dump(FAMILIES[family] | WIDTHS | keys, file)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        parameter.data = random_weight(name, parameter.shape, generator)
    return model


def linears(model):
    return {name: m for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and name != "lm_head"}


def compress(name, family, strategy, static):
    """By compressed-tensors, with scales that make each row's or weight's largest value 448."""
    model = float_model(family)
    inputs = QuantizationArgs(num_bits=8, type="float", dynamic=not static,
                              strategy="tensor" if static else "token")
    scheme = QuantizationScheme(
        targets=["Linear"], input_activations=inputs,
        weights=QuantizationArgs(num_bits=8, type="float", strategy=strategy))
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in linears(model).values():
        rows = module.weight.abs().amax(dim=1, keepdim=True) / LARGEST
        module.weight_scale.data = rows if strategy == "channel" else rows.max().reshape(1)
        if static:
            module.input_scale.data = torch.full_like(module.input_scale, 0.02)
    directory = fresh_directory(ROOT / "models" / name)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    compressor.decompress_model(model)
    return model


def in_blocks(name, family):
    """The layout of FineGrainedFP8Config, whose kernels need a GPU; Transformers widens it."""
    model = float_model(family)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for path in linears(model):
        weight = tensors.pop(f"{path}.weight")
        out, width = weight.shape
        padded = torch.zeros(-(-out // 128) * 128, -(-width // 128) * 128)
        padded[:out, :width] = weight
        blocks = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
        scales = blocks.abs().amax(dim=(1, 3), keepdim=True) / LARGEST
        codes = (blocks / scales).to(torch.float8_e4m3fn).reshape(padded.shape)[:out, :width]
        tensors[f"{path}.weight"] = codes.contiguous()
        tensors[f"{path}.weight_scale_inv"] = scales.reshape(scales.shape[0], -1)
    directory = fresh_directory(ROOT / "models" / name)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                    "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    write_json(directory / "config.json",
               FAMILIES[family] | WIDTHS | {"quantization_config": quantization}, indent=2)
    widened = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True))
    return widened.float()


def widened(model):
    """A plain model in float32 with the weights that the library has widened."""
    return {f"{path}.weight": module.weight.detach().float() for path, module in linears(model).items()}


def reference(name, weights, family):
    """Transformers on the widened weights, everything else from the files."""
    tensors = load_file(ROOT / "models" / name / "model.safetensors")
    model = float_model(family)
    for path, parameter in model.named_parameters():
        value = weights.get(path, tensors.get(path))
        assert value is not None and value.shape == parameter.shape, path
        parameter.data = value.float()
    return model.eval()


def main():
    setup_torch()
    dequantised, cases, logits = {}, [], {}
    generator = torch.Generator().manual_seed(SEED)
    for name, family, make in [
            ("llama-fp8", "llama", lambda n, f: compress(n, f, "channel", static=False)),
            ("mistral-fp8", "mistral", lambda n, f: compress(n, f, "tensor", static=True)),
            ("qwen2-fp8", "qwen2", in_blocks)]:
        weights = widened(make(name, family))
        directory = ROOT / "models" / name
        for extra in directory.iterdir():
            if extra.name not in ("config.json", "model.safetensors"):
                extra.unlink()
        dequantised |= {f"{name}/{path}": value for path, value in weights.items()
                        if "layers.1" in path}
        model = reference(name, weights, family)
        for length in (1, 21):
            prompt, out, tokens, margin = draw_case(model, length, VOCAB, generator)
            key = f"{name}.{length}"
            logits[key] = out
            cases.append({"model": f"models/{name}", "adapter": None, "prompt_ids": prompt,
                          "logits_file": "fp8/logits.safetensors", "logits": key,
                          "greedy_ids": tokens, "min_margin": round(margin, 5)})
    write_tensors(ROOT / "fp8" / "dequantised.safetensors", dequantised)
    write_tensors(ROOT / "fp8" / "logits.safetensors", logits)
    write_json(ROOT / "fp8_cases.json", cases)


if __name__ == "__main__":
    main()
