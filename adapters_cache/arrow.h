// Arrow's LoRAs -> one Adapter whose linears have prototypes.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "adapters_cache/normalise.h"

namespace lorikeet {

// As Normalise, of an adapter with prototype gates. INVALID_ARGUMENT: LoRAs that are not alike, or that change
// other linears than the router has. UNIMPLEMENTED: an expert with more than pairs on linears.
absl::StatusOr<std::shared_ptr<const Adapter>> NormaliseArrow(const RawAdapter& raw, const BaseModel& base,
                                                              const NormaliseOptions& options);

}  // namespace lorikeet
