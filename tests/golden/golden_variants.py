"""Makes the goldens of adapter variants: tiny adapters as PEFT saves them, and what PEFT generates.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2, safetensors 0.8.0. Seed 30 everywhere.
Bitsandbytes 0.50.2 for the bases in NF4, attrs for CorDA.
Run: python golden_variants.py [NAME ...]   (writes variants/; the bases are models/*)

variants/NAME/adapter_config.json, adapter_model.safetensors   as PEFT saves them
variants/cases.json   per case: name, base, adapters (of a mixture: weights by name), prompts [{prompt, greedy, logprobs}]: 3 prompts, 12 greedy
                      tokens, and of each step the 8 best tokens with their log-probabilities
"""

import json
import shutil
import sys

import numpy
import torch
from peft import (AdaLoraConfig, AdaptionPromptConfig, BdLoraConfig, BeftConfig, BOFTConfig, C3AConfig,
                  CartridgeConfig, CPTConfig, DeftConfig, DeloraConfig, FourierFTConfig, FrodConfig,
                  GloraConfig, GraloraConfig, HiraConfig, HRAConfig, IA3Config, KasaConfig, LNTuningConfig,
                  LoHaConfig, LoKrConfig, LoraConfig, MissConfig, MultitaskPromptTuningConfig, OFTConfig,
                  OSFConfig, PeanutConfig, PeftModel, PolyConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, PveraConfig,
                  RandLoraConfig, RoadConfig, ShiraConfig, SupertuningConfig, TinyLoraConfig,
                  TrainableTokensConfig, UniLoraConfig, VBLoRAConfig, VeraConfig, WaveFTConfig,
                  get_peft_model, set_peft_model_state_dict)
from peft.tuners.boft import layer as boft
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from golden_common import ROOT, setup_torch

OUT = ROOT / "variants"
SEED = 30
STEPS = 12
TOP = 8
MARGIN = 1e-3
QV = ["q_proj", "v_proj"]
MLP = ["up_proj", "down_proj"]
MIX = ["q_proj", "o_proj", "down_proj"]
INVOCATION = [7, 8, 9]
REPLICATION = [[0, 2], [1, 2], [0, 1]]
TASK = 2  # of adapters of several
OF_TASKS = ("poly", "multitask_prompt")


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8, "target_modules": QV} |
                                                options))


def plain(config, **options):
    return config(task_type="CAUSAL_LM", **options)


# name -> (base, configuration, spread of the random values given to trained tensors)
CASES = {
    "lora": ("llama", lambda: lora(target_modules="all-linear"), 0.2),
    "lora_patterns": ("llama", lambda: lora(
        target_modules="all-linear", exclude_modules=["k_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={r"layers\.1\..*": 3}), 0.2),
    "layer_replication": ("llama", lambda: lora(
        layer_replication=REPLICATION, target_modules=["q_proj", "v_proj", "down_proj"]), 0.2),
    "rslora": ("qwen2", lambda: lora(use_rslora=True), 0.2),
    "dora": ("llama", lambda: lora(use_dora=True, target_modules=MIX), 0.2),
    "dora_qwen2": ("qwen2", lambda: lora(use_dora=True, target_modules=MIX), 0.2),
    "dora_qwen3": ("qwen3", lambda: lora(use_dora=True, target_modules=MIX), 0.2),
    "lora_bias": ("qwen2", lambda: lora(lora_bias=True), 0.2),
    "bias_all": ("qwen2", lambda: lora(bias="all"), 0.2),
    "lora_embedding": ("llama", lambda: lora(target_modules=["embed_tokens", "q_proj"]), 0.2),
    "dora_embedding": ("llama", lambda: lora(target_modules=["embed_tokens", "v_proj"],
                                             use_dora=True), 0.2),
    "lora_head": ("llama", lambda: lora(target_modules=["lm_head", "k_proj"]), 0.2),
    "modules_to_save": ("llama", lambda: lora(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm",
                                                    "input_layernorm"]), 0.1),
    "modules_to_save_tied": ("qwen2", lambda: lora(modules_to_save=["embed_tokens"],
                                                   ensure_weight_tying=True), 0.1),
    "longlora": ("llama", lambda: lora(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", "input_layernorm", "post_attention_layernorm"]), 0.1),
    "trainable_tokens_lora": ("qwen2", lambda: lora(trainable_token_indices=[5, 17, 40]), 0.2),
    "lora_xs": ("llama", lambda: lora(target_modules=MIX), 0.05),
    "qlora": ("llama-nf4", lambda: lora(target_modules="all-linear"), 0.2),
    "qdora": ("llama-nf4", lambda: lora(use_dora=True, target_modules=MIX), 0.2),
    "qlora_qwen2": ("qwen2-nf4", lambda: lora(use_rslora=True, target_modules=MIX), 0.2),
    "qia3": ("qwen2-nf4", lambda: plain(IA3Config, target_modules=["k_proj", "down_proj"],
                                        feedforward_modules=["down_proj"]), 0.5),
    "alora": ("llama", lambda: lora(alora_invocation_tokens=INVOCATION), 0.3),
    "pissa": ("llama", lambda: lora(init_lora_weights="pissa"), 0.2),
    "olora": ("llama", lambda: lora(init_lora_weights="olora"), 0.2),
    "pissa_head": ("llama", lambda: lora(init_lora_weights="pissa", target_modules=["lm_head", "q_proj"]), 0.2),
    "pissa_dora": ("llama", lambda: lora(init_lora_weights="pissa", use_dora=True, target_modules=MIX), 0.2),
    "pissa_converted": ("llama", lambda: lora(init_lora_weights="pissa"), 0.2),
    "olora_converted": ("qwen2", lambda: lora(init_lora_weights="olora", use_rslora=True), 0.2),
    "corda_converted": ("llama", lambda: lora(init_lora_weights="corda", corda_config=CordaConfig()), 0.2),
    "qalora": ("llama", lambda: lora(target_modules=MIX), 0.2),
    "mica": ("llama", lambda: lora(init_lora_weights="mica"), 0.2),
    "kasa": ("llama", lambda: lora(kasa_config=KasaConfig()), 0.2),
    "bdlora": ("llama", lambda: lora(
        target_modules=["q_proj", "v_proj", "o_proj"], use_bdlora=BdLoraConfig(
            target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2)), 0.2),
    "adalora": ("llama", lambda: plain(AdaLoraConfig, init_r=6, target_r=3, lora_alpha=8, total_step=10,
                                       target_modules=QV), 0.2),
    "beft": ("llama", lambda: plain(BeftConfig, target_modules=QV), 0.3),
    "boft": ("llama", lambda: plain(BOFTConfig, boft_block_size=8, boft_n_butterfly_factor=1,
                                    target_modules=MIX), 0.2),
    "boft_butterfly": ("llama", lambda: plain(BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=3,
                                              target_modules=MIX), 0.2),
    "c3a": ("llama", lambda: plain(C3AConfig, block_size=16, target_modules=MIX), 1.0),
    "deft_qr": ("llama", lambda: plain(DeftConfig, r=3, target_modules=QV,
                                       decomposition_method="qr"), 0.2),
    "deft_relu": ("llama", lambda: plain(DeftConfig, r=3, alpha=6, target_modules=QV,
                                         decomposition_method="relu"), 0.05),
    "delora": ("llama", lambda: plain(DeloraConfig, r=4, target_modules=MIX), 0.3),
    "fourierft": ("llama", lambda: plain(FourierFTConfig, n_frequency=20, target_modules=QV), 0.5),
    "fourierft_dense": ("llama", lambda: plain(FourierFTConfig, n_frequency=60,
                                               target_modules=MIX), 0.5),
    "frod": ("llama", lambda: plain(FrodConfig, target_modules=["q_proj"]), 0.05),
    "glora": ("qwen2", lambda: plain(GloraConfig, r=3, target_modules=QV), 0.1),
    "glora_vector": ("qwen2", lambda: plain(
        GloraConfig, r=3, target_modules=QV, config_A_B="vector", config_C="vector",
        config_D_E="vector"), 0.1),
    "gralora": ("llama", lambda: plain(GraloraConfig, r=4, gralora_k=2, hybrid_r=2, alpha=8,
                                       target_modules=MIX), 0.2),
    "hira": ("llama", lambda: plain(HiraConfig, r=3, target_modules=QV), 0.5),
    "hira_embedding": ("llama", lambda: plain(HiraConfig, r=3, target_modules=["embed_tokens", "q_proj"]), 0.5),
    "hra": ("llama", lambda: plain(HRAConfig, r=4, target_modules=QV), 0.5),
    "hra_gs": ("llama", lambda: plain(HRAConfig, r=4, apply_GS=True, target_modules=QV), 0.5),
    "ia3": ("qwen2", lambda: plain(IA3Config, target_modules=["k_proj", "v_proj", "down_proj"],
                                   feedforward_modules=["down_proj"]), 0.5),
    "ln_tuning": ("llama", lambda: plain(LNTuningConfig), 0.3),
    "loha": ("llama", lambda: plain(LoHaConfig, r=3, alpha=6, target_modules=QV), 0.3),
    "lokr": ("llama", lambda: plain(LoKrConfig, r=4, alpha=8, target_modules=MIX), 0.3),
    "lokr_full": ("llama", lambda: plain(LoKrConfig, r=100, alpha=50, target_modules=QV,
                                         decompose_both=True), 0.3),
    "lokr_both": ("llama", lambda: plain(LoKrConfig, r=2, alpha=4, target_modules=QV,
                                         decompose_both=True), 0.3),
    "miss": ("llama", lambda: plain(MissConfig, r=5, target_modules=MIX), 0.1),
    "miss_mini": ("llama", lambda: plain(MissConfig, r=4, mini_r=8, init_weights="mini",
                                         target_modules=QV), 0.1),
    "miss_bat": ("llama", lambda: plain(MissConfig, r=8, init_weights="bat",
                                        target_modules=["q_proj"]), 0.1),
    "oft": ("llama", lambda: plain(OFTConfig, oft_block_size=8, r=0, target_modules=QV), 0.2),
    "oft_exact": ("llama", lambda: plain(OFTConfig, oft_block_size=8, r=0, target_modules=MIX,
                                         use_cayley_neumann=False, block_share=True), 0.3),
    "oft_coft": ("llama", lambda: plain(OFTConfig, oft_block_size=8, r=0, target_modules=QV, coft=True,
                                        eps=0.5), 0.3),
    "oft_terms": ("llama", lambda: plain(OFTConfig, oft_block_size=8, r=0, target_modules=QV,
                                         num_cayley_neumann_terms=3), 0.2),
    "oft_embedding": ("llama", lambda: plain(OFTConfig, oft_block_size=8, r=0,
                                             target_modules=["embed_tokens", "q_proj"]), 0.2),
    "osf": ("llama", lambda: plain(OSFConfig, effective_rank=56, target_modules=QV), 0.1),
    "peanut": ("llama", lambda: plain(PeanutConfig, r=3, depth=2, act_fn="silu", scaling=0.5,
                                      target_modules=QV), 0.3),
    "poly": ("llama", lambda: plain(PolyConfig, r=3, n_tasks=3, n_skills=4, n_splits=2, target_modules=MIX), 0.4),
    "pvera": ("llama", lambda: plain(PveraConfig, r=8, target_modules=QV), 0.5),
    "randlora": ("llama", lambda: plain(RandLoraConfig, r=16, randlora_alpha=16,
                                        target_modules=["q_proj"]), 0.1),
    "randlora_uneven": ("llama", lambda: plain(RandLoraConfig, r=10, randlora_alpha=20,
                                               target_modules=[*QV, *MLP]), 0.1),
    "road_1": ("qwen2", lambda: plain(RoadConfig, variant="road_1", group_size=16,
                                      target_modules=QV), 0.3),
    "road_2": ("llama", lambda: plain(RoadConfig, variant="road_2", group_size=32,
                                      target_modules=MIX), 0.3),
    "road_4": ("llama", lambda: plain(RoadConfig, variant="road_4", group_size=16,
                                      target_modules=QV), 0.3),
    "shira": ("llama", lambda: plain(ShiraConfig, r=2, target_modules=QV), 0.3),
    "supertuning": ("llama", lambda: plain(SupertuningConfig, sparsity=0.95, target_modules=QV,
                                           save_precomputed_indices=True), 0.3),
    "supertuning_lora": ("llama", lambda: plain(
        SupertuningConfig, sparsity=0.97, r=2, lora_alpha=4, target_modules=QV,
        save_precomputed_indices=True), 0.3),
    "tinylora": ("llama", lambda: plain(TinyLoraConfig, r=2, u=4, weight_tying=0.5,
                                        target_modules=MIX), 1.0),
    "tinylora_embedding": ("llama", lambda: plain(TinyLoraConfig, r=2, u=3,
                                                  target_modules=["embed_tokens", "q_proj"]), 1.0),
    "trainable_tokens": ("llama", lambda: plain(TrainableTokensConfig, token_indices=[3, 9, 100],
                                                target_modules=["embed_tokens"]), 0.3),
    "unilora": ("llama", lambda: plain(UniLoraConfig, r=2, theta_d_length=64, save_indices=True,
                                       target_modules=QV), 1.0),
    "vblora": ("llama", lambda: plain(VBLoRAConfig, r=2, num_vectors=12, vector_length=16, topk=2,
                                      target_modules=QV), 0.5),
    "vblora_topk": ("llama", lambda: plain(
        VBLoRAConfig, r=2, num_vectors=12, vector_length=16, topk=3, save_only_topk_weights=True,
        target_modules=QV), 0.5),
    "vera": ("llama", lambda: plain(VeraConfig, r=8, target_modules=QV), 0.5),
    "waveft": ("llama", lambda: plain(WaveFTConfig, n_frequency=40, target_modules=QV,
                                      use_idwt=False), 0.05),
    "waveft_db1": ("llama", lambda: plain(WaveFTConfig, n_frequency=40, target_modules=QV,
                                          wavelet_family="db1", use_idwt=True), 0.05),
    "prompt_tuning": ("llama", lambda: plain(PromptTuningConfig, num_virtual_tokens=5), 0.3),
    "p_tuning": ("qwen2", lambda: plain(PromptEncoderConfig, num_virtual_tokens=4,
                                        encoder_hidden_size=16), 0.3),
    "cpt": ("llama", lambda: plain(CPTConfig, cpt_token_ids=[4, 5, 6], cpt_mask=[1, 1, 1],
                                   cpt_tokens_type_mask=[1, 2, 2]), 0.3),
    "multitask_prompt": ("llama", lambda: plain(MultitaskPromptTuningConfig, num_virtual_tokens=4, num_tasks=3,
                                                num_ranks=2, prompt_tuning_init="RANDOM"), 0.7),
    "prefix_tuning": ("llama", lambda: plain(PrefixTuningConfig, num_virtual_tokens=5), 0.5),
    "prefix_tuning_gqa": ("qwen2", lambda: plain(PrefixTuningConfig, num_virtual_tokens=3), 0.5),
    "cartridge": ("llama", lambda: plain(CartridgeConfig, num_virtual_tokens=6,
                                         num_frozen_tokens=1), 0.5),
    "adaption_prompt": ("llama", lambda: AdaptionPromptConfig(adapter_len=4, adapter_layers=1,
                                                              task_type="CAUSAL_LM"), 0.5),
    "added_tokens": ("llama", lambda: lora(modules_to_save=["embed_tokens", "lm_head"]), 0.1),
    "added_tokens_lora": ("llama", lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
                          0.2),
    "added_tokens_kept": ("llama", lambda: lora(), 0.2),
    "added_tokens_tied": ("qwen2", lambda: lora(trainable_token_indices=[5, *range(320, 332)]), 0.2),
    "added_tokens_tied_kept": ("qwen2", lambda: lora(), 0.2),
    "fewer_tokens": ("llama", lambda: lora(), 0.2),
}

# Tokens more than the base has, before the adapter is made.
RESIZED = {"added_tokens": 5, "added_tokens_lora": 3, "added_tokens_kept": 70, "added_tokens_tied": 12,
           "added_tokens_tied_kept": 4, "fewer_tokens": -20}


# name -> (base, {adapter: weight}): the sum of adapters made above
MIXTURES = {
    "mixture": ("llama", {"lora": 0.7, "lora_patterns": -0.4}),
    "mixture_three": ("llama", {"lora": 1.5, "mica": 0.5, "lora_head": 0.25}),
    "mixture_ia3": ("qwen2", {"ia3": 0.6}),
}


def randomise(model, spread):
    """Gives every trained parameter a value that is seen in the output."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not parameter.dtype.is_floating_point:
            continue
        if "magnitude" in name or "ia3_l" in name or "boft_s" in name or "road_alpha" in name or \
                "layernorm" in name or "norm" in name.rsplit(".", 2)[-2] or "ln_tuning" in name:
            parameter.data.mul_(1 + spread * torch.rand_like(parameter))
        elif "vblora_logits" in name:
            parameter.data.normal_(0, 3)
        elif "base_layer" in name or "embed_tokens" in name or "lm_head" in name or \
                "randlora_" in name or "lambda" in name or "osf_svd" in name or "trainable" in name:
            parameter.data.add_(spread * torch.randn_like(parameter))
        else:
            parameter.data.normal_(0, spread)


LATENT = ".default_lora_latent_mapping.weight"  # as LoRA-XS's code, which lies over PEFT, saves it


def add_latent_mappings(path):
    """Makes a LoRA file one of LoRA-XS: an r x r matrix between every pair."""
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        rank = tensors[name].shape[0]
        tensors[name.removesuffix(".lora_A.weight") + LATENT] = torch.randn(rank, rank)
    save_file(tensors, path, metadata={"format": "pt"})


def fold_latent_mappings(model, tensors):
    """W + s B R A (Balazy et al. 2024) by PEFT's LoRA with B R for B."""
    for name, module in model.named_modules():
        if name + LATENT in tensors:
            module.lora_B["default"].weight.data @= tensors[name + LATENT]


GROUP = 4  # of QALoRA


def group_inputs(path):
    """Makes a LoRA file one of QALoRA, whose A reads means of groups of inputs: [r, i / GROUP]."""
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        tensors[name] = tensors[name][:, ::GROUP].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def load_ungrouped(model, directory):
    """QALoRA (Xu et al. 2023) as PEFT's LoRA: A times (groups of means, times their number)."""
    config = json.loads((directory / "adapter_config.json").read_text())
    config.pop("use_qalora"), config.pop("qalora_group_size")
    config = LoraConfig(**config)
    model = get_peft_model(model, config)
    tensors = load_file(directory / "adapter_model.safetensors")
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        groups = tensors[name].shape[1]
        tensors[name] = (tensors[name] * groups / GROUP).repeat_interleave(GROUP, 1)
    set_peft_model_state_dict(model, tensors)
    return model


def block_diagonals_by_torch():
    """PEFT takes several butterfly factors only with its CUDA kernel, which does what this does."""
    boft.get_fbd_cuda = lambda: True
    boft.FastBlockDiag.apply = lambda blocks: torch.stack([torch.block_diag(*f) for f in blocks])


def resize(model, name, spread):
    """Gives the model its adapter's vocabulary; the rows of new tokens are larger than the others by `spread`."""
    if name not in RESIZED:
        return
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = tables[0].weight.shape[0]
    model.resize_token_embeddings(before + RESIZED[name], mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = table.weight.data[before:]
        rows.normal_(0, 1).mul_(spread * table.weight.data[:before].std())


def build(name):
    base, config, spread = CASES[name]
    torch.manual_seed(SEED)
    numpy.random.seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / base, dtype=torch.float32)
    resize(model, name, 3)
    config = config()
    if name == "corda_converted":
        inputs = torch.arange(3, 300)[None]
        preprocess_corda(model, config, run_model=lambda: model(inputs))
    model = get_peft_model(model, config)
    if name.endswith("_converted"):
        initial = OUT / "initial"
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = config.init_lora_weights
    randomise(model, spread)
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    conversion = {"path_initial_model_for_weight_conversion": initial} if name.endswith("_converted") else {}
    model.save_pretrained(directory, save_embedding_layers=True if name in RESIZED else "auto",
                          **conversion)
    shutil.rmtree(OUT / "initial", ignore_errors=True)
    if name == "qalora":
        group_inputs(directory / "adapter_model.safetensors")
    if name == "lora_xs":
        add_latent_mappings(directory / "adapter_model.safetensors")
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    if name == "qalora":
        config |= {"use_qalora": True, "qalora_group_size": GROUP}
    if name in OF_TASKS:
        config |= {"task_id": TASK}
    path.write_text(json.dumps(config, indent=1) + "\n")
    (directory / "README.md").unlink(missing_ok=True)
    return base


def float_base(base):
    """In float32: of a base in NF4 what bitsandbytes dequantises, since its CPU kernels multiply in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / base, dtype=torch.float32)
    if getattr(model.config, "quantization_config", None) is None:
        return model
    model = model.dequantize(dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return model


def load(name, base):
    model = float_base(base)
    resize(model, name, 0)  # the rows of new tokens are the file's
    if name == "qalora":
        return load_ungrouped(model, OUT / name).eval()
    model = PeftModel.from_pretrained(model, OUT / name).eval()
    if name == "lora_xs":
        fold_latent_mappings(model, load_file(OUT / name / "adapter_model.safetensors"))
    return model


def load_mixture(name):
    base, weights = MIXTURES[name]
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / base, dtype=torch.float32)
    names = list(weights)
    model = PeftModel.from_pretrained(model, OUT / names[0], adapter_name=names[0])
    for other in names[1:]:
        model.load_adapter(OUT / other, adapter_name=other)
    kind = {} if name == "mixture_ia3" else {"combination_type": "cat"}
    model.add_weighted_adapter(names, list(weights.values()), "sum", **kind)
    model.set_adapter("sum")
    return model.eval()


def step(model, ids, options):
    inputs = torch.tensor([ids])
    logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False,
                   **options).logits[0, -1]
    return torch.log_softmax(logits.float(), -1)


def alora_offsets(prompt):
    """Where the invocation starts, counted from the end of the prompt, as PEFT does."""
    for at in range(len(prompt) - len(INVOCATION), -1, -1):
        if prompt[at:at + len(INVOCATION)] == INVOCATION:
            return at
    return None


def generate(model, prompt, name):
    ids, greedy, logprobs, margin = list(prompt), [], [], 1.0
    at = alora_offsets(prompt)
    options = {"task_ids": torch.tensor([TASK])} if name in OF_TASKS else {}
    for _ in range(STEPS):
        if name == "alora":
            options = {"alora_offsets": [len(ids) - at if at is not None else None]}
        values = step(model, ids, options)
        best = torch.topk(values, TOP + 1)
        margin = min(margin, float(best.values[0] - best.values[1]))
        greedy.append(int(best.indices[0]))
        logprobs.append([[int(i), round(float(v), 7)] for v, i in
                         zip(best.values[:TOP], best.indices[:TOP])])
        ids.append(greedy[-1])
    return greedy, logprobs, margin


def case(name):
    base = MIXTURES[name][0] if name in MIXTURES else build(name)
    return measured(name, base, load_mixture(name) if name in MIXTURES else load(name, base))


def measured(name, base, model):
    plain_model = float_base(base)
    generator = torch.Generator().manual_seed(SEED)
    prompts, seen = [], 0.0
    while len(prompts) < 3:
        prompt = torch.randint(3, 320 + min(RESIZED.get(name, 0), 0), (6 + 2 * len(prompts),),
                               generator=generator).tolist()
        if name == "alora" and len(prompts) != 1:
            prompt[2:5] = INVOCATION
        if "tokens" in name:
            prompt[1:3] = [9, 17]
        if RESIZED.get(name, 0) > 0:
            prompt[3:5] = [320, 319 + RESIZED[name]]
        greedy, logprobs, margin = generate(model, prompt, name)
        if margin < MARGIN:
            continue
        known = torch.tensor([prompt]).clamp(max=319)
        here = plain_model(input_ids=known, use_cache=False).logits[0, -1]
        here = torch.log_softmax(here, -1)
        seen = max(seen, max(abs(float(here[i]) - v) for i, v in logprobs[0] if i < 320))
        prompts.append(dict(prompt=prompt, greedy=greedy, logprobs=logprobs))
    own = [token for p in prompts for token in p["greedy"] if token >= 320]
    assert own or RESIZED.get(name, 0) <= 0, f"{name}: no token of its own was generated"
    assert seen > 1e-2, f"{name}: the adapter changes log-probabilities by {seen} alone"
    print(f"{name:24} differs from the base by {seen:.3f}", flush=True)
    mixture = {"adapters": MIXTURES[name][1]} if name in MIXTURES else {}
    if name == "layer_replication":
        base += " " + json.dumps(REPLICATION, separators=(",", ":"))
    return dict(name=name, base=base, **mixture, prompts=prompts)


def base_model(base):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / base, dtype=torch.float32)
    model.config.use_cache = False
    return model


def add_cases(models):
    """For the scripts beside this one: cases of models made there, name -> (base, model)."""
    path = OUT / "cases.json"
    done = {c["name"]: c for c in json.loads(path.read_text())}
    for name, (base, model) in models.items():
        done[name] = measured(name, base, model)
    path.write_text("[\n" + ",\n".join(json.dumps(c) for c in done.values()) + "\n]\n")


def main():
    setup_torch()
    block_diagonals_by_torch()
    torch.use_deterministic_algorithms(False)
    OUT.mkdir(exist_ok=True)
    wanted = sys.argv[1:] or [*CASES, *MIXTURES]
    path = OUT / "cases.json"
    done = {c["name"]: c for c in json.loads(path.read_text())} if path.exists() else {}
    for name in wanted:
        try:
            done[name] = case(name)
        except Exception as error:  # one library bug must not cost the others their goldens
            if len(wanted) == 1:
                raise
            print(f"{name:24} FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)
    order = dict.fromkeys([*CASES, *MIXTURES, *done])  # others' cases last
    text = "[\n" + ",\n".join(json.dumps(done[n]) for n in order if n in done) + "\n]\n"
    path.write_text(text)


if __name__ == "__main__":
    main()
