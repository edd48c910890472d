"""What Transformers 5.23.0 makes of configurations of every supported family.

configs.json lists each config.json with the values of the model that Transformers builds from it.
torch 2.15.0; nothing is random.

    python make_configs.py    # writes beside itself
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

LLAMA3_SCALING = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                  "original_max_position_embeddings": 8192, "rope_type": "llama3"}


def config(model_type, **keys):
    architecture = {"llama": "LlamaForCausalLM", "smollm3": "SmolLM3ForCausalLM",
                    "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                    "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM",
                    "qwen3_moe": "Qwen3MoeForCausalLM"}[model_type]
    base = dict(architectures=[architecture], model_type=model_type, hidden_size=256,
                intermediate_size=512, num_attention_heads=8, num_hidden_layers=3,
                vocab_size=1000, max_position_embeddings=4096)
    return {**base, **keys}


CASES = {
    # Only what must be there: everything else is the family's default.
    "llama_bare": config("llama"),
    "smollm3_bare": config("smollm3", num_hidden_layers=9, pad_token_id=0),
    "mistral_bare": config("mistral"),
    "qwen2_bare": config("qwen2", num_attention_heads=32),
    "qwen3_bare": config("qwen3", num_attention_heads=32),
    # As published, with fewer layers.
    "llama_2": config("llama", hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                      num_key_value_heads=32, rms_norm_eps=1e-5, rope_scaling=None, bos_token_id=1,
                      eos_token_id=2, tie_word_embeddings=False, pretraining_tp=1,
                      hidden_act="silu", torch_dtype="float16", use_cache=True, vocab_size=32000),
    "llama_3_1": config("llama", hidden_size=4096, intermediate_size=14336, attention_bias=False,
                        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
                        rope_theta=500000.0, rope_scaling=LLAMA3_SCALING, mlp_bias=False,
                        max_position_embeddings=131072, vocab_size=128256,
                        eos_token_id=[128001, 128008, 128009], tie_word_embeddings=False),
    "llama_3_2": config("llama", hidden_size=2048, intermediate_size=8192, head_dim=64,
                        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
                        rope_theta=500000.0, rope_scaling={**LLAMA3_SCALING, "factor": 32.0},
                        max_position_embeddings=131072, vocab_size=128256,
                        tie_word_embeddings=True),
    "llama_rope_parameters": config(
        "llama", rope_parameters={**LLAMA3_SCALING, "rope_theta": 250000.0}),
    "llama_linear_old": config("llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_linear_new": config("llama", rope_parameters={"rope_type": "linear", "factor": 2.5,
                                                         "rope_theta": 5000.0}),
    "llama_llama3_without_original": config(
        "llama", rope_scaling={"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 2.0}),
    "llama_biases": config("llama", attention_bias=True, mlp_bias=True),
    "llama_nulls": config("llama", num_key_value_heads=None, head_dim=None, rope_parameters=None,
                          eos_token_id=None),
    "llama_wide_heads": config("llama", head_dim=48, num_key_value_heads=2),
    "smollm2": config("llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                      num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=100000,
                      rope_interleaved=False, tie_word_embeddings=True, vocab_size=49152,
                      eos_token_id=2, max_position_embeddings=8192),
    "smollm3": config("smollm3", num_hidden_layers=8, num_attention_heads=16,
                      num_key_value_heads=4, rope_theta=5000000.0, rope_scaling=None,
                      no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 2,
                      layer_types=["full_attention"] * 8, use_sliding_window=False,
                      sliding_window=None, max_window_layers=28, mlp_bias=False, pad_token_id=0,
                      eos_token_id=12, max_position_embeddings=65536),
    "smollm3_interval": config("smollm3", num_hidden_layers=7, no_rope_layer_interval=3,
                               num_key_value_heads=2, pad_token_id=0),
    "smollm3_window": config("smollm3", num_hidden_layers=8, use_sliding_window=True,
                             sliding_window=64, attention_bias=True, pad_token_id=0),
    "smollm3_window_types": config(
        "smollm3", num_hidden_layers=4, use_sliding_window=True, sliding_window=32, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2),
    "smollm3_window_off": config(
        "smollm3", num_hidden_layers=2, use_sliding_window=False, sliding_window=32, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"]),
    "mistral_0_1": config("mistral", num_key_value_heads=2, sliding_window=4096,
                          rope_theta=10000.0, rms_norm_eps=1e-5, eos_token_id=2),
    "mistral_0_3": config("mistral", num_key_value_heads=2, sliding_window=None,
                          rope_theta=1000000.0, rms_norm_eps=1e-5),
    "mistral_nemo": config("mistral", head_dim=128, num_key_value_heads=8, sliding_window=None,
                           rope_theta=1000000.0, max_position_embeddings=131072),
    "qwen2_5": config("qwen2", hidden_size=896, num_attention_heads=14, num_key_value_heads=2,
                      rope_theta=1000000.0, sliding_window=32768, use_sliding_window=False,
                      max_window_layers=21, tie_word_embeddings=True, use_mrope=False,
                      bos_token_id=643, eos_token_id=645),
    "qwen2_window": config("qwen2", num_key_value_heads=8, num_hidden_layers=6,
                           use_sliding_window=True, sliding_window=128, max_window_layers=4),
    "qwen2_window_late": config("qwen2", num_key_value_heads=8, use_sliding_window=True,
                                sliding_window=128, max_window_layers=28),
    "qwen2_window_defaults": config("qwen2", num_key_value_heads=8, num_hidden_layers=30,
                                    use_sliding_window=True),
    "qwen2_layer_types": config(
        "qwen2", num_key_value_heads=8, use_sliding_window=True, sliding_window=77,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "qwen3": config("qwen3", head_dim=128, num_key_value_heads=8, rope_theta=1000000,
                    rope_scaling=None, attention_bias=False, sliding_window=None,
                    use_sliding_window=False, max_window_layers=28, tie_word_embeddings=True),
    "qwen3_bias": config("qwen3", num_key_value_heads=4, attention_bias=True,
                         rope_parameters={"rope_theta": 5000000.0, "rope_type": "default"}),
    "qwen3_window": config("qwen3", num_key_value_heads=4, use_sliding_window=True,
                           sliding_window=16, max_window_layers=1),
    "mixtral_bare": config("mixtral"),
    "qwen3_moe_bare": config("qwen3_moe"),
    "mixtral_8x7b": config("mixtral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                           num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
                           rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
                           output_router_logits=False, router_aux_loss_coef=0.02,
                           max_position_embeddings=32768, vocab_size=32000),
    "mixtral_window": config("mixtral", num_local_experts=4, sliding_window=64),
    "qwen3_30b_a3b": config("qwen3_moe", hidden_size=2048, intermediate_size=6144, head_dim=128,
                            num_attention_heads=32, num_key_value_heads=4, num_experts=128,
                            num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
                            decoder_sparse_step=1, mlp_only_layers=[], sliding_window=None,
                            use_sliding_window=False, max_window_layers=48, rope_theta=1000000.0,
                            rope_scaling=None, attention_bias=False),
    "qwen3_moe_sparse": config("qwen3_moe", num_hidden_layers=6, num_key_value_heads=4,
                               num_local_experts=16, decoder_sparse_step=2, mlp_only_layers=[3],
                               use_sliding_window=True, sliding_window=32),
}
GENERATION = {"llama_3_2": {"eos_token_id": [128009, 128001]}, "qwen2_5": {"eos_token_id": [645, 643]},
              "smollm2": {"max_length": 20}}


def layer_facts(model, layer):
    attention = layer.self_attn
    window = getattr(attention, "sliding_window", None)
    if model.config.model_type in ("mistral", "mixtral"):
        window = model.config.sliding_window
    return bool(getattr(attention, "use_rope", True)), window or 0


def expert_facts(model):
    blocks = [getattr(layer.mlp, "experts", None) for layer in model.model.layers]
    if not any(blocks):
        return {}
    router = next(layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate"))
    experts = next(block for block in blocks if block is not None)
    return {"experts": [len(block.down_proj) if block else 0 for block in blocks],
            "experts_per_token": router.top_k,
            "expert_ffn": experts.down_proj.shape[-1],
            "normalise_experts": getattr(router, "norm_topk_prob", True)}


def facts(name, keys):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(keys))
        if name in GENERATION:
            (Path(directory) / "generation_config.json").write_text(json.dumps(GENERATION[name]))
        hf = AutoConfig.from_pretrained(directory)
        try:
            generation = GenerationConfig.from_pretrained(directory)
        except OSError:
            generation = GenerationConfig.from_model_config(hf)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    frequencies = type(model.model.rotary_emb)(hf).inv_freq
    layer = model.model.layers[0]
    shapes = {n: list(p.shape) for n, p in layer.named_parameters()}
    per_layer = [layer_facts(model, l) for l in model.model.layers]
    head_dim = layer.self_attn.head_dim
    eos = generation.eos_token_id
    if eos is None:
        eos = hf.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
    return {
        "heads": shapes["self_attn.q_proj.weight"][0] // head_dim,
        "kv_heads": shapes["self_attn.k_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
        "norm_eps": layer.input_layernorm.variance_epsilon,
        "qkv_bias": "self_attn.q_proj.bias" in shapes and "self_attn.v_proj.bias" in shapes,
        "o_bias": "self_attn.o_proj.bias" in shapes,
        "mlp_bias": "mlp.down_proj.bias" in shapes,
        "qk_norm": "self_attn.q_norm.weight" in shapes,
        "tied_head": bool(hf.tie_word_embeddings),
        "uses_rope": [int(rope) for rope, _ in per_layer],
        "windows": [window for _, window in per_layer],
        "eos_ids": sorted(i for i in eos if i < hf.vocab_size),
        "inverse_frequencies": [float(f) for f in frequencies],
        **expert_facts(model),
    }


def main():
    cases = [{"name": name, "config": keys, "generation": GENERATION.get(name),
              "expected": facts(name, keys)} for name, keys in CASES.items()]
    lines = ",\n".join(json.dumps(case) for case in cases)
    (Path(__file__).parent / "configs.json").write_text(f"[\n{lines}\n]\n")


main()
