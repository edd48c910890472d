// An adapter's directory on the base model it is for: what a load would make of it and what that takes.
#pragma once

#include <filesystem>
#include <string>

#include "absl/status/statusor.h"

namespace lorikeet {

// Lines for a terminal. `model` as for serving. Errors are those of opening the model and of loading the
// adapter; a dense delta is one line of it.
absl::StatusOr<std::string> InspectOnModel(const std::filesystem::path& directory, const std::filesystem::path& model);

}  // namespace lorikeet
