// GenerationService's messages and the server's own types.
#pragma once

#include "absl/status/statusor.h"
#include "lorikeet/v1/generation.pb.h"
#include "server/generation.h"

namespace lorikeet {

// INVALID_ARGUMENT: no prompt, or a value that no later check sees. The rest is checked by
// GenerationCall::Start.
absl::StatusOr<GenerationInput> ToInput(v1::GenerateRequest request);

// Adds what is new to `response`. REQUIRES: an end in `delta` is OK.
void AppendDelta(const GenerationDelta& delta, v1::GenerateResponse* response);

}  // namespace lorikeet
