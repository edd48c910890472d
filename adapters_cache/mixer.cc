#include "adapters_cache/mixer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "adapters_cache/low_rank_rows.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"

namespace lorikeet {

const char* Unsummable(const Adapter& adapter) {
  if (adapter.vocab > 0) return "a vocabulary of its own";
  if (adapter.gated()) return "gates per token";
  if (adapter.mlp_mixture.chosen > 0) return "routers over its LoRAs";
  if (adapter.virtual_tokens.count > 0) return "virtual tokens";
  if (!adapter.norms.empty()) return "norms of its own";
  if (!adapter.prompt_attention.empty()) return "attention to a prompt of its own";
  if (!adapter.bottlenecks.empty()) return "bottlenecks";
  if (!adapter.invocation_tokens.empty()) return "an invocation that switches it on";
  if (adapter.embedding.out_scale || adapter.embedding.rows.rows.data) {
    return "a scaled or replaced embedding";
  }
  for (const ModuleDelta& module : adapter.modules) {
    if (module.out_scale) return "an output scale (as DoRA has)";
    if (module.input_rotation.block > 1 || module.output_rotation.cross) return "a rotation";
    if (module.rows.rows.data) return "replaced rows";
    if (module.adds()) return "a structured delta";
  }
  return nullptr;
}

namespace {

std::string VersionOf(std::span<const WeightedAdapter> terms, std::span<const AdapterLease> leases) {
  std::string version;
  for (size_t i = 0; i < terms.size(); ++i) {
    absl::StrAppendFormat(&version, "%s%s*%.9g", i == 0 ? "" : "+",
                          std::string(leases[i].version()), terms[i].weight);
  }
  return version;
}

class Mix {
 public:
  Mix(const BaseModel& base, std::span<const WeightedAdapter> terms,
      std::span<const AdapterLease> leases)
      : base_(base), terms_(terms), leases_(leases), adapter_(std::make_shared<Adapter>()) {}

  absl::StatusOr<std::shared_ptr<Adapter>> Run() {
    for (size_t i = 0; i < terms_.size(); ++i) {
      const char* why = Unsummable(At(i));
      if (why == nullptr) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("adapter '", terms_[i].name, "' cannot be part of a mixture: it has ", why));
    }
    adapter_->version = VersionOf(terms_, leases_);
    adapter_->variant = "mixture";
    size_t modules = 0;
    for (const AdapterLease& lease : leases_) modules = std::max(modules, lease.get()->modules.size());
    adapter_->modules.resize(modules);
    for (const ModuleId m : base_.modules()) {
      if (m < static_cast<ModuleId>(modules)) LK_RETURN_IF_ERROR(Module(m));
    }
    LK_RETURN_IF_ERROR(Stack([](const Adapter& a) -> const LowRank& { return a.embedding.low_rank; },
                             {INT32_MAX, INT32_MAX}, &adapter_->embedding.low_rank));
    for (const AdapterLease& lease : leases_) adapter_->cacheable &= lease.get()->cacheable;
    // Theirs where they speak alike, else the base's.
    adapter_->text = At(0).text;
    for (const AdapterLease& lease : leases_) {
      if (lease.get()->text != adapter_->text) adapter_->text = nullptr;
    }
    return std::move(adapter_);
  }

 private:
  const Adapter& At(size_t i) const { return *leases_[i].get(); }

  float* Take(int64_t floats) {
    auto block = std::make_shared<AlignedBuffer>(floats * sizeof(float));
    float* data = block->as<float>();
    adapter_->bytes += static_cast<int64_t>(block->size());
    adapter_->blocks.push_back(std::move(block));
    return data;
  }

  absl::Status Module(ModuleId m) {
    const auto [in, out] = base_.shape(m);
    ModuleDelta& delta = adapter_->modules[m];
    LK_RETURN_IF_ERROR(
        Stack([m](const Adapter& a) -> const LowRank& { return a.module(m).low_rank; }, {in, out},
              &delta.low_rank));
    delta.bias = Sum(out, [m](const Adapter& a) { return a.module(m).bias; });
    LK_RETURN_IF_ERROR(SumScales(
        m, out, [m](const Adapter& a) { return a.module(m).output_rotation.scale; },
        &delta.output_rotation.scale));
    LK_RETURN_IF_ERROR(
        SumScales(m, in, [m](const Adapter& a) { return a.module(m).input_rotation.r; },
                  &delta.input_rotation.r));
    delta.input_rotation.block = delta.input_rotation.r != nullptr ? 1 : 0;
    return absl::OkStatus();
  }

  // IA³'s scales, as PEFT adds them: of all adapters or of none.
  template <typename VectorOf>
  absl::Status SumScales(ModuleId m, int32_t width, const VectorOf& scale_of, const float** out) {
    const auto scaled = std::count_if(leases_.begin(), leases_.end(), [&](const auto& lease) {
      return scale_of(*lease.get()) != nullptr;
    });
    if (scaled != 0 && scaled != static_cast<int64_t>(leases_.size())) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the mixture's adapters do not all scale ", base_.path(m)));
    }
    *out = Sum(width, scale_of);
    return absl::OkStatus();
  }

  // The pairs one below the other, weight and scale in the second factor. What lies behind `most` of
  // their rows is others'.
  template <typename PairOf>
  absl::Status Stack(const PairOf& pair_of, LinearShape most, LowRank* out) {
    const auto width_a = [most](const LowRank& p) { return std::min(p.a_stride, Padded(most.in)); };
    const auto width_b = [most](const LowRank& p) { return std::min(p.b_stride, Padded(most.out)); };
    int64_t rank = 0;
    for (size_t i = 0; i < terms_.size(); ++i) {
      const LowRank& pair = pair_of(At(i));
      rank += pair.rank;
      if (pair.rank == 0) continue;
      out->a_stride = std::max(out->a_stride, Padded(width_a(pair)));
      out->b_stride = std::max(out->b_stride, Padded(width_b(pair)));
    }
    if (rank > Limits::kMaxAdapterRank) {
      return absl::InvalidArgumentError(absl::StrCat("the mixture has rank ", rank, "; at most ",
                                                     Limits::kMaxAdapterRank));
    }
    if (rank == 0) return absl::OkStatus();
    out->rank = static_cast<int32_t>(rank);
    out->dtype = DType::kF32;
    adapter_->max_rank = std::max(adapter_->max_rank, out->rank);
    float* a = Take(rank * out->a_stride);
    float* b = Take(rank * out->b_stride);
    out->a = reinterpret_cast<const std::byte*>(a);
    out->b = reinterpret_cast<const std::byte*>(b);
    for (size_t i = 0; i < terms_.size(); ++i) {
      const LowRank& pair = pair_of(At(i));
      for (int32_t k = 0; k < pair.rank; ++k, a += out->a_stride, b += out->b_stride) {
        ReadA(pair, k, width_a(pair), a);
        ReadB(pair, k, width_b(pair), b);
        for (int64_t o = 0; o < width_b(pair); ++o) b[o] *= terms_[i].weight;
      }
    }
    return absl::OkStatus();
  }

  static int64_t Padded(int64_t stride) { return (stride + 15) / 16 * 16; }

  // Σ weight · vector of `width`; nullptr when no adapter has one.
  template <typename VectorOf>
  const float* Sum(int32_t width, const VectorOf& vector_of) {
    float* sum = nullptr;
    for (size_t i = 0; i < terms_.size(); ++i) {
      const float* vector = vector_of(At(i));
      if (vector == nullptr) continue;
      if (sum == nullptr) sum = Take(width);
      for (int32_t o = 0; o < width; ++o) sum[o] += terms_[i].weight * vector[o];
    }
    return sum;
  }

  const BaseModel& base_;
  const std::span<const WeightedAdapter> terms_;
  const std::span<const AdapterLease> leases_;
  std::shared_ptr<Adapter> adapter_;
};

absl::Status ValidateTerms(std::span<const WeightedAdapter> terms) {
  if (terms.empty() || terms.size() > AdapterMixer::kMaxTerms) {
    return absl::InvalidArgumentError(absl::StrCat("adapters: ", terms.size(), " of them; 1 to ",
                                                   AdapterMixer::kMaxTerms));
  }
  std::set<std::string> names;
  for (const WeightedAdapter& term : terms) {
    if (!(std::abs(term.weight) <= AdapterMixer::kMaxWeight)) {  // or it is not a number
      return absl::InvalidArgumentError(
          absl::StrCat("adapters: the weight of '", term.name, "' is ", term.weight,
                       "; it must be between ", -AdapterMixer::kMaxWeight, " and ",
                       AdapterMixer::kMaxWeight));
    }
    if (!names.insert(term.name).second) {
      return absl::InvalidArgumentError(absl::StrCat("adapters: '", term.name, "' is given twice"));
    }
  }
  return absl::OkStatus();
}

// The leases of a sum as they come.
struct Gathered {
  Gathered(std::vector<WeightedAdapter> all, AdapterMixer::LeaseDone when_done)
      : terms(std::move(all)), done(std::move(when_done)), leases(terms.size()),
        missing(terms.size()) {}

  // True for the last one; from then on it is the caller's alone.
  bool Take(size_t i, absl::StatusOr<AdapterLease> lease) {
    std::lock_guard lock(mutex);
    if (lease.ok()) {
      leases[i] = *std::move(lease);
    } else {
      status.Update(lease.status());
    }
    return --missing == 0;
  }

  const std::vector<WeightedAdapter> terms;
  const AdapterMixer::LeaseDone done;
  std::mutex mutex;
  std::vector<AdapterLease> leases;
  size_t missing;
  absl::Status status;  // the first error
};

}  // namespace

absl::StatusOr<std::shared_ptr<Adapter>> SumAdapters(const BaseModel& base,
                                                     std::span<const WeightedAdapter> terms,
                                                     std::span<const AdapterLease> leases) {
  return Mix(base, terms, leases).Run();
}

void AdapterMixer::AcquireAsync(const std::vector<WeightedAdapter>& terms, LeaseDone done) {
  if (const absl::Status status = ValidateTerms(terms); !status.ok()) return done(status);
  auto gathered = std::make_shared<Gathered>(terms, std::move(done));
  for (size_t i = 0; i < terms.size(); ++i) {
    store_->AcquireAsync(terms[i].name, [this, gathered, i](absl::StatusOr<AdapterLease> lease) {
      if (!gathered->Take(i, std::move(lease))) return;
      if (!gathered->status.ok()) return gathered->done(gathered->status);
      gathered->done(Sum(gathered->terms, std::move(gathered->leases)));
    });
  }
}

absl::StatusOr<AdapterLease> AdapterMixer::Sum(std::span<const WeightedAdapter> terms,
                                               std::vector<AdapterLease> leases) {
  if (terms.size() == 1 && terms[0].weight == 1) return leases[0];
  const std::string version = VersionOf(terms, leases);
  std::shared_ptr<const Adapter> mixed;
  {
    std::lock_guard lock(mutex_);
    std::erase_if(mixed_, [](const auto& entry) { return entry.second.expired(); });
    if (const auto known = mixed_.find(version); known != mixed_.end()) mixed = known->second.lock();
  }
  const std::string tenant = leases.front().tenant();
  if (mixed != nullptr) return AdapterLease(mixed, mixed, tenant);
  LK_ASSIGN_OR_RETURN(std::shared_ptr<const Adapter> made, SumAdapters(base_, terms, leases));
  const Adapter* adapter = made.get();
  mixed = std::shared_ptr<const Adapter>(
      adapter, [made = std::move(made), leases = std::move(leases)](const Adapter*) mutable {
        // Here and not with the deleter, which lives on while `mixed_` looks at it.
        made.reset();
        leases.clear();
      });
  std::lock_guard lock(mutex_);
  mixed_[version] = mixed;
  return AdapterLease(mixed, mixed, tenant);
}

}  // namespace lorikeet
