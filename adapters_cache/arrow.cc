#include "adapters_cache/arrow.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/gated.h"
#include "adapters_cache/low_rank_rows.h"
#include "adapters_cache/pack.h"
#include "engine/base/in_parallel.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

using Experts = std::span<const std::shared_ptr<const Adapter>>;

// A pair without its scale, both factors by rank.
struct Factors {
  Matrix2 a;  // [rank, in]
  Matrix2 b;  // [rank, out]
};

Factors Read(LowRank pair, LinearShape shape) {
  pair.scale = 1;
  Factors factors{Matrix2(pair.rank, shape.in), Matrix2(pair.rank, shape.out)};
  for (int32_t k = 0; k < pair.rank; ++k) {
    ReadA(pair, k, shape.in, factors.a.row(k));
    ReadB(pair, k, shape.out, factors.b.row(k));
  }
  return factors;
}

void Add(float factor, const Matrix2& from, Matrix2* to) {
  for (size_t i = 0; i < to->values.size(); ++i) to->values[i] += factor * from.values[i];
}

// The first right singular vector v of B A: with C the root of Bᵀ B, that of C A, which is (C A)ᵀ u for the
// first vector u of C A Aᵀ C. PEFT iterates v ← M v / (|M v| + 1e-8), M = (B A)ᵀ B A, which ends a little
// shorter than 1. `second`: M's second eigenvalue over its first.
absl::StatusOr<Matrix2> Prototype(const Factors& factors, float* second) {
  LK_ASSIGN_OR_RETURN(Svd gram, SingularValues(MultiplyTransposed(factors.b, factors.b)));
  Matrix2 root = gram.u;
  for (float& s : gram.s) s = std::sqrt(s);
  ScaleColumns(gram.s, &root);
  root = MultiplyTransposed(root, gram.u);
  const Matrix2 reads = Multiply(root, factors.a);
  LK_ASSIGN_OR_RETURN(const Svd svd, SingularValues(MultiplyTransposed(reads, reads)));
  Matrix2 prototype = Multiply(Transpose(ColumnsOf(svd.u, 0, 1)), reads);
  const double largest = svd.s[0];  // of M
  if (!std::isfinite(largest)) return absl::InvalidArgumentError("its LoRAs overflow");
  *second = svd.s.size() > 1 && largest > 0 ? svd.s[1] / svd.s[0] : 0;
  constexpr double kGuard = 1e-8;
  Scale(largest > kGuard ? (1 - kGuard / largest) / std::sqrt(largest) : 0, &prototype);
  return prototype;
}

class ArrowStack {
 public:
  // The last `general` of the experts are the general ones.
  ArrowStack(const RawAdapter& raw, const BaseModel& base, Experts experts)
      : raw_(raw),
        base_(base),
        tasks_(experts.first(raw.prototype_gates.experts)),
        general_(experts.subspan(tasks_.size())) {}

  absl::Status Run(const NormaliseOptions& options, Adapter* adapter) const {
    Packer packer(options, adapter);
    const std::vector<ModuleId> modules = base_.modules();
    std::vector<absl::Status> statuses(modules.size());
    std::vector<float> seconds(modules.size());
    InParallel(static_cast<int64_t>(modules.size()), [&](int64_t i) {
      const ModuleId m = modules[i];
      const absl::Status status = Linear(m, &packer, &adapter->modules[m], &seconds[i]);
      if (status.ok()) return;
      statuses[i] = absl::Status(status.code(), absl::StrCat(base_.path(m), ": ", status.message()));
    });
    for (const absl::Status& status : statuses) LK_RETURN_IF_ERROR(status);
    if (options.warnings != nullptr) WarnOfSlowIterations(modules, seconds, options.warnings);
    return absl::OkStatus();
  }

 private:
  // Where PEFT's own prototypes are not yet at what they approach.
  void WarnOfSlowIterations(const std::vector<ModuleId>& modules, const std::vector<float>& seconds,
                            std::vector<std::string>* warnings) const {
    constexpr int kPeftsIterations = 15;
    constexpr float kFar = 1e-3f;
    const auto off = [](float second) { return std::pow(second, kPeftsIterations); };
    const auto far = std::ranges::count_if(seconds, [&](float second) { return off(second) > kFar; });
    if (far == 0) return;
    const auto worst = std::ranges::max_element(seconds);
    warnings->push_back(absl::StrCat(
        "in ", far, " linears a LoRA's two largest singular values are so close that PEFT's prototypes, ",
        kPeftsIterations, " iterations from a random start, differ from load to load, by up to about ", off(*worst),
        " in ", base_.path(modules[worst - seconds.begin()]), "; the vectors they approach are used"));
  }

  // `second`: the largest of its LoRAs'.
  absl::Status Linear(ModuleId m, Packer* packer, ModuleDelta* delta, float* second) const {
    LK_RETURN_IF_ERROR(CheckAlike(m));
    const LowRank& first = tasks_[0]->module(m).low_rank;
    if (first.rank == 0) return absl::OkStatus();
    const LinearShape shape = base_.shape(m);
    Factors mean{Matrix2(first.rank, shape.in), Matrix2(first.rank, shape.out)};
    for (const auto& adapter : general_) {
      const Factors factors = Read(adapter->module(m).low_rank, shape);
      Add(1.0f / static_cast<float>(general_.size()), factors.a, &mean.a);
      Add(1.0f / static_cast<float>(general_.size()), factors.b, &mean.b);
    }
    Lowered lowered;
    std::vector<float> prototypes;
    for (const auto& adapter : tasks_) {
      Factors factors = Read(adapter->module(m).low_rank, shape);
      Add(-1, mean.a, &factors.a);
      Add(-1, mean.b, &factors.b);
      float of_this = 0;
      LK_ASSIGN_OR_RETURN(const Matrix2 prototype, Prototype(factors, &of_this));
      *second = std::max(*second, of_this);
      prototypes.insert(prototypes.end(), prototype.values.begin(), prototype.values.end());
      Matrix2 b = Transpose(factors.b);
      Scale(adapter->module(m).low_rank.scale, &b);
      lowered.pairs.push_back({.a = std::move(factors.a), .b = std::move(b)});
    }
    LK_RETURN_IF_ERROR(packer->Module(base_.path(m), std::move(lowered), delta));
    delta->rank_gate = packer->Integers(RankGates(tasks_, m));
    delta->prototypes = packer->Floats(prototypes);
    return absl::OkStatus();
  }

  // PEFT stacks their factors, on every linear that the router has.
  absl::Status CheckAlike(ModuleId m) const {
    const int32_t rank = tasks_[0]->module(m).low_rank.rank;
    for (const Experts& experts : {tasks_, general_}) {
      for (const auto& expert : experts) {
        const int32_t other = expert->module(m).low_rank.rank;
        if (other == rank) continue;
        return absl::InvalidArgumentError(
            absl::StrCat("its LoRAs have ranks ", rank, " and ", other, "; Arrow's are alike"));
      }
    }
    if (raw_.targets(base_.path(m)) == (rank > 0)) return absl::OkStatus();
    return absl::InvalidArgumentError(rank > 0 ? "the router's target_modules leave it out, its LoRAs do not"
                                               : "the router's target_modules ask for it, its LoRAs have none");
  }

  const RawAdapter& raw_;
  const BaseModel& base_;
  const Experts tasks_;
  const Experts general_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Adapter>> NormaliseArrow(const RawAdapter& raw, const BaseModel& base,
                                                              const NormaliseOptions& options) {
  LK_ASSIGN_OR_RETURN(const auto experts, NormaliseExperts(raw, base, options));
  auto adapter = std::make_shared<Adapter>();
  adapter->version = raw.version;
  adapter->variant = raw.variant;
  adapter->text = options.text;
  adapter->prototype_gates = raw.prototype_gates;
  size_t modules = 0;
  for (const auto& expert : experts) modules = std::max(modules, expert->modules.size());
  adapter->modules.resize(ModuleCount(base.layers(), base.experts()));
  LK_RETURN_IF_ERROR(ArrowStack(raw, base, experts).Run(options, adapter.get()));
  adapter->modules.resize(modules);
  return std::shared_ptr<const Adapter>(std::move(adapter));
}

}  // namespace lorikeet
