// The subcommands of `lorikeet`. Each gets the arguments after its name, prints its result on
// standard output, and returns an error as one message for standard error.
#pragma once

#include <span>
#include <string>

#include "absl/status/status.h"

namespace lorikeet {

using Arguments = std::span<const std::string>;

absl::Status RunServe(Arguments args);
absl::Status RunGenerate(Arguments args);
absl::Status RunAdapters(Arguments args);
absl::Status RunBench(Arguments args);
absl::Status RunHealth(Arguments args);
absl::Status RunKeys(Arguments args);

}  // namespace lorikeet
