#include "adapters_cache/normalise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "adapters_cache/dora.h"
#include "adapters_cache/expert_parameters.h"
#include "adapters_cache/gated.h"
#include "adapters_cache/formats/module_tensors.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/mlp_mixture.h"
#include "adapters_cache/model_parts.h"
#include "adapters_cache/pack.h"
#include "adapters_cache/store_factors.h"
#include "adapters_cache/token_tables.h"
#include "engine/api/limits.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

constexpr int64_t kAlign = AlignedBuffer::kAlignment;

int64_t RoundUp(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

std::vector<float> ToFloats(const TensorView& view) {
  std::vector<float> values(view.elements());
  Dequantize(view.dtype, view.bytes.data(), view.elements(), values.data());
  return values;
}

// A module of the file that found its linear in the base.
struct Matched {
  ModuleId id = 0;
  LinearShape shape;
  const std::string* path = nullptr;
  const RawModule* raw = nullptr;
  int32_t rank = 0;
  DType dtype = DType::kBF16;  // as stored
};

class Normaliser {
 public:
  Normaliser(const RawAdapter& raw, const BaseModel& base, const NormaliseOptions& options)
      : raw_(raw), base_(base), options_(options), precision_(options.precision) {}

  absl::StatusOr<std::shared_ptr<const Adapter>> Run() {
    LK_ASSIGN_OR_RETURN(vocab_, VocabularyOf(raw_, base_));
    LK_RETURN_IF_ERROR(MatchModules());
    for (const Matched& module : matched_) CheckModule(module);
    LK_RETURN_IF_ERROR(problems_.ToStatus());
    auto adapter = std::make_shared<Adapter>();
    adapter->version = raw_.version;
    adapter->variant = raw_.variant;
    adapter->text = options_.text;
    adapter->vocab = vocab_ == base_.vocab_size() ? 0 : vocab_;
    adapter->modules.resize(ModuleCount(base_.layers(), base_.experts()));
    adapter->storage = AlignedBuffer(StorageBytes());
    adapter->bytes = static_cast<int64_t>(adapter->storage.size());
    next_ = adapter->storage.data();
    for (const Matched& module : matched_) {
      const absl::Status filled = Fill(module, &adapter->modules[module.id]);
      if (!filled.ok()) problems_.Add(filled);
      adapter->max_rank = std::max(adapter->max_rank, module.rank);
    }
    LK_RETURN_IF_ERROR(problems_.ToStatus());
    LK_CHECK(next_ == adapter->storage.data() + adapter->storage.size());
    Packer packer(options_, adapter.get());
    if (raw_.lower != nullptr) LK_RETURN_IF_ERROR(LowerModules(&packer, adapter.get()));
    if (raw_.lower_model != nullptr) {
      LK_RETURN_IF_ERROR(raw_.lower_model(raw_, base_, adapter.get()));
    }
    LK_RETURN_IF_ERROR(PackExpertParameters(raw_, base_, &packer, adapter.get()));
    LK_RETURN_IF_ERROR(PackModelParts(raw_, base_, &packer, adapter.get()));
    LK_RETURN_IF_ERROR(PackTokenTables(raw_, base_, vocab_, &packer, adapter.get()));
    LK_RETURN_IF_ERROR(packer.Finish());
    LK_RETURN_IF_ERROR(PackMlpMixture(raw_, base_, options_, adapter.get()));
    DropUntouchedExperts(adapter.get());
    return std::shared_ptr<const Adapter>(std::move(adapter));
  }

 private:
  // Most adapters leave the experts alone, of which a model may have thousands.
  void DropUntouchedExperts(Adapter* adapter) const {
    const auto experts = adapter->modules.begin() + ModuleCount(base_.layers());
    if (!std::all_of(experts, adapter->modules.end(), [](const auto& m) { return m.empty(); })) return;
    adapter->modules.erase(experts, adapter->modules.end());
    adapter->modules.shrink_to_fit();
  }

  // Pairs the file's modules with the base's linears, both ways.
  absl::Status MatchModules() {
    std::set<std::string_view> unknown;
    for (const auto& [path, module] : raw_.modules) {
      if (path != kEmbeddingPath || raw_.lower != nullptr) unknown.insert(path);
    }
    std::vector<std::string> missing;
    for (const ModuleId id : base_.modules()) {
      const std::string path = base_.path(id);
      const auto it = FindModule(path);
      if (it != raw_.modules.end()) {
        unknown.erase(it->first);
        // A head of other tokens than the base's is PackTokenTables'.
        const bool resized = path == kHeadPath && vocab_ != base_.vocab_size();
        if (!resized || raw_.lower != nullptr) {
          matched_.push_back(MakeMatched(id, it->first, it->second));
        }
      }
      const bool has_factors = it != raw_.modules.end() && it->second.has_delta();
      if (!has_factors && raw_.targets && raw_.targets(path)) missing.push_back(path);
    }
    if (!unknown.empty()) {
      return absl::NotFoundError(
          absl::StrCat("the base model (", base_.layers(), " layers) has no ",
                       ListNames({unknown.begin(), unknown.end()}), ", which the adapter changes"));
    }
    if (!missing.empty()) {
      return absl::NotFoundError(
          "target_modules asks for modules that the file has no tensors for: " +
          ListNames(missing));
    }
    return absl::OkStatus();
  }

  // By its path; Transformers 5 has `mlp` where Mixtral's files have `block_sparse_moe`.
  auto FindModule(const std::string& path) const -> decltype(RawAdapter::modules)::const_iterator {
    const auto it = raw_.modules.find(path);
    constexpr std::string_view kOld = ".block_sparse_moe.";
    const size_t at = path.find(kOld);
    if (it != raw_.modules.end() || at == std::string::npos) return it;
    return raw_.modules.find(std::string(path).replace(at, kOld.size(), ".mlp."));
  }

  Matched MakeMatched(ModuleId id, const std::string& path, const RawModule& raw) const {
    Matched module{.id = id, .shape = base_.shape(id), .path = &path, .raw = &raw};
    if (raw.a && raw.b) {
      if (!raw.a->view.shape.empty()) {
        module.rank = static_cast<int32_t>(
            std::clamp<int64_t>(raw.a->view.shape[0], 0, std::numeric_limits<int32_t>::max()));
      }
      const DType a = raw.a->view.dtype;
      module.dtype = precision_ == FactorPrecision::kBF16 ? DType::kBF16
                     : a == raw.b->view.dtype             ? a
                                                          : DType::kF32;
    }
    return module;
  }

  void CheckModule(const Matched& module) {
    const RawModule& raw = *module.raw;
    const int64_t in = module.shape.in;
    const int64_t out = module.shape.out;
    if (module.rank > Limits::kMaxAdapterRank) {
      problems_.Invalid(absl::StrCat(*module.path, ": rank ", module.rank, "; at most ",
                                     Limits::kMaxAdapterRank));
    }
    CheckTensor(module, raw.a, {module.rank, in});
    CheckTensor(module, raw.b, {out, module.rank});
    CheckTensor(module, raw.lora_bias, {out});
    CheckTensor(module, raw.magnitude, {out});
    CheckTensor(module, raw.base_bias, {out});
    if (raw.base_bias && !base_.ReadBias(module.id, nullptr)) {
      problems_.Invalid(absl::StrCat(raw.base_bias->name, " replaces a bias, but ", *module.path,
                                     " of the base model has none"));
    }
  }

  void CheckTensor(const Matched& module, const std::optional<RawTensor>& tensor,
                   const std::vector<int64_t>& expected) {
    if (!tensor.has_value()) return;
    if (tensor->view.shape != expected) {
      problems_.Invalid(absl::StrCat(tensor->name, " is ", ShapeString(tensor->view.shape), "; ",
                                     *module.path, " [", module.shape.out, ", ", module.shape.in,
                                     "] of the base model needs ", ShapeString(expected)));
      return;
    }
    if (IsCode(tensor->view.dtype)) {
      problems_.Invalid(
          absl::StrCat(tensor->name, " is ", Info(tensor->view.dtype).name, ", not of floats"));
    }
  }

  // Just before they are read, so that they come from memory once.
  static absl::Status CheckValues(const RawModule& raw) {
    for (const auto* tensor : {&raw.a, &raw.b, &raw.lora_bias, &raw.magnitude, &raw.base_bias}) {
      if (tensor->has_value()) LK_RETURN_IF_ERROR(CheckFinite((*tensor)->name, (*tensor)->view));
    }
    return absl::OkStatus();
  }

  static bool HasBias(const RawModule& raw) { return raw.lora_bias || raw.base_bias; }

  size_t StorageBytes() const {
    int64_t bytes = 0;
    for (const Matched& module : matched_) {
      const int64_t width = Info(module.dtype).block_bytes;
      bytes += module.rank * (RoundUp(module.shape.in * width) + RoundUp(module.shape.out * width));
      const int64_t vector = RoundUp(module.shape.out * int64_t{sizeof(float)});
      bytes += (module.raw->magnitude ? vector : 0) + (HasBias(*module.raw) ? vector : 0);
    }
    return static_cast<size_t>(bytes);
  }

  std::byte* Take(int64_t bytes) {
    std::byte* taken = next_;
    next_ += RoundUp(bytes);
    return taken;
  }

  absl::Status Fill(const Matched& module, ModuleDelta* delta) {
    const RawModule& raw = *module.raw;
    const auto [in, out] = module.shape;
    LK_RETURN_IF_ERROR(CheckValues(raw));
    if (module.rank > 0) LK_RETURN_IF_ERROR(FillFactors(module, &delta->low_rank));
    if (raw.magnitude) {
      auto* scale = reinterpret_cast<float*>(Take(out * int64_t{sizeof(float)}));
      const std::vector<float> magnitude = ToFloats(raw.magnitude->view);
      LK_RETURN_IF_ERROR(DoraOutScale(base_, module.id, ToFloats(raw.a->view),
                                      ToFloats(raw.b->view), module.rank, raw.scale, magnitude,
                                      scale));
      delta->out_scale = scale;
    }
    if (!HasBias(raw)) return absl::OkStatus();
    auto* bias = reinterpret_cast<float*>(Take(out * int64_t{sizeof(float)}));
    if (raw.base_bias) {  // the base's is added anyway: store the difference
      const std::vector<float> replaced = ToFloats(raw.base_bias->view);
      std::vector<float> of_base(out);
      LK_CHECK(base_.ReadBias(module.id, of_base.data()));
      for (int32_t o = 0; o < out; ++o) bias[o] = replaced[o] - of_base[o];
    }
    if (raw.lora_bias) {
      const std::vector<float> trained = ToFloats(raw.lora_bias->view);
      for (int32_t o = 0; o < out; ++o) bias[o] += raw.scale * trained[o];
    }
    if (!std::all_of(bias, bias + out, [](float value) { return std::isfinite(value); })) {
      return absl::InvalidArgumentError(*module.path + ": its bias overflows");
    }
    delta->bias = bias;
    return absl::OkStatus();
  }

  // Variants with tensors of their own: each linear to its parts, then whether all were used.
  absl::Status LowerModules(Packer* packer, Adapter* adapter) {
    int count = 0;
    for (const Matched& module : matched_) count += module.raw->has_delta() ? 1 : 0;
    std::set<std::string> used_shared;
    ModuleTensors::SharedPairs shared_pairs;
    std::vector<std::string> unused;
    int ordinal = 0;
    for (const Matched& module : matched_) {
      if (!module.raw->has_delta()) continue;
      std::set<std::string> used;
      const ModuleTensors tensors(base_, module.id, ordinal++, count, module.raw->tensors,
                                  raw_.shared, raw_.config, &used, &used_shared, &shared_pairs);
      Lowered lowered;
      LK_RETURN_IF_ERROR(raw_.lower(tensors, &lowered));
      ModuleDelta* delta = &adapter->modules[module.id];
      const float* bias = delta->bias;
      LK_RETURN_IF_ERROR(packer->Module(*module.path, std::move(lowered), delta));
      if (bias != nullptr && delta->bias != nullptr) {
        return absl::UnimplementedError(*module.path + " has two trained biases");
      }
      if (bias != nullptr) delta->bias = bias;
      for (const auto& [name, tensor] : module.raw->tensors) {
        if (!used.contains(name)) unused.push_back(tensor.name);
      }
    }
    for (const auto& [name, tensor] : raw_.shared) {
      if (!used_shared.contains(name)) unused.push_back(tensor.name);
    }
    if (unused.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(
        unused.size(), " tensors have no place in this adapter: ", ListNames(unused)));
  }

  absl::Status FillFactors(const Matched& module, LowRank* low_rank) {
    const auto [in, out] = module.shape;
    const int64_t width = Info(module.dtype).block_bytes;
    low_rank->rank = module.rank;
    low_rank->dtype = module.dtype;
    low_rank->scale = module.raw->scale;
    low_rank->a_stride = RoundUp(in * width) / width;
    low_rank->b_stride = RoundUp(out * width) / width;
    std::byte* a = Take(module.rank * low_rank->a_stride * width);
    std::byte* b = Take(module.rank * low_rank->b_stride * width);
    low_rank->a = a;
    low_rank->b = b;
    LK_RETURN_IF_ERROR(StoreRows(*module.raw->a, module.dtype, low_rank->a_stride, a));
    return StoreColumns(*module.raw->b, module.dtype, low_rank->b_stride, b);
  }

  const RawAdapter& raw_;
  const BaseModel& base_;
  const NormaliseOptions options_;
  const FactorPrecision precision_;
  int32_t vocab_ = 0;  // of the adapter
  std::vector<Matched> matched_;
  Problems problems_;
  std::byte* next_ = nullptr;  // first free byte of the storage
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Adapter>> Normalise(const RawAdapter& raw,
                                                         const BaseModel& base,
                                                         const NormaliseOptions& options) {
  if (raw.gating.experts > 0) return NormaliseGated(raw, base, options);
  return Normaliser(raw, base, options).Run();
}

}  // namespace lorikeet
