// GenerationService's messages and the server's own types.
#pragma once

#include "absl/status/statusor.h"
#include "lorikeet/v1/generation.pb.h"
#include "server/generation.h"

namespace lorikeet {

// INVALID_ARGUMENT: no prompt, or a value that no later check sees. The rest is checked by
// GenerationCall::Start.
absl::StatusOr<GenerationInput> ToInput(v1::GenerateRequest request);
// `hidden_size`: the most dimensions.
absl::StatusOr<GenerationInput> ToInput(const v1::EmbedRequest& request, int32_t hidden_size);

// Adds what is new to `response`. REQUIRES: an end in `delta` is OK.
void AppendDelta(const GenerationDelta& delta, v1::GenerateResponse* response);

void SetUsage(const GenerationEnd& end, v1::Usage* usage);

}  // namespace lorikeet
