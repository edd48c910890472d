// Arrow (Ostapenko et al. 2024; PEFT's LORA with arrow_config): LoRAs that every linear gives weights,
// token by token, by how far its input goes along what each of them reads most.
//
// The LoRAs are PEFT directories of their own (AdapterFiles::experts). The router's file has a pair for each
// linear that nothing reads. With use_gks (GenKnowSub) the last of the LoRAs are general ones.
#pragma once

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

bool IsArrow(const nlohmann::ordered_json& config);

void ParseArrow(const AdapterFiles& files, RawAdapter* raw, Problems* problems);

}  // namespace lorikeet
