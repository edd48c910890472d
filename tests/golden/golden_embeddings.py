"""Pooled final hidden states of the tiny llama, with and without an adapter, at length 1."""

import torch

from golden_common import ROOT, setup_torch, write_json
from golden_tiny import load_adapted, load_model

FAMILY = "llama"
ADAPTERS = [None, "dora", "lora_bias"]
LENGTHS = [1, 7, 40]
VOCAB_FROM = 3  # no special tokens


def hidden_states(model, ids):
    """[T, D] after the last norm."""
    out = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    states = out.hidden_states[-1][0]
    assert torch.equal(model.get_output_embeddings()(states), out.logits[0]), "not the head's input"
    return states


def unit(vector):
    return torch.nn.functional.normalize(vector, dim=0).tolist()


def main():
    setup_torch()
    generator = torch.Generator().manual_seed(4000)
    cases = []
    for name in ADAPTERS:
        model = load_adapted(FAMILY, name) if name else load_model(ROOT / "models" / FAMILY)
        vocab = model.config.vocab_size
        for length in LENGTHS:
            ids = torch.randint(VOCAB_FROM, vocab, (length,), generator=generator).tolist()
            states = hidden_states(model, ids)
            cases.append({"adapter": name, "input": ids,
                          "last": unit(states[-1]), "mean": unit(states.mean(dim=0))})
    write_json(ROOT / "embeddings.json", cases, indent=None)
    print(f"embeddings: {len(cases)} cases")
