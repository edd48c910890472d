// Answers to /v1/completions and /v1/chat/completions: at once, or as server-sent events.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "server/generation.h"
#include "server/http/message.h"
#include "server/openai/request.h"

namespace lorikeet {

// `context` outlives the answer. Errors are GenerationCall::Start's, in OpenAI's names of fields.
absl::StatusOr<std::unique_ptr<HttpAnswer>> StartGeneration(const ServingContext& context,
                                                            const Identity& caller,
                                                            OpenAiRequest request,
                                                            const std::function<void()>& wake);

}  // namespace lorikeet
