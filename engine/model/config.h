// Everything the forward pass must know of a decoder-only transformer, read from config.json or
// GGUF metadata. One struct for all families: a family is a set of values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace lorikeet {

// Rotary scaling of Llama 3.1 ("llama3") or plain position interpolation ("linear").
struct RopeScaling {
  enum class Kind : uint8_t { kLinear, kLlama3 };
  Kind kind = Kind::kLinear;
  float factor = 1.0f;
  float low_freq_factor = 1.0f;   // kLlama3
  float high_freq_factor = 4.0f;  // kLlama3
  int32_t original_context = 8192;  // kLlama3
};

struct ModelConfig {
  std::string family;  // "llama", "smollm3", "mistral", "qwen2", "qwen3"
  std::string name;    // for people: directory or file stem
  int32_t layers = 0;
  int32_t hidden = 0;
  int32_t ffn = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t vocab = 0;
  int32_t context = 0;  // max_position_embeddings
  float norm_eps = 1e-5f;
  float rope_theta = 10000.0f;
  std::optional<RopeScaling> rope_scaling;
  std::vector<uint8_t> layer_uses_rope;  // [layers]; SmolLM3 leaves some layers without
  int32_t sliding_window = 0;            // 0: none; w: a token sees itself and w - 1 before it
  std::vector<uint8_t> layer_uses_window;  // [layers]
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  // per-head RMS norm of q and k before rotary (Qwen3)
  bool tied_head = false;
  std::vector<int32_t> eos_ids;  // of generation_config.json or the file
};

}  // namespace lorikeet
