#include "adapters_cache/normalise.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "adapters_cache/arrow.h"
#include "adapters_cache/expert_parameters.h"
#include "adapters_cache/formats/dora.h"
#include "adapters_cache/formats/module_tensors.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/gated.h"
#include "adapters_cache/lowered_embedding.h"
#include "adapters_cache/mlp_mixture.h"
#include "adapters_cache/model_parts.h"
#include "adapters_cache/pack.h"
#include "adapters_cache/store_factors.h"
#include "adapters_cache/token_tables.h"
#include "engine/api/limits.h"
#include "engine/base/check.h"
#include "engine/base/in_parallel.h"
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
  int64_t storage_begin = 0;   // bytes into the adapter's
};

// Hands out the next bytes of a block.
class Taker {
 public:
  explicit Taker(std::byte* next) : next_(next) {}

  template <typename T>
  T* Take(int64_t count) {
    std::byte* taken = next_;
    next_ += RoundUp(count * int64_t{sizeof(T)});
    return reinterpret_cast<T*>(taken);
  }

 private:
  std::byte* next_;
};

class Normaliser {
 public:
  Normaliser(const RawAdapter& raw, const BaseModel& base, const NormaliseOptions& options)
      : raw_(raw), base_(base), options_(options), precision_(options.precision) {}

  absl::StatusOr<std::shared_ptr<const Adapter>> Run() {
    LK_RETURN_IF_ERROR(CheckLayers());
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
    LK_RETURN_IF_ERROR(FillModules(adapter.get()));
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
    if (!options_.on_host && options_.blobs != nullptr) adapter->shared = WhatIsShared(*adapter);
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

  // The factors that linears have in common, with those of other adapters that have the same.
  std::shared_ptr<const Adapter> WhatIsShared(const Adapter& adapter) const {
    std::vector<SharedRows> all;
    const auto add = [&all](const SharedRows& rows) {
      if (std::ranges::find(all, rows) == all.end()) all.push_back(rows);
    };
    for (const ModuleDelta& module : adapter.modules) {
      const LowRank& pair = module.low_rank;
      if (pair.shares_a) add({pair.a, pair.dtype, pair.rank, pair.a_stride});
      if (pair.shares_b) add({pair.b, pair.dtype, pair.rank, pair.b_stride});
    }
    return all.empty() ? nullptr : options_.blobs->Together(std::move(all), adapter.blocks);
  }

  // An adapter of stacked layers is of them alone: others have other keys and values a token.
  absl::Status CheckLayers() const {
    const LayerReplication of_base = base_.layer_replication();
    if (raw_.layer_replication == of_base) return absl::OkStatus();
    if (raw_.layer_replication.empty()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the base model is served with layer_replication ", ToString(of_base),
          ", and the adapter is of the model as it is; serve that without layer_replication"));
    }
    const std::string wanted = ToString(raw_.layer_replication);
    return absl::FailedPreconditionError(absl::StrCat(
        "the adapter's layer_replication is ", wanted, ", the base model is served ",
        of_base.empty() ? "without" : "with " + ToString(of_base), "; start a server with --layer-replication '",
        wanted, "'"));
  }

  // Pairs the file's modules with the base's linears, both ways.
  absl::Status MatchModules() {
    std::set<std::string_view> unknown;
    for (const auto& [path, module] : raw_.modules) {
      if (path != kEmbeddingPath || !raw_.ServesEmbedding(module)) unknown.insert(path);
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
      if (raw_.Lacks(path, it == raw_.modules.end() ? nullptr : &it->second)) missing.push_back(path);
    }
    if (raw_.Lacks(kEmbeddingPath, raw_.Find(kEmbeddingPath))) missing.emplace_back(kEmbeddingPath);
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

  static int64_t StorageBytes(const Matched& module) {
    const int64_t width = Info(module.dtype).block_bytes;
    const int64_t ranks =
        module.rank * (RoundUp(module.shape.in * width) + RoundUp(module.shape.out * width));
    const int64_t vector = RoundUp(module.shape.out * int64_t{sizeof(float)});
    return ranks + (module.raw->magnitude ? vector : 0) + (HasBias(*module.raw) ? vector : 0);
  }

  absl::Status FillModules(Adapter* adapter) {
    int64_t bytes = 0;
    for (Matched& module : matched_) {
      module.storage_begin = bytes;
      bytes += StorageBytes(module);
      adapter->max_rank = std::max(adapter->max_rank, module.rank);
    }
    adapter->storage = AlignedBuffer(bytes);
    adapter->bytes = bytes;
    std::vector<absl::Status> filled(matched_.size());
    const std::vector<size_t> spans = StorageSpans();
    InParallel(std::ssize(spans) - 1, [&](int64_t span) {
      for (size_t i = spans[span]; i < spans[span + 1]; ++i) {
        const Matched& module = matched_[i];
        filled[i] = Fill(module, adapter->storage.data() + module.storage_begin,
                         &adapter->modules[module.id]);
      }
    });
    for (const absl::Status& status : filled) {
      if (!status.ok()) problems_.Add(status);
    }
    return problems_.ToStatus();
  }

  // Where spans of modules begin, and their end: one thread fills a span. Two at work in the same new huge page
  // would both have the kernel clear one. DoRA's norms take far longer than that, however little is kept of them.
  std::vector<size_t> StorageSpans() const {
    constexpr int64_t kSpanBytes = int64_t{4} << 20;
    std::vector<size_t> begins;
    for (size_t i = 0; i < matched_.size(); ++i) {
      const int64_t span = matched_[i].storage_begin / kSpanBytes;
      const bool near = i > 0 && span == matched_[i - 1].storage_begin / kSpanBytes;
      if (!near || matched_[i].raw->magnitude) begins.push_back(i);
    }
    begins.push_back(matched_.size());
    return begins;
  }

  // Any thread. `storage`: StorageBytes of the module.
  absl::Status Fill(const Matched& module, std::byte* storage, ModuleDelta* delta) const {
    const RawModule& raw = *module.raw;
    const int32_t out = module.shape.out;
    Taker taker(storage);
    LK_RETURN_IF_ERROR(CheckValues(raw));
    if (module.rank > 0) LK_RETURN_IF_ERROR(FillFactors(module, &taker, &delta->low_rank));
    if (raw.magnitude) {
      float* scale = taker.Take<float>(out);
      const std::vector<float> magnitude = ToFloats(raw.magnitude->view);
      LK_RETURN_IF_ERROR(DoraOutScale(base_, module.id, ToFloats(raw.a->view),
                                      ToFloats(raw.b->view), module.rank, raw.scale, magnitude,
                                      scale));
      delta->out_scale = scale;
    }
    if (!HasBias(raw)) return absl::OkStatus();
    float* bias = taker.Take<float>(out);
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

  // Variants with tensors of their own: each linear to its parts, then whether all were used. Behind one
  // that failed no linear begins; those before it do, so that the first failure is returned.
  absl::Status LowerModules(Packer* packer, Adapter* adapter) const {
    std::vector<const Matched*> lowered;
    for (const Matched& module : matched_) {
      if (module.raw->has_delta()) lowered.push_back(&module);
    }
    std::vector<absl::Status> statuses(lowered.size());
    std::vector<UsedTensors> used(lowered.size() + 1);
    ModuleTensors::SharedFactors shared_factors;
    // The table comes before all linears.
    const RawModule* table = FindTable();
    const int before = table == nullptr ? 0 : 1, count = static_cast<int>(lowered.size()) + before;
    if (table != nullptr) {
      const EmbeddingAsLinear base(base_);
      const ModuleTensors tensors(base, 0, {0, count}, table->tensors, raw_.shared, raw_.config, &used.back(),
                                  &shared_factors);
      LK_RETURN_IF_ERROR(LowerTable(tensors, packer, adapter));
    }
    std::atomic<int64_t> failed{static_cast<int64_t>(lowered.size())};  // the first that did
    InParallel(static_cast<int64_t>(lowered.size()), [&](int64_t i) {
      if (i > failed) return;
      const Matched& module = *lowered[i];
      const ModuleTensors tensors(base_, module.id, {static_cast<int>(i) + before, count}, module.raw->tensors,
                                  raw_.shared, raw_.config, &used[i], &shared_factors);
      statuses[i] = Lower(module, tensors, packer, &adapter->modules[module.id]);
      if (statuses[i].ok()) return;
      for (int64_t first = failed; i < first && !failed.compare_exchange_weak(first, i);) {
      }
    });
    for (const absl::Status& status : statuses) LK_RETURN_IF_ERROR(status);
    std::vector<const RawModule*> modules;
    for (const Matched* module : lowered) modules.push_back(module->raw);
    if (table != nullptr) modules.push_back(table);
    return CheckAllUsed(modules, used);
  }

  // The input embedding, where it has tensors of a method's own; nullptr: it has none.
  const RawModule* FindTable() const {
    const RawModule* table = raw_.Find(kEmbeddingPath);
    return table == nullptr || table->tensors.empty() ? nullptr : table;
  }

  absl::Status LowerTable(const ModuleTensors& tensors, Packer* packer, Adapter* adapter) const {
    if (vocab_ != base_.vocab_size()) {
      return absl::UnimplementedError(absl::StrCat(raw_.variant, " on ", kEmbeddingPath, " is not served with a vocabulary of ",
                                                   vocab_, " tokens; the base model has ", base_.vocab_size()));
    }
    Lowered lowered;
    LK_RETURN_IF_ERROR(raw_.lower_embedding(tensors, &lowered));
    return PackLoweredEmbedding(base_, std::move(lowered), packer, adapter);
  }

  absl::Status Lower(const Matched& module, const ModuleTensors& tensors, Packer* packer,
                     ModuleDelta* delta) const {
    Lowered lowered;
    LK_RETURN_IF_ERROR(raw_.lower(tensors, &lowered));
    const bool expert = module.id >= ModuleCount(base_.layers());
    for (LoweredPair& pair : lowered.pairs) {
      // What a device takes of shared factors: ranks that are scaled, and not of experts.
      const bool keeps = options_.on_host || (pair.rank_mix.rows == 0 && !expert);
      if (lowered.pairs.size() > 1 || !keeps) Fold(module.shape, &pair);
    }
    const float* bias = delta->bias;
    LK_RETURN_IF_ERROR(packer->Module(*module.path, std::move(lowered), delta));
    if (bias != nullptr && delta->bias != nullptr) {
      return absl::UnimplementedError(*module.path + " has two trained biases");
    }
    if (bias != nullptr) delta->bias = bias;
    return absl::OkStatus();
  }

  absl::Status CheckAllUsed(const std::vector<const RawModule*>& modules,
                            const std::vector<UsedTensors>& used) const {
    std::set<std::string> used_shared;
    std::vector<std::string> unused;
    for (size_t i = 0; i < modules.size(); ++i) {
      used_shared.insert(used[i].shared.begin(), used[i].shared.end());
      for (const auto& [name, tensor] : modules[i]->tensors) {
        if (!used[i].own.contains(name)) unused.push_back(tensor.name);
      }
    }
    for (const auto& [name, tensor] : raw_.shared) {
      if (!used_shared.contains(name)) unused.push_back(tensor.name);
    }
    if (unused.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(
        unused.size(), " tensors have no place in this adapter: ", ListNames(unused)));
  }

  static absl::Status FillFactors(const Matched& module, Taker* taker, LowRank* low_rank) {
    const auto [in, out] = module.shape;
    const int64_t width = Info(module.dtype).block_bytes;
    low_rank->rank = module.rank;
    low_rank->dtype = module.dtype;
    low_rank->scale = module.raw->scale;
    low_rank->a_stride = RoundUp(in * width) / width;
    low_rank->b_stride = RoundUp(out * width) / width;
    auto* a = taker->Take<std::byte>(module.rank * low_rank->a_stride * width);
    auto* b = taker->Take<std::byte>(module.rank * low_rank->b_stride * width);
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
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Adapter>> Normalise(const RawAdapter& raw,
                                                         const BaseModel& base,
                                                         const NormaliseOptions& options) {
  if (raw.gating.experts > 0) return NormaliseGated(raw, base, options);
  if (raw.prototype_gates.experts > 0) {
    return raw.prototype_gates.magnitudes ? NormaliseArrow(raw, base, options) : NormaliseMole(raw, base, options);
  }
  return Normaliser(raw, base, options).Run();
}

}  // namespace lorikeet
