#include "engine/api/module.h"

#include <array>

namespace lorikeet {

std::string ModulePath(ModuleId id, int layers) {
  static constexpr std::array<const char*, kLinearsPerLayer> kPaths = {
      "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
      "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};
  if (id == HeadModule(layers)) return "lm_head";
  return "model.layers." + std::to_string(id / kLinearsPerLayer) + "." +
         kPaths[id % kLinearsPerLayer];
}

}  // namespace lorikeet
