"""Makes the goldens of X-LoRA, in the form of golden_variants.py.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2, safetensors 0.8.0. Seed 30 everywhere.
Run: python golden_xlora.py   (adds to variants/cases.json; run golden_variants.py first)

PEFT saves neither the experts nor all of the classifier, so this does, as the server reads them:
variants/NAME/adapter_config.json, adapter_model.safetensors   the classifier, by PEFT's names
variants/NAME/0/, 1/, ...                                      the experts, as PEFT saves a LoRA
"""

import json
import shutil

import torch
from peft import XLoraConfig, get_peft_model
from safetensors.torch import save_file

from golden_common import setup_torch
from golden_variants import MIX, OUT, SEED, add_cases, base_model, lora, randomise

BASE = "llama"
EXPERTS = [lora(r=4), lora(r=2, target_modules=MIX), lora(r=3, use_rslora=True, target_modules=MIX)]
CASES = {
    "xlora": dict(xlora_depth=1),
    "xlora_layers": dict(xlora_depth=2, xlora_size=24, layerwise_scalings=True, xlora_dropout_p=0.1,
                         softmax_temperature=0.5, global_scaling_weight=1.5),
    "xlora_top": dict(xlora_depth=3, xlora_size=16, layerwise_scalings=True, xlora_dropout_p=0.0,
                      enable_softmax=False, enable_softmax_topk=True, top_k_lora=2),
}


def write_config(directory, **changes):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": BASE} | changes
    path.write_text(json.dumps(config, indent=1) + "\n")
    (directory / "README.md").unlink(missing_ok=True)


def build(name):
    torch.manual_seed(SEED)
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    for i, config in enumerate(EXPERTS):
        expert = get_peft_model(base_model(BASE), config)
        randomise(expert, 0.3)
        expert.save_pretrained(directory / str(i))
        write_config(directory / str(i))
    names = {str(i): str(directory / str(i)) for i in range(len(EXPERTS))}
    model = get_peft_model(base_model(BASE), XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, adapters=names, **CASES[name])).eval()
    classifier = model.base_model.internal_xlora_classifier
    for parameter in classifier.parameters():
        parameter.data.normal_(0, 0.6)
    model.peft_config["default"].save_pretrained(directory)
    write_config(directory, adapters={i: i for i in names})
    prefix = "base_model.internal_xlora_classifier."
    save_file({prefix + key: value.contiguous() for key, value in classifier.state_dict().items()},
              directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return model


def main():
    setup_torch()
    torch.use_deterministic_algorithms(False)
    add_cases({name: (BASE, build(name)) for name in CASES})


if __name__ == "__main__":
    main()
