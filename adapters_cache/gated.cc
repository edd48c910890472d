#include "adapters_cache/gated.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/mixer.h"
#include "adapters_cache/pack.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

// What of an expert has no gate; nullptr: nothing.
const char* BesideGatedPairs(const Adapter& adapter) {
  if (const char* part = Unsummable(adapter); part != nullptr) return part;
  if (adapter.embedding.low_rank.rank > 0) return "a pair on the embedding";
  for (const ModuleDelta& module : adapter.modules) {
    if (module.bias) return "biases";
    if (module.output_rotation.scale || module.input_rotation.block) return "scaled activations";
  }
  return nullptr;
}

// The classifier must read this base's states and have a gate for each expert, or one for each
// expert and linear.
absl::Status CheckWidths(const Gating& gating, const BaseModel& base) {
  const int32_t in = gating.layers.front().in, out = gating.layers.back().out;
  if (in == base.hidden() && out == gating.width()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "X-LoRA's classifier leads from ", in, " to ", out, " values; the base's states have ",
      base.hidden(), ", and ", gating.experts, " experts on ", gating.sets,
      gating.sets == 1 ? " set of linears" : " linears", " take ", gating.width()));
}

}  // namespace

absl::StatusOr<std::vector<std::shared_ptr<const Adapter>>> NormaliseExperts(const RawAdapter& raw,
                                                                             const BaseModel& base,
                                                                             const NormaliseOptions& options) {
  std::vector<std::shared_ptr<const Adapter>> experts;
  for (const RawAdapter& expert : raw.experts) {
    LK_ASSIGN_OR_RETURN(auto adapter, Normalise(expert, base, options));
    if (const char* part = BesideGatedPairs(*adapter); part != nullptr) {
      return absl::UnimplementedError(
          absl::StrCat("expert ", experts.size(), " has ", part, "; gates are of pairs alone"));
    }
    experts.push_back(std::move(adapter));
  }
  return experts;
}

std::vector<int32_t> RankGates(std::span<const std::shared_ptr<const Adapter>> experts, ModuleId module) {
  std::vector<int32_t> gates;
  for (size_t e = 0; e < experts.size(); ++e) {
    gates.insert(gates.end(), experts[e]->module(module).low_rank.rank, static_cast<int32_t>(e));
  }
  return gates;
}

namespace {

// Their pairs one below the other.
absl::StatusOr<std::shared_ptr<Adapter>> StackExperts(
    const RawAdapter& raw, const BaseModel& base, std::span<const std::shared_ptr<const Adapter>> experts) {
  const std::vector<AdapterLease> leases(experts.begin(), experts.end());
  std::vector<WeightedAdapter> terms;
  for (size_t e = 0; e < experts.size(); ++e) terms.push_back({absl::StrCat(e), raw.gates_weight});
  LK_ASSIGN_OR_RETURN(std::shared_ptr<Adapter> adapter, SumAdapters(base, terms, leases));
  adapter->version = raw.version;
  adapter->variant = raw.variant;
  return adapter;
}

// [experts, in]: the gate of a linear that the experts are on.
absl::StatusOr<std::vector<float>> GateOf(const RawAdapter& raw, const std::string& path, int32_t in) {
  const RawModule* module = raw.Find(path);
  if (module == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("the file has no gate for ", path, ", which its LoRAs are on"));
  }
  const auto& [name, view] = module->tensors.begin()->second;
  const std::vector<int64_t> needed = {raw.prototype_gates.experts, in};
  if (view.shape != needed || IsCode(view.dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", Info(view.dtype).name, " ", ShapeString(view.shape),
                                                   "; needed are floats ", ShapeString(needed)));
  }
  LK_RETURN_IF_ERROR(CheckFinite(name, view));
  std::vector<float> gate(view.elements());
  Dequantize(view.dtype, view.bytes.data(), view.elements(), gate.data());
  return gate;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Adapter>> NormaliseMole(const RawAdapter& raw, const BaseModel& base,
                                                             const NormaliseOptions& options) {
  LK_ASSIGN_OR_RETURN(const auto experts, NormaliseExperts(raw, base, options));
  LK_ASSIGN_OR_RETURN(std::shared_ptr<Adapter> adapter, StackExperts(raw, base, experts));
  adapter->prototype_gates = raw.prototype_gates;
  Packer packer(options, adapter.get());
  std::set<std::string> unused;
  for (const auto& [path, module] : raw.modules) unused.insert(module.tensors.begin()->second.name);
  for (const ModuleId m : base.modules()) {
    if (adapter->module(m).low_rank.rank == 0) continue;
    const std::string path = base.path(m);
    LK_ASSIGN_OR_RETURN(const std::vector<float> gate, GateOf(raw, path, base.shape(m).in));
    unused.erase(raw.Find(path)->tensors.begin()->second.name);
    adapter->modules[m].prototypes = packer.Floats(gate);
    adapter->modules[m].rank_gate = packer.Integers(RankGates(experts, m));
  }
  if (unused.empty()) return std::shared_ptr<const Adapter>(std::move(adapter));
  return absl::NotFoundError(absl::StrCat("no LoRA is on the linears of ",
                                          ListNames(std::vector<std::string>(unused.begin(), unused.end()))));
}

absl::StatusOr<std::shared_ptr<const Adapter>> NormaliseGated(const RawAdapter& raw,
                                                              const BaseModel& base,
                                                              const NormaliseOptions& options) {
  LK_ASSIGN_OR_RETURN(const auto experts, NormaliseExperts(raw, base, options));
  LK_ASSIGN_OR_RETURN(std::shared_ptr<Adapter> adapter, StackExperts(raw, base, experts));
  adapter->cacheable = false;  // the base's keys and values would be needed too
  adapter->gating = raw.gating;
  Gating& gating = adapter->gating;
  for (const Gating::Layer& layer : gating.layers) {
    adapter->bytes += static_cast<int64_t>((layer.weight.size() + layer.bias.size()) * sizeof(float));
  }
  gating.set_of.resize(adapter->modules.size());
  Packer packer(options, adapter.get());
  int32_t adapted = 0;
  for (const ModuleId m : base.modules()) {
    if (adapter->module(m).low_rank.rank == 0) continue;
    gating.set_of[m] = raw.gates_each_linear ? adapted++ : 0;
    adapter->modules[m].rank_gate = packer.Integers(RankGates(experts, m));
  }
  if (raw.gates_each_linear) gating.sets = adapted;
  LK_RETURN_IF_ERROR(CheckWidths(gating, base));
  return std::shared_ptr<const Adapter>(std::move(adapter));
}

}  // namespace lorikeet
