// LoRAs with gates (X-LoRA) -> one Adapter: their pairs one below the other, each rank with its gate.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "adapters_cache/normalise.h"

namespace lorikeet {

// As Normalise, of an adapter with experts. UNIMPLEMENTED: an expert with more than pairs on linears.
absl::StatusOr<std::shared_ptr<const Adapter>> NormaliseGated(const RawAdapter& raw,
                                                              const BaseModel& base,
                                                              const NormaliseOptions& options);

}  // namespace lorikeet
