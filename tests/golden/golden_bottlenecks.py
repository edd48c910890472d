"""Makes the goldens of AdapterHub's bottleneck adapters, in the form of golden_variants.py.

Versions: torch 2.15.0, transformers 4.57.6, adapters 1.3.0, safetensors 0.8.0. Seed 30 everywhere.
Run: python golden_bottlenecks.py   (adds to variants/cases.json; run golden_variants.py first)
"""

import json
import shutil

import adapters
import torch
from adapters import (CompacterConfig, CompacterPlusPlusConfig, DoubleSeqBnConfig, ParBnConfig,
                      SeqBnConfig)
from transformers import AutoModelForCausalLM

from golden_common import ROOT, setup_torch

OUT = ROOT / "variants"
SEED = 30
STEPS = 12
TOP = 8
CASES = {
    "houlsby": lambda: DoubleSeqBnConfig(reduction_factor=8),
    "pfeiffer": lambda: SeqBnConfig(reduction_factor=16),
    "parallel_bottleneck": lambda: ParBnConfig(reduction_factor=8, scaling=2.0),
    "bottleneck_leave_out": lambda: SeqBnConfig(reduction_factor=8, leave_out=[0],
                                                non_linearity="gelu"),
    "compacter": lambda: CompacterConfig(reduction_factor=8, phm_dim=4),
    "compacter_plus": lambda: CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2,
                                                      non_linearity="relu"),
}


def model_with(name):
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "llama", dtype=torch.float32)
    adapters.init(model)
    return model


def main():
    setup_torch()
    torch.use_deterministic_algorithms(False)
    path = OUT / "cases.json"
    done = {c["name"]: c for c in json.loads(path.read_text())}
    for name, config in CASES.items():
        model = model_with(name)
        model.add_adapter(name, config=config())
        for key, parameter in model.named_parameters():
            if "phm_rule" in key or ".W_" in key:
                parameter.data.normal_(0, 0.6)
            elif ".adapters." in key:
                parameter.data.normal_(0, 0.3)
        directory = OUT / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_adapter(str(directory), name, with_head=False, use_safetensors=True)
        for extra in directory.iterdir():
            if extra.name not in ("adapter_config.json", "adapter.safetensors"):
                extra.unlink()
        text = json.loads((directory / "adapter_config.json").read_text())
        text["model_name"] = "llama"
        (directory / "adapter_config.json").write_text(json.dumps(text, indent=1) + "\n")
        model = model_with(name)
        loaded = model.load_adapter(str(directory), with_head=False, use_safetensors=True)
        model.set_active_adapters(loaded)
        model.eval()
        generator = torch.Generator().manual_seed(SEED)
        prompts = []
        while len(prompts) < 3:
            prompt = torch.randint(3, 320, (6 + 2 * len(prompts),), generator=generator).tolist()
            ids, greedy, logprobs, margin = list(prompt), [], [], 1.0
            for _ in range(STEPS):
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                values = torch.log_softmax(logits.float(), -1)
                best = torch.topk(values, TOP + 1)
                margin = min(margin, float(best.values[0] - best.values[1]))
                greedy.append(int(best.indices[0]))
                logprobs.append([[int(i), round(float(v), 7)] for v, i in
                                 zip(best.values[:TOP], best.indices[:TOP])])
                ids.append(greedy[-1])
            if margin >= 1e-3:
                prompts.append(dict(prompt=prompt, greedy=greedy, logprobs=logprobs))
        done[name] = dict(name=name, base="llama", prompts=prompts)
        print(name, flush=True)
    path.write_text("[\n" + ",\n".join(json.dumps(c) for c in done.values()) + "\n]\n")


if __name__ == "__main__":
    main()
