// GGUF metadata -> ModelConfig.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/tensor/gguf.h"

namespace lorikeet {

// INVALID_ARGUMENT names key and value: an architecture that is not supported, a value out of
// range, or a key of the architecture that is not known (every one of them may change the
// mathematics). `where` begins the message.
absl::StatusOr<ModelConfig> ParseGgufConfig(const GgufFile& file, std::string_view where);

// Whether the file holds q and k rows with each rotary pair side by side, instead of half a head
// apart as Hugging Face has them. Converters do this for architectures that llama.cpp rotates so.
bool GgufPermutesQk(const ModelConfig& config);

// The tensor that divides the rotary frequencies (Llama 3.1), consumed by ParseGgufConfig.
inline constexpr std::string_view kGgufRopeFactors = "rope_freqs.weight";

}  // namespace lorikeet
