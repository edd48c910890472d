// config.json of a Hugging Face checkpoint -> ModelConfig.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "nlohmann/json.hpp"

namespace lorikeet {

// `generation` is generation_config.json, or null where there is none. An absent key means what
// Transformers makes of it for the family. INVALID_ARGUMENT names key and value: an architecture
// that is not supported, a value out of range, or a setting that would change the mathematics in a
// way the forward pass does not know. `where` begins the message.
absl::StatusOr<ModelConfig> ParseHfConfig(const nlohmann::json& config,
                                          const nlohmann::json& generation, std::string_view where);

}  // namespace lorikeet
