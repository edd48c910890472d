"""Makes the goldens of methods whose papers come without a checkpoint format, in the form of golden_variants.py.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2 (for MoLE's LoRAs), safetensors 0.8.0. Seed 30 everywhere.
Run: python golden_own_formats.py   (adds to variants/cases.json; run golden_variants.py first)

The modules below are the papers' equations; their tensors are saved under the names that VARIANTS.md defines.
"""


import torch
from peft import get_peft_model
from torch import nn

from golden_common import fresh_directory, setup_torch, write_json, write_tensors
from golden_variants import MIX, OUT, QV, SEED, add_cases, base_model, lora, randomise
from golden_xlora import write_config

SPREAD = 0.3


def linears(model, targets):
    return [(name, module) for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in targets]


def replace(model, name, module):
    parent, child = name.rsplit(".", 1)
    setattr(model.get_submodule(parent), child, module)


class Delta(nn.Module):
    """A linear with a function of its input added to its output."""

    def __init__(self, linear, delta):
        super().__init__()
        self.linear, self.delta = linear, delta

    def forward(self, x):
        return self.linear(x) + self.delta(x)


def save(name, base, config, tensors):
    directory = fresh_directory(OUT / name)
    write_json(directory / "adapter_config.json",
               {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", **config})
    write_tensors(directory / "adapter_model.safetensors", tensors)
    return directory


def tied_lora(name, base, targets, r, alpha):
    """Renduchintala et al. 2023: one A and one B for all linears, u and v a linear's own. Narrower linears use
    the first columns of A and the first rows of B."""
    model = base_model(base)
    chosen = linears(model, targets)
    a = torch.randn(r, max(m.in_features for _, m in chosen)) * 0.2
    b = torch.randn(max(m.out_features for _, m in chosen), r) * 0.2
    tensors = {"base_model.tied_lora_A": a, "base_model.tied_lora_B": b}
    for path, linear in chosen:
        u, v = 1 + SPREAD * torch.randn(r), 1 + SPREAD * torch.randn(linear.out_features)
        tensors[f"base_model.model.{path}.tied_lora_u"] = u
        tensors[f"base_model.model.{path}.tied_lora_v"] = v

        def delta(x, u=u, v=v, i=linear.in_features, o=linear.out_features):
            return alpha / r * v * ((u * (x @ a[:, :i].T)) @ b[:o].T)

        replace(model, path, Delta(linear, delta))
    save(name, base, dict(peft_type="TIED_LORA", r=r, lora_alpha=alpha, target_modules=targets), tensors)
    return model


def factors(size, most=8):
    """A size as a product of small numbers, the sizes of a train's cores."""
    out = []
    for factor in range(most, 1, -1):
        while size % factor == 0:
            out.append(factor)
            size //= factor
    return out + ([size] if size > 1 else [])


def draw_train(rows, columns, rank):
    """Cores of a matrix [rows, columns], whose values come to about SPREAD."""
    sizes = factors(rows) + factors(columns)
    cores = []
    for k, size in enumerate(sizes):
        left, right = 1 if k == 0 else rank, 1 if k + 1 == len(sizes) else rank
        cores.append(torch.randn(left, size, right) * (SPREAD ** (1 / len(sizes)) / left ** 0.5))
    return cores


def contract(cores, rows, columns):
    product = cores[0]
    for core in cores[1:]:
        product = torch.tensordot(product, core, dims=1)
    return product.reshape(rows, columns)


def loretta(name, base, targets, r, alpha, train_rank):
    """Yang et al. 2024, LoRETTA_rep: the factors of a LoRA as tensor trains."""
    model = base_model(base)
    tensors = {}
    for path, linear in linears(model, targets):
        shapes = {"lora_A": (linear.in_features, r), "lora_B": (r, linear.out_features)}
        trains = {factor: draw_train(*shape, train_rank) for factor, shape in shapes.items()}
        for factor, cores in trains.items():
            for k, core in enumerate(cores):
                tensors[f"base_model.model.{path}.{factor}.cores.{k}"] = core
        a, b = (contract(trains[f], *shapes[f]) for f in ("lora_A", "lora_B"))
        replace(model, path, Delta(linear, lambda x, a=a, b=b: alpha / r * (x @ a) @ b))
    save(name, base, dict(peft_type="LORETTA", r=r, lora_alpha=alpha, target_modules=targets), tensors)
    return model


def loretta_adapter(name, base, width, train_rank):
    """Yang et al. 2024, LoRETTA_adp: bottlenecks behind attention and behind the MLP, whose matrices are tensor
    trains."""
    model = base_model(base)
    hidden = model.config.hidden_size
    tensors = {}

    def add(block, prefix):
        down, up = draw_train(hidden, width, train_rank), draw_train(width, hidden, train_rank)
        d, u = torch.randn(width) * SPREAD, torch.randn(hidden) * SPREAD
        for part, cores in (("adapter_down.0", down), ("adapter_up", up)):
            for k, core in enumerate(cores):
                tensors[f"{prefix}.{part}.cores.{k}"] = core
        tensors[f"{prefix}.adapter_down.0.bias"], tensors[f"{prefix}.adapter_up.bias"] = d, u

        def bottleneck(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            h = h + nn.functional.gelu(h @ contract(down, hidden, width) + d) @ contract(up, width, hidden) + u
            return (h, *output[1:]) if isinstance(output, tuple) else h

        block.register_forward_hook(bottleneck)

    for i, layer in enumerate(model.model.layers):
        add(layer.self_attn, f"model.layers.{i}.attention_adapters.adapters.{name}")
        add(layer.mlp, f"model.layers.{i}.output_adapters.adapters.{name}")
    config = dict(mh_adapter=True, output_adapter=True, is_parallel=False, original_ln_before=False,
                  original_ln_after=True, non_linearity="gelu", reduction_factor=hidden / width, scaling=1.0)
    directory = fresh_directory(OUT / name)
    write_json(directory / "adapter_config.json",
               dict(config=config, hidden_size=hidden, model_type=base, model_name=base, name=name))
    write_tensors(directory / "adapter.safetensors", tensors)
    return model


def mole(name, base, experts, temperature):
    """Wu et al. 2024, a gate a linear and token: softmax over the LoRAs of the gate's scores."""
    directory = fresh_directory(OUT / name)
    deltas = {}  # by path, of each expert: s B A or None
    for e, config in enumerate(experts):
        model = get_peft_model(base_model(base), config)
        randomise(model, 0.2)
        model.save_pretrained(directory / str(e))
        write_config(directory / str(e), base_model_name_or_path=base)
        for path, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                deltas.setdefault(path, [None] * len(experts))[e] = module.get_delta_weight("default")
    model = base_model(base)
    tensors = {}
    for path, of_experts in deltas.items():
        linear = model.get_submodule(path)
        gate = torch.randn(len(experts), linear.in_features) * 0.2
        tensors[f"base_model.model.{path}.mole_gate.weight"] = gate

        def delta(x, gate=gate, of_experts=of_experts):
            shares = torch.softmax(x @ gate.T / temperature, -1)
            return sum(shares[..., e, None] * (x @ d.T) for e, d in enumerate(of_experts) if d is not None)

        replace(model, path, Delta(linear, delta))
    write_json(directory / "adapter_config.json",
               dict(base_model_name_or_path=base, task_type="CAUSAL_LM", peft_type="MOLE", temperature=temperature,
                    adapters={str(e): str(e) for e in range(len(experts))}))
    write_tensors(directory / "adapter_model.safetensors", tensors)
    return model


CASES = {
    "tied_lora": ("llama", lambda *of: tied_lora(*of, targets=["q_proj", "up_proj", "down_proj"], r=5, alpha=10)),
    "tied_lora_qwen2": ("qwen2", lambda *of: tied_lora(*of, targets=QV, r=4, alpha=4)),
    "loretta": ("llama", lambda *of: loretta(*of, targets=MIX, r=4, alpha=8, train_rank=3)),
    "loretta_adapter": ("llama", lambda *of: loretta_adapter(*of, width=8, train_rank=3)),
    "mole": ("llama", lambda *of: mole(*of, experts=[
        lora(r=4), lora(r=2, target_modules=MIX), lora(r=3, use_rslora=True, target_modules=MIX)], temperature=0.5)),
    "mole_qwen2": ("qwen2", lambda *of: mole(*of, experts=[lora(r=2, target_modules="all-linear")] * 4,
                                             temperature=1.0)),
}


def build(name):
    torch.manual_seed(SEED)
    base, make = CASES[name]
    return base, make(name, base).eval()


def main():
    setup_torch()
    torch.use_deterministic_algorithms(False)
    add_cases({name: build(name) for name in CASES})


if __name__ == "__main__":
    main()
