// Answers that are in the words of a model's adapter: its tokenizer and chat template.
#pragma once

#include <functional>

#include "server/generation.h"
#include "server/generation_request.h"
#include "server/openai/http_call.h"

namespace lorikeet {

// What `make` gives for the text of `model`: at once where it has no adapter, else an answer that waits
// for it to be in host memory. `context` outlives the answer.
HttpOutcome WithText(const ServingContext& context, ResolvedModel model, const HttpCall& call,
                     std::function<HttpOutcome(const ModelText& text)> make);

}  // namespace lorikeet
