"""The demo model dequantised to fp32, alone and with each demo adapter: greedy tokens and log-probabilities."""

import json
import sys

import torch
from peft import PeftModel

from golden_common import ROOT, setup_torch

DEMO = ROOT.parents[1] / "demo"
NEW_TOKENS, TOP, PROMPTS = 40, 8, 4
# Between the best two log-probabilities: other sums of 135M fp32 products stay well inside of it.
MIN_MARGIN = 2e-3

ABOUT = (
    "Demo model (Q4_1 file dequantised to fp32) with demo/adapters/ADAPTER or alone. prompt_ids: a chat of "
    "one user message rendered by the file's template. greedy_ids: 40 tokens, end-of-text ignored. top: for "
    "each greedy token the 8 best [id, natural log-probability] of the distribution it was taken from, so "
    "top[0] belongs to the prompt's last position. The best leads the second by min_margin or more.")


def top_of(logits):
    values, ids = torch.topk(torch.log_softmax(logits, -1), TOP)
    return [[int(i), round(float(v), 5)] for i, v in zip(ids, values)]


def greedy_with_top(model, prompt):
    out = model(input_ids=torch.tensor([prompt]), use_cache=True)
    ids, tops = [], []
    for _ in range(NEW_TOKENS):
        tops.append(top_of(out.logits[0, -1]))
        if tops[-1][0][1] - tops[-1][1][1] < MIN_MARGIN:
            return None
        ids.append(tops[-1][0][0])
        out = model(input_ids=torch.tensor([ids[-1:]]), past_key_values=out.past_key_values,
                    use_cache=True)
    return ids, tops


def cases_of(adapter, model, tokenizer, chat_ids):
    cases = []
    for question in json.loads((DEMO / "prompts.json").read_text())["held_out"]:
        prompt = chat_ids(tokenizer, question)
        result = greedy_with_top(model, prompt)
        if result is None:
            continue  # a near tie on its path
        ids, tops = result
        cases.append({"adapter": adapter, "question": question, "prompt_ids": prompt,
                      "greedy_ids": ids, "text": tokenizer.decode(ids),
                      "min_margin": round(min(t[0][1] - t[1][1] for t in tops), 5), "top": tops})
        if len(cases) == PROMPTS:
            return cases
    raise RuntimeError(f"{adapter}: fewer than {PROMPTS} prompts without a near tie")


def main():
    setup_torch()
    torch.set_num_threads(2)
    sys.path.insert(0, str(DEMO))
    import smollm2
    tokenizer, cases = smollm2.load_tokenizer(), []
    for adapter in [None] + sorted(p.name for p in (DEMO / "adapters").iterdir()):
        model = smollm2.load_model()
        if adapter:
            model = PeftModel.from_pretrained(model, DEMO / "adapters" / adapter).eval()
        cases += cases_of(adapter, model, tokenizer, smollm2.chat_ids)
        print(f"real: {adapter or 'base'} done", flush=True)
    lines = ",\n".join(json.dumps(c) for c in cases)
    (ROOT / "real.json").write_text(
        '{"about": ' + json.dumps(ABOUT) + ',\n"cases": [\n' + lines + "\n]}\n")
    assert json.loads((ROOT / "real.json").read_text())["cases"] == cases
    print(f"real: {len(cases)} cases, smallest margin {min(c['min_margin'] for c in cases)}")
