// AdapterHub's bottlenecks on a block's output (the `adapters` library): sequential ones of Houlsby
// et al. (2019) and Pfeiffer et al. (2021), parallel ones of He et al. (2021).
#pragma once

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

// Whether the configuration is AdapterHub's: `config` and `hidden_size`, no peft_type.
bool IsAdapterHub(const nlohmann::ordered_json& config);

// Fills variant, shared (by canonical name), lower_model and warnings; what cannot be served
// (invertible adapters, gating, fusion) goes to `problems`.
void ParseAdapterHub(const AdapterFiles& files, RawAdapter* raw, Problems* problems);

}  // namespace lorikeet
