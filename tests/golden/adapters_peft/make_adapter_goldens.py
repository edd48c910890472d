"""Makes the adapter goldens: tiny PEFT adapters, what PEFT computes with them, and which modules
PEFT's own matching rules select.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2, safetensors 0.8.0. Seed 20 everywhere.
Run: python make_adapter_goldens.py   (writes beside itself)

Layout:
  base/{llama,qwen2}.safetensors   weights and biases of every linear of two random models
  CASE/adapter_config.json, CASE/adapter_model.safetensors   as PEFT saves them
  CASE/expected.safetensors        per adapted linear M:
     M.delta      get_delta_weight(): s.B.A in fp32 (absent where only a bias changes)
     M.out_scale  DoRA: magnitude / PEFT's own weight norm
     M.x, M.y     an input [4, in] and the adapted linear's output [4, out] in fp32
  targets.json, patterns.json      configuration -> modules or values, from PEFT's functions
"""

import json
import pathlib
import re
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
SEED = 20
SHAPE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, vocab_size=40, max_position_embeddings=64,
             tie_word_embeddings=False)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> (base, dtype of the file, options)
CASES = {
    "lora": ("llama", torch.float32, dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "lora_bf16": ("llama", torch.bfloat16, dict(r=8, lora_alpha=4, target_modules=LINEARS)),
    "lora_f16": ("llama", torch.float16, dict(r=3, lora_alpha=8, target_modules="all-linear")),
    "rslora": ("llama", torch.float32, dict(
        r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear",
        rank_pattern={"^model.layers.1.self_attn.q_proj": 5, r"layers\.\d+\.mlp\.(gate|up)_proj": 2,
                      "up_proj": 7, "q_proj": 6},
        alpha_pattern={"down_proj": 9, r".*\.0\..*": 2.5})),
    "dora": ("llama", torch.float32, dict(
        r=4, lora_alpha=6, use_dora=True, target_modules=LINEARS, rank_pattern={"o_proj": 9})),
    "dora_rslora_bf16": ("llama", torch.bfloat16, dict(
        r=4, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=["k_proj", "down_proj"])),
    "dora_qwen2": ("qwen2", torch.float32, dict(
        r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "up_proj"])),
    "lora_bias": ("qwen2", torch.float32, dict(
        r=4, lora_alpha=12, lora_bias=True, target_modules=["q_proj", "o_proj"])),
    "bias_lora_only": ("qwen2", torch.float32, dict(
        r=4, lora_alpha=8, bias="lora_only", target_modules=["q_proj", "down_proj"])),
    "bias_all": ("qwen2", torch.float32, dict(
        r=4, lora_alpha=8, bias="all", target_modules=["v_proj"])),
    "head": ("llama", torch.float32, dict(
        r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"])),
    "layers": ("llama", torch.float32, dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])),
    "regex": ("llama", torch.float32, dict(
        r=4, lora_alpha=8, target_modules=r"model\.layers\.\d+\.(self_attn\.[qk]_proj|mlp\.\w+_proj)",
        exclude_modules=["up_proj"])),
}


def make_base(kind):
    torch.manual_seed(SEED)
    model = (LlamaForCausalLM(LlamaConfig(**SHAPE)) if kind == "llama"
             else Qwen2ForCausalLM(Qwen2Config(**SHAPE)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model.float().eval()


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def save_base(kind):
    tensors = {}
    for name, linear in linears(make_base(kind)).items():
        tensors[f"{name}.weight"] = linear.weight.detach().clone()
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.detach().clone()
    (HERE / "base").mkdir(exist_ok=True)
    save_file(tensors, HERE / "base" / f"{kind}.safetensors")


def randomise(peft_model):
    """Gives every trained parameter a value that is seen in the output."""
    for name, parameter in peft_model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        else:
            parameter.data.normal_(0, 0.2)


def expectations(peft_model):
    tensors = {}
    generator = torch.Generator().manual_seed(SEED)
    for name, module in peft_model.base_model.model.named_modules():
        adapted = hasattr(module, "lora_A")
        own_bias = isinstance(module, torch.nn.Linear) and module.bias is not None
        if not (adapted or own_bias) or "lora_" in name or name.endswith("base_layer"):
            continue
        x = torch.randn(4, module.in_features, generator=generator)
        tensors[f"{name}.x"] = x
        tensors[f"{name}.y"] = module(x)
        if not adapted:
            continue
        tensors[f"{name}.delta"] = module.get_delta_weight("default")
        if "default" in getattr(module, "lora_magnitude_vector", {}):
            dora = module.lora_magnitude_vector["default"]
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight
            norm = dora.get_weight_norm(module.base_layer.weight, product,
                                        module.scaling["default"])
            tensors[f"{name}.out_scale"] = dora.weight / norm
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def make_case(case, kind, dtype, options):
    torch.manual_seed(SEED)
    model = get_peft_model(make_base(kind), LoraConfig(task_type="CAUSAL_LM", **options))
    randomise(model)
    directory = HERE / case
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    weights = directory / "adapter_model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(weights).items()}, weights)

    reloaded = PeftModel.from_pretrained(make_base(kind), directory).eval()
    with torch.no_grad():
        save_file(expectations(reloaded), directory / "expected.safetensors")


TARGETS = [
    dict(target_modules=["q_proj"]),
    dict(target_modules=["proj"]),
    dict(target_modules=["self_attn.q_proj", "mlp.up_proj"]),
    dict(target_modules=["model.layers.1.mlp.down_proj"]),
    dict(target_modules=["layers.0.mlp.down_proj", "lm_head"]),
    dict(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.1\..*"),
    dict(target_modules=["q_proj", "v_proj"], exclude_modules="q_proj"),
    dict(target_modules=["q_proj"], exclude_modules=[]),
    dict(target_modules=["q_proj"], layers_to_transform=[0, 10]),
    dict(target_modules=["q_proj"], layers_to_transform=1),
    dict(target_modules=["q_proj"], layers_to_transform=[]),
    dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="h"),
    dict(target_modules=["q_proj"], layers_to_transform=[1, 11], layers_pattern=["h", "layers"]),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["lay.*", "h"]),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=""),
    dict(target_modules=r".*\.(q|v)_proj"),
    dict(target_modules="q_proj"),
    dict(target_modules=r"model\.layers\.(0|11)\..*"),
    dict(target_modules=r".*q_proj$|lm_head"),
    dict(target_modules=r"(?i).*Q_PROJ"),
    dict(target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:k_proj|down_proj).*?)|(?:\bmodel\.layers\."
                        r"[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:o_proj|gate_proj)))"),
]

PATTERNS = [
    {"q_proj": 4},
    {"proj": 4},
    {"^q_proj": 4, "q_pro": 5},
    {r"layers\.1\..*": 6, "q_proj": 4},
    {"q_proj": 4, r"layers\.1\..*": 6},
    {r"model.layers.1": 3, r"model.layers.1.self_attn.q_proj": 7},
    {r"^model\.layers\.\d\..*proj": 2, r".*": 9},
    {r"self_attn\.(q|k)_proj|down_proj": 8},
    {r"[qk]_proj$": 5, "lm_head": 11},
    {r".*\.(0|1)\.mlp\..*": 12, "mlp.up_proj": 13},
    {r"q_proj|.*": 1},
]


def matching():
    paths = [f"model.layers.{layer}.{part}" for layer in (0, 1, 10, 11) for part in
             [f"self_attn.{p}" for p in LINEARS[:4]] + [f"mlp.{p}" for p in LINEARS[4:]]]
    paths.append("lm_head")
    targets = []
    for options in TARGETS:
        config = LoraConfig(**options)
        targets.append(dict(config=options, paths=[
            path for path in paths if check_target_module_exists(config, path)]))
    patterns = []
    for pattern in PATTERNS:
        values = {path: pattern.get(get_pattern_key(pattern.keys(), path)) for path in paths}
        patterns.append(dict(pattern=pattern, values=values))
    for name, table in (("targets", targets), ("patterns", patterns)):
        text = json.dumps(dict(paths=paths, cases=table), indent=1)
        (HERE / f"{name}.json").write_text(re.sub(r"\n\s{4,}", " ", text) + "\n")


def main():
    for kind in ("llama", "qwen2"):
        save_base(kind)
    for case, (kind, dtype, options) in CASES.items():
        make_case(case, kind, dtype, options)
    matching()
    for path in HERE.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
