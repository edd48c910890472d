// JSON nobody vouches for: checkpoint headers, configurations, requests.
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

struct JsonLimits {
  size_t depth = 64;      // of containers
  size_t members = 4096;  // of one object: finding a repeated key takes a look at all of them
};

// The same for a client's text, keeping the order of members. INVALID_ARGUMENT with the offset.
absl::StatusOr<nlohmann::ordered_json> ParseOrderedJson(std::string_view text,
                                                        const JsonLimits& limits = {});

// The same for a file of at most 16 MiB. NOT_FOUND when there is none, INVALID_ARGUMENT when it is
// larger.
absl::StatusOr<nlohmann::json> ReadJsonFile(const std::filesystem::path& path);

}  // namespace lorikeet
