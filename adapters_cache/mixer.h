// Weighted sums of adapters for single requests: ΔW = Σ weight · ΔW of each, made once for all
// requests that ask for the same sum and kept while one of them runs.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/adapter_store.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// What of the adapter has no place in a weighted sum; nullptr: all has.
const char* Unsummable(const Adapter& adapter);

struct WeightedAdapter {
  std::string name;
  float weight = 1;
};

// What AdapterMixer makes, of adapters at hand: leases[i] is terms[i]'s. INVALID_ARGUMENT as there.
absl::StatusOr<std::shared_ptr<Adapter>> SumAdapters(const BaseModel& base,
                                                     std::span<const WeightedAdapter> terms,
                                                     std::span<const AdapterLease> leases);

// Low-rank pairs of linears and of the embedding are stacked along the rank in float32, biases added,
// scales of outputs (IA³) added as PEFT's add_weighted_adapter does. Thread-safe.
class AdapterMixer {
 public:
  static constexpr size_t kMaxTerms = 16;
  static constexpr float kMaxWeight = 1000;  // either sign

  // `base` outlives it, and it outlives whatever `store` still has to bring.
  AdapterMixer(const BaseModel& base, AdapterStore* store) : base_(base), store_(store) {}

  using LeaseDone = std::function<void(absl::StatusOr<AdapterLease>)>;

  // Hands `done` the lease of the sum, which pins every adapter in it: at once, on this thread, if
  // all are in host memory or the sum cannot be had, else on the thread that brings the last. A
  // single adapter with weight 1 is that adapter itself. NOT_FOUND and the like as the store;
  // INVALID_ARGUMENT: no term, more than kMaxTerms, a name twice, a weight beyond kMaxWeight, a
  // rank over Limits::kMaxAdapterRank, or an adapter with a part that has no weighted sum (DoRA's
  // scale, a rotation, virtual tokens, replaced rows, ...), named. Copies the factors the first time.
  void AcquireAsync(const std::vector<WeightedAdapter>& terms, LeaseDone done);

 private:
  absl::StatusOr<AdapterLease> Sum(std::span<const WeightedAdapter> terms,
                                   std::vector<AdapterLease> leases);

  const BaseModel& base_;
  AdapterStore* const store_;
  std::mutex mutex_;
  std::map<std::string, std::weak_ptr<const Adapter>> mixed_;  // by the sum's version
};

}  // namespace lorikeet
