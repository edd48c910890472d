"""Reads what `lorikeet adapters merge` writes back with Transformers and holds it to the goldens of variants/.

Versions as golden_variants.py's. Run: python check_merged.py LORIKEET [NAME...]   (all cases without names)
Ends with 1 where a merged model's log-probabilities are off by more than the bound, or a tensor of its file is
missing or unused.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from golden_common import ROOT, all_logits, setup_torch
from golden_variants import OUT

BOUND = 1e-3


def merge(lorikeet, case, out):
    terms = [f"{OUT / name}={weight}" for name, weight in case.get("adapters", {case["name"]: 1}).items()]
    return subprocess.run([lorikeet, "adapters", "merge", *terms, str(out), "--model",
                           str(ROOT / "models" / case["base"])], capture_output=True, text=True)


def largest_error(directory, case):
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                         output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[what], f"{case['name']}: {what} {report[what]}"
    largest = 0.0
    for prompt in case["prompts"]:
        ids, steps = prompt["prompt"] + prompt["greedy"], len(prompt["greedy"])
        found = torch.log_softmax(all_logits(model.eval(), ids), -1)[-steps - 1:-1]
        for row, expected in zip(found, prompt["logprobs"]):
            largest = max(largest, *(abs(float(row[token]) - value) for token, value in expected))
    return largest


def main(lorikeet, names):
    setup_torch()
    torch.use_deterministic_algorithms(False)
    errors, refused = {}, []
    for case in json.loads((OUT / "cases.json").read_text()):
        if names and case["name"] not in names or case["base"].endswith("-nf4"):  # those are rounded
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = merge(lorikeet, case, Path(folder) / "merged")
            if done.returncode != 0:
                print(f"{case['name']:24} refused: {done.stderr.strip()}")
                refused.append(case["name"])
                continue
            errors[case["name"]] = largest_error(Path(folder) / "merged", case)
        print(f"{case['name']:24} {errors[case['name']]:.1e}", flush=True)
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} read back, the largest error {errors[worst]:.1e} ({worst}); {len(refused)} refused")
    return errors[worst] > BOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
