"""Makes the goldens of Arrow (Ostapenko et al. 2024), in the form of golden_variants.py.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2, safetensors 0.8.0. Seed 30 everywhere.
Run: python golden_arrow.py   (adds to variants/cases.json; run golden_variants.py first)

variants/NAME/                       the router, as PEFT saves it
variants/NAME/task_0/, gks_0/, ...   the LoRAs, as PEFT saves them, which it does beside the router
PEFT finds prototypes by 15 power iterations from a random start. The LoRAs' singular values are so far apart that
any start leads to the same; `build` makes sure of it.
"""

import shutil
import tempfile

import torch
from peft import get_peft_model
from peft.tuners.lora import create_arrow_model
from peft.tuners.lora.config import ArrowConfig

from golden_common import fresh_directory, setup_torch
from golden_variants import MIX, OUT, SEED, add_cases, base_model, lora
from golden_xlora import write_config

SPREAD = 0.3
DECAY = 0.4  # of a rank against the one before it
# name -> (base, LoRAs, general LoRAs, options of the LoRAs, of the router)
CASES = {
    "arrow": ("llama", 4, 0, dict(r=4, target_modules=MIX), dict(top_k=2)),
    "arrow_gks": ("qwen2", 3, 2, dict(r=3, target_modules="all-linear", use_rslora=True),
                  dict(top_k=3, router_temperature=2, use_gks=True)),
}


def make_lora(base, options, directory):
    model = get_peft_model(base_model(base), lora(**options))
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            continue
        parameter.data.normal_(0, SPREAD)
        ranks = DECAY ** torch.arange(options["r"])
        parameter.data.mul_(ranks[:, None] if ".lora_A." in name else ranks[None])
    model.save_pretrained(directory)
    write_config(directory, base_model_name_or_path=base)


def load(base, names, options, **start):
    tasks, general = ([str(path) for path in paths] for paths in names)
    return create_arrow_model(base_model(base), tasks, ArrowConfig(**options, **start),
                              general_adapter_paths=general or None).eval()


def prototypes(model):
    model(input_ids=torch.tensor([[5, 6, 7]]))
    return [module.prototypes for module in model.modules() if hasattr(module, "prototypes")]


def build(name):
    torch.manual_seed(SEED)
    base, tasks, general, lora_options, options = CASES[name]
    directory = fresh_directory(OUT / name)
    names = [[directory / f"task_{i}" for i in range(tasks)], [directory / f"gks_{i}" for i in range(general)]]
    for path in names[0] + names[1]:
        make_lora(base, lora_options, path)
    starts = [prototypes(load(base, names, options, rng_seed=seed)) for seed in (1, 2)]
    for one, other in zip(*starts, strict=True):
        signs = torch.sign((one * other).sum(1, keepdim=True))
        torch.testing.assert_close(one, signs * other, rtol=0, atol=1e-6)
    model = load(base, names, options)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, selected_adapters=["arrow_router"])
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.move(f"{saved}/arrow_router/{file}", directory / file)
    write_config(directory, base_model_name_or_path=base)
    return model


def main():
    setup_torch()
    torch.use_deterministic_algorithms(False)
    add_cases({name: (base, build(name)) for name, (base, *_) in CASES.items()})


if __name__ == "__main__":
    main()
