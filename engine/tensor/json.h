// JSON from files nobody vouches for: checkpoint headers and configurations.
#pragma once

#include <filesystem>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace lorikeet {

// Strict: a repeated key, nesting deeper than 32, or anything after the value is an error, since
// readers that let them pass disagree on what the file says. `what` names the text in the error.
// DATA_LOSS with the offset.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view what);

// The same for a file of at most 16 MiB. NOT_FOUND when there is none, INVALID_ARGUMENT when it is
// larger.
absl::StatusOr<nlohmann::json> ReadJsonFile(const std::filesystem::path& path);

}  // namespace lorikeet
