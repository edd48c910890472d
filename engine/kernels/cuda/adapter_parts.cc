#include "engine/kernels/cuda/adapter_parts.h"

namespace lorikeet::cuda {

bool IsScaled(const ModuleDelta& delta) {
  return delta.low_rank.rank_scale != nullptr || delta.low_rank.delta_scale != nullptr || delta.rank_gate != nullptr;
}

PartSet PartsOf(const Adapter& adapter, const ExpertModules& experts) {
  PartSet set = 0;
  const auto add = [&set](Part part, bool used) { set |= used ? Bit(part) : 0; };
  for (const ModuleDelta& delta : adapter.modules) {
    add(Part::kOutScale, delta.out_scale != nullptr);
    add(Part::kBias, delta.bias != nullptr);
    add(Part::kInputRotation, delta.input_rotation.block > 0);
    add(Part::kKronecker, delta.kronecker.w1 != nullptr);
    add(Part::kCirculant, delta.circulant.block > 0);
    add(Part::kRows, delta.sparse.row_begin != nullptr || delta.dense.data != nullptr);
    add(Part::kOutputRotation, delta.output_rotation.scale != nullptr);
    add(Part::kReplacedRows, delta.rows.rows.data != nullptr);
    add(Part::kScaledPairs, IsScaled(delta));
    add(Part::kPrototypes, delta.prototypes != nullptr);
  }
  const auto modules = static_cast<int32_t>(adapter.modules.size());
  for (ModuleId m = 0; m < modules; ++m) {
    add(Part::kExperts, experts.contains(m) && !adapter.modules[m].empty());
  }
  add(Part::kEmbedding, !adapter.embedding.empty() || adapter.virtual_tokens.count > 0);
  add(Part::kNorms, !adapter.norms.empty());
  add(Part::kPrefix, adapter.virtual_tokens.kv != nullptr);
  add(Part::kPromptAttention, !adapter.prompt_attention.empty());
  add(Part::kBottlenecks, !adapter.bottlenecks.empty());
  add(Part::kMixture, !adapter.mlp_mixture.experts.empty());
  return set;
}

LinearSet LinearsOf(const Adapter& adapter, const ExpertModules& experts) {
  LinearSet set = 0;
  const auto modules = static_cast<int32_t>(adapter.modules.size());
  const ModuleId head = HeadModule(experts.layers_of(adapter.modules.size()));
  for (ModuleId m = 0; m < modules; ++m) {
    if (experts.contains(m)) continue;
    const ModuleDelta& delta = adapter.modules[m];
    const uint32_t linear = m == head ? kHeadLinear : 1u << m % kLinearsPerLayer;
    const auto add = [&set, linear](LinearPart part, bool used) {
      set |= used ? linear << static_cast<uint32_t>(part) : 0;
    };
    add(LinearPart::kAny, !delta.empty());
    add(LinearPart::kInputRotation, delta.input_rotation.block > 0);
    add(LinearPart::kSum, delta.adds());
    add(LinearPart::kOutput,
        delta.output_rotation.scale != nullptr || delta.rows.rows.data != nullptr);
  }
  return set;
}

}  // namespace lorikeet::cuda
