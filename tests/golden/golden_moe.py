"""Makes the goldens of adapters on models with experts, in the form of golden_variants.py.

Versions: torch 2.15.0, peft 0.21.2, safetensors 0.8.0. Seed 30 everywhere. Twice, because
Transformers changed what experts are, and with that what adapters' files hold:
4.57.6: a linear of its own for each expert's projection.  5.23.0: one tensor for all experts.
Run: python golden_moe.py   (under each; adds to variants/cases.json; golden_variants.py first)
"""

import json

import torch
import transformers
from peft import IA3Config, LoKrConfig, PromptTuningConfig

import golden_variants as variants
from golden_common import setup_torch
from golden_variants import OUT, lora, plain

LINEARS = {
    "experts": ("mixtral", lambda: lora(target_modules=["q_proj", "w1", "w2", "w3"]), 0.2),
    "experts_some": ("qwen3-moe", lambda: lora(
        target_modules=r".*\.experts\.[024]\.(gate|down)_proj|.*\.mlp\.gate|.*\.v_proj",
        rank_pattern={r"experts\.2\.down_proj": 6}, alpha_pattern={"gate": 3}), 0.3),
    "experts_router": ("mixtral", lambda: lora(target_modules=["gate", "o_proj"]), 0.3),
    "experts_dora": ("qwen3-moe", lambda: lora(target_modules=["up_proj", "gate", "k_proj"],
                                               use_dora=True), 0.3),
    "experts_ia3": ("qwen3-moe", lambda: plain(IA3Config, target_modules=["k_proj", "down_proj"],
                                               feedforward_modules=["down_proj"]), 0.7),
    "experts_lokr": ("mixtral", lambda: plain(LoKrConfig, r=4, alpha=8, target_modules=["w2", "q_proj"]),
                     0.3),
    "experts_saved_router": ("mixtral", lambda: lora(modules_to_save=["gate"]), 0.2),
}
TENSORS = {
    "expert_parameters": ("qwen3-moe", lambda: lora(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj",
                                                      "mlp.experts.down_proj"]), 0.3),
    "expert_parameters_one": ("mixtral", lambda: lora(
        target_modules=["v_proj"], target_parameters=["down_proj"], use_rslora=True), 0.3),
    "expert_parameters_router": ("mixtral", lambda: lora(
        target_modules=[], target_parameters=["gate.weight", "experts.gate_up_proj"],
        rank_pattern={"gate.weight": 2}, alpha_pattern={"experts.gate_up_proj": 3}), 0.3),
    "expert_prompt_tuning": ("mixtral", lambda: plain(PromptTuningConfig, num_virtual_tokens=5), 0.3),
}


# A prompt is only a golden when the experts chosen for its tokens do not hang on the last digits.
MIN_LEAD = 0.004


def generate_clearly(generate):
    """`generate`, with no margin where a chosen expert leads the next by less than MIN_LEAD."""
    def run(model, prompt, is_alora):
        leads, chosen = [], model.config.num_experts_per_tok

        def note(module, inputs, output):
            scores = output[0] if isinstance(output, tuple) else output
            best = torch.topk(scores, chosen + 1).values
            leads.append(float((best[..., -2] - best[..., -1]).min()))

        hooks = [module.register_forward_hook(note) for name, module in model.named_modules()
                 if name.endswith(".gate")]
        greedy, logprobs, margin = generate(model, prompt, is_alora)
        for hook in hooks:
            hook.remove()
        assert leads
        return greedy, logprobs, margin if min(leads) >= MIN_LEAD else 0.0
    return run


def main():
    setup_torch()
    torch.use_deterministic_algorithms(False)
    cases = LINEARS if transformers.__version__.startswith("4.") else TENSORS
    variants.CASES.update(cases)
    variants.generate = generate_clearly(variants.generate)
    path = OUT / "cases.json"
    done = {c["name"]: c for c in json.loads(path.read_text())}
    for name in cases:
        done[name] = variants.case(name)
    path.write_text("[\n" + ",\n".join(json.dumps(c) for c in done.values()) + "\n]\n")


if __name__ == "__main__":
    main()
