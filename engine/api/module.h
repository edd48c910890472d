// Which linear of the model: the vocabulary shared by adapters, weights and kernels.
//
// A model has kLinearsPerLayer linears a layer and one head. ModuleId numbers them densely, so a
// per-module table is a plain vector of ModuleCount(layers) entries.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lorikeet {

enum class Linear : uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown };
inline constexpr int kLinearsPerLayer = 7;

using ModuleId = int32_t;

constexpr ModuleId LayerModule(int layer, Linear linear) {
  return layer * kLinearsPerLayer + static_cast<int>(linear);
}
constexpr ModuleId HeadModule(int layers) { return layers * kLinearsPerLayer; }
constexpr int ModuleCount(int layers) { return layers * kLinearsPerLayer + 1; }

// The Hugging Face path below the model class: "model.layers.3.self_attn.q_proj", "lm_head".
std::string ModulePath(ModuleId id, int layers);

}  // namespace lorikeet
