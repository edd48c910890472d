"""What the golden scripts share: running the oracle, and writing files that compare equal when rerun."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent
GREEDY_TOKENS = 32

# A greedy path is only a golden when no two implementations of the same arithmetic can disagree on
# it: prompts whose best two logits come closer than this anywhere on the path are drawn again.
MIN_MARGIN = 5e-3


def setup_torch():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)


def fresh_directory(path):
    """Empties a directory that one of these scripts alone fills; its neighbours are not ours."""
    assert ROOT in path.parents and path.parent != ROOT, path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def write_json(path, value, indent=1):
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=True) + "\n")


def write_tensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def all_logits(model, ids):
    """Logits [T, V] in fp32 of a prompt, without a KV cache."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    return logits


def greedy(model, prompt, count=GREEDY_TOKENS):
    """`count` greedy tokens, end-of-text ignored, and the smallest lead of a winner on the way.

    Recomputes the whole sequence for each token, so that no cache takes part in the oracle.
    """
    ids, margin = list(prompt), float("inf")
    for _ in range(count):
        best = torch.topk(all_logits(model, ids)[-1], 2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt):], margin


def draw_case(model, length, vocab, generator):
    """A random prompt of `length` tokens with its logits and a greedy path that nothing can tip."""
    for _ in range(200):
        prompt = torch.randint(3, vocab, (length,), generator=generator).tolist()
        tokens, margin = greedy(model, prompt)
        if margin >= MIN_MARGIN:
            return prompt, all_logits(model, prompt), tokens, margin
    raise RuntimeError(f"no prompt of {length} tokens with a safe greedy path")
