// LoRAs with gates -> one Adapter: their pairs one below the other, each rank with its gate.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "adapters_cache/normalise.h"

namespace lorikeet {

// As Normalise, of an X-LoRA. UNIMPLEMENTED: an expert with more than pairs on linears.
absl::StatusOr<std::shared_ptr<const Adapter>> NormaliseGated(const RawAdapter& raw,
                                                              const BaseModel& base,
                                                              const NormaliseOptions& options);

// The same, of a MoLE.
absl::StatusOr<std::shared_ptr<const Adapter>> NormaliseMole(const RawAdapter& raw, const BaseModel& base,
                                                             const NormaliseOptions& options);

// Its experts, each with pairs on linears alone. UNIMPLEMENTED: more.
absl::StatusOr<std::vector<std::shared_ptr<const Adapter>>> NormaliseExperts(const RawAdapter& raw,
                                                                             const BaseModel& base,
                                                                             const NormaliseOptions& options);

// ModuleDelta::rank_gate of the experts' pairs on a linear.
std::vector<int32_t> RankGates(std::span<const std::shared_ptr<const Adapter>> experts, ModuleId module);

}  // namespace lorikeet
