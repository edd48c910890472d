// Which linear of the model: the vocabulary shared by adapters, weights and kernels.
//
// ModuleId numbers them: kLinearsPerLayer a layer, one head, and where there are experts a router and
// kLinearsPerExpert linears an expert of every layer, behind the head so that nothing before it moves.
// A per-module table is a plain vector of ModuleCount entries. A layer has either a feed-forward block
// (kGate, kUp, kDown) or a router and experts; the other's numbers are nobody's.
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

inline constexpr int kLinearsPerExpert = 3;  // kGate, kUp, kDown

constexpr int ModuleCount(int layers, int experts = 0) {
  const int of_experts = experts == 0 ? 0 : layers * (1 + experts * kLinearsPerExpert);
  return layers * kLinearsPerLayer + 1 + of_experts;
}
constexpr ModuleId RouterModule(int layers, int experts, int layer) {
  return ModuleCount(layers) + layer * (1 + experts * kLinearsPerExpert);
}
constexpr ModuleId ExpertModule(int layers, int experts, int layer, int expert, Linear linear) {
  return RouterModule(layers, experts, layer) + 1 + expert * kLinearsPerExpert +
         static_cast<int>(linear) - static_cast<int>(Linear::kGate);
}

// Which modules are experts', of a model that has them.
struct ExpertModules {
  int32_t layers = 0;   // of the model; 0: none has experts
  int32_t experts = 0;  // of a layer

  constexpr bool contains(ModuleId module) const {
    const int behind = module - ModuleCount(layers);
    return layers > 0 && behind >= 0 && behind % (1 + experts * kLinearsPerExpert) != 0;
  }
  // The layers of a model whose table of modules has `modules` entries.
  constexpr int layers_of(size_t modules) const {
    return layers > 0 ? layers : (static_cast<int>(modules) - 1) / kLinearsPerLayer;
  }
};

// The Hugging Face path below the model class: "model.layers.3.self_attn.q_proj", "lm_head".
// REQUIRES: id < ModuleCount(layers), no router's or expert's.
std::string ModulePath(ModuleId id, int layers);

}  // namespace lorikeet
