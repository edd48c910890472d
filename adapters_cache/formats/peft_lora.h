// PEFT's LORA: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), and the
// trainings that leave plain LoRA files (LoRA+, EVA, MiCA, VeLoRA, MonteCLoRA, ...).
#pragma once

#include <string>
#include <vector>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

// Warns of keys of the configuration that are not known, and reports those that are not served.
void CheckLoraOptions(const nlohmann::ordered_json& config, std::vector<std::string>* warnings,
                      Problems* problems);

// Fills variant, modules, targets and warnings; what cannot be served goes to `problems`.
void ParsePeftLora(const AdapterFiles& files, RawAdapter* raw, Problems* problems);

}  // namespace lorikeet
