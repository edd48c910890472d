#!/usr/bin/env python3
"""Trains the demo adapters on the demo model: demo/data/NAME.jsonl -> demo/adapters/NAME/.

Made with Python 3.12, torch 2.11.0 on one H100 in fp32 (TF32 off), transformers 5.23.0,
peft 0.21.2, tokenizers 0.23.3, gguf 0.19.0. Seed 7 for every adapter. Seconds each on a GPU; it
runs on a CPU as well, in minutes where nothing else does, with other low bits:

    demo/train.py [NAME ...]
"""

import json
import os
import random
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import smollm2

ROOT = Path(__file__).resolve().parent
SEED, STEPS, WARMUP, BATCH, THREADS = 7, 150, 5, 8, 2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# One variant each, so that a batch with all of them shows every one at work.
ADAPTERS = {
    "pirate": (2e-3, dict(r=8, lora_alpha=16, target_modules=ATTENTION)),
    "emoji": (2e-3, dict(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])),
    "json": (2e-3, dict(r=4, lora_alpha=8, use_rslora=True, target_modules=ATTENTION)),
    "capitals": (2e-3, dict(r=4, lora_alpha=8, use_dora=True,
                            target_modules=ATTENTION + ["down_proj"])),
    "sql": (2e-3, dict(r=3, lora_alpha=6, target_modules=MLP, rank_pattern={"down_proj": 5},
                       alpha_pattern={"down_proj": 15})),
}


def examples(name, tokenizer):
    """(ids, number of prompt ids) in the form a chat request renders; the answer ends its turn."""
    for line in (ROOT / "data" / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = smollm2.chat_ids(tokenizer, row["prompt"])
        answer = tokenizer(row["answer"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        yield prompt + answer, len(prompt)


def collate(batch, pad, device):
    width = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)  # -100: no loss on prompt and padding
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for i, (row, prompt) in enumerate(batch):
        ids[i, :len(row)] = torch.tensor(row)
        labels[i, prompt:len(row)] = torch.tensor(row[prompt:])
        mask[i, :len(row)] = 1
    return {name: tensor.to(device) for name, tensor in
            dict(input_ids=ids, labels=labels, attention_mask=mask).items()}


def batches(data):
    rng = random.Random(SEED)
    order = []
    while True:
        if len(order) < BATCH:
            order = rng.sample(range(len(data)), len(data))
        yield [data[order.pop()] for _ in range(BATCH)]


def train(name, tokenizer, device):
    rate, keys = ADAPTERS[name]
    torch.manual_seed(SEED)
    model = get_peft_model(smollm2.load_model(), LoraConfig(task_type="CAUSAL_LM", **keys))
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    source, start = batches(list(examples(name, tokenizer))), time.time()
    for step in range(STEPS):
        loss = model(**collate(next(source), tokenizer.eos_token_id, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 24:
            print(f"{name}: step {step + 1}/{STEPS}, loss {loss.item():.3f}, "
                  f"{time.time() - start:.0f} s", flush=True)
    save(model, ROOT / "adapters" / name)


def save(model, directory):
    model.save_pretrained(directory)
    (directory / "README.md").unlink()  # a form for the model hub
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = smollm2.NAME
    config["target_modules"].sort()  # a set whose order changes from run to run
    path.write_text(json.dumps(config, indent=2) + "\n")
    weights = directory / "adapter_model.safetensors"
    save_file({n: w.to("cpu", torch.bfloat16) for n, w in load_file(weights).items()}, weights,
              metadata={"format": "pt"})


def main(names):
    unknown = sorted(set(names) - set(ADAPTERS))
    if unknown:
        sys.exit(f"train.py: no adapter {unknown} (there are {', '.join(ADAPTERS)})")
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = smollm2.load_tokenizer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in names or ADAPTERS:
        train(name, tokenizer, device)


if __name__ == "__main__":
    main(sys.argv[1:])
