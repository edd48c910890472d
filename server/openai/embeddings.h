// Answers to /v1/embeddings.
#pragma once

#include <functional>
#include <memory>

#include "server/generation.h"
#include "server/http/message.h"
#include "server/openai/request.h"

namespace lorikeet {

// `context` outlives the answer.
std::unique_ptr<HttpAnswer> StartEmbeddings(const ServingContext& context, Caller caller,
                                            EmbeddingRequest request, std::function<void()> wake);

}  // namespace lorikeet
