// The LoRAs of MLPs among which routers deal out tokens (MixLoRA) -> Adapter::mlp_mixture.
#pragma once

#include "absl/status/status.h"
#include "adapters_cache/normalise.h"

namespace lorikeet {

// Nothing where `raw` has no routers. INVALID_ARGUMENT, NOT_FOUND: routers or an expert that do not fit
// the base.
absl::Status PackMlpMixture(const RawAdapter& raw, const BaseModel& base,
                            const NormaliseOptions& options, Adapter* adapter);

}  // namespace lorikeet
