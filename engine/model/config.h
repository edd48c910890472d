// Everything the forward pass must know of a decoder-only transformer, read from config.json or
// GGUF metadata. One struct for all families: a family is a set of values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "engine/api/module.h"

namespace lorikeet {

struct ModelConfig {
  std::string family;  // "llama", "smollm3", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"
  std::string name;    // for people: directory or file stem
  int32_t layers = 0;
  int32_t hidden = 0;
  int32_t ffn = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t vocab = 0;
  int32_t context = 0;  // max_position_embeddings
  float norm_eps = 1e-6f;
  // Radians per position of each rotary pair, scaling of every kind included. Pair i of a head is
  // its values i and i + head_dim / 2.
  std::vector<float> rope_inverse_frequencies;  // [head_dim / 2]
  std::vector<uint8_t> layer_uses_rope;         // [layers]; SmolLM3 leaves some layers without
  int32_t sliding_window = 0;              // 0: none; w: a token sees itself and w - 1 before it
  std::vector<uint8_t> layer_uses_window;  // [layers]; all 0 when sliding_window is 0
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  // per-head RMS norm of q and k before rotary (Qwen3)
  bool tied_head = false;
  // A layer with experts (Shazeer et al. 2017) sends each token through a few of them, those to which
  // the router gives most: softmax over all, and with `normalise_experts` divided by what the chosen
  // ones have together.
  int32_t experts = 0;  // 0: none
  int32_t experts_per_token = 0;
  int32_t expert_ffn = 0;
  bool normalise_experts = false;
  std::vector<uint8_t> layer_has_experts;  // [layers], or empty without experts
  bool has_experts(int layer) const { return experts > 0 && layer_has_experts[layer]; }
  ExpertModules expert_modules() const {
    return experts > 0 ? ExpertModules{layers, experts} : ExpertModules();
  }
  std::vector<int32_t> eos_ids;  // ascending; of generation_config.json or the file; may be empty
};

// What holds in every family: query heads share KV heads evenly, head_dim is even, per-layer
// vectors have one entry a layer, frequencies are finite. INVALID_ARGUMENT naming the values;
// `where` begins it.
absl::Status CheckConfig(const ModelConfig& config, std::string_view where);

}  // namespace lorikeet
