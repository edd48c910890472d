// Answers that are in the words of a model's adapter: its tokenizer and chat template.
#pragma once

#include <functional>

#include "server/generation.h"
#include "server/generation_request.h"
#include "server/openai/http_call.h"

namespace lorikeet {

// What `make` gives for the text of `model`: at once where its adapter is in host memory or it has
// none, else an answer that waits for it. `context` outlives the answer.
HttpOutcome WithText(const ServingContext& context, ResolvedModel model,
                     const std::function<void()>& wake,
                     std::function<HttpOutcome(const ModelText& text)> make);

}  // namespace lorikeet
