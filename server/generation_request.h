// What a front asks for, checked and turned into what the engine takes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/request.h"
#include "server/generation.h"

namespace lorikeet {

struct ResolvedModel {
  std::vector<WeightedAdapter> terms;  // summed; none: the base model
  std::string name;                    // theirs, joined by "+"
  std::string version;                 // what the version of the only one must begin with
};

// NOT_FOUND names both, unless `version` begins with what `model` asks for.
absl::Status CheckVersion(const ResolvedModel& model, std::string_view version);

// `model`: empty or the base model's name; an adapter's "name", "base:name", or either followed by
// "@version", at least the first 8 digits of the version it must have. NOT_FOUND otherwise: the
// base model never answers for an adapter, and what the caller does not see is not there.
absl::StatusOr<ResolvedModel> ResolveModel(const ServingContext& context, const Identity& caller,
                                           std::string_view model);

// The weighted sum that `input` asks for, or its model. INVALID_ARGUMENT: both are set.
absl::StatusOr<ResolvedModel> Resolve(const ServingContext& context, const Identity& caller,
                                      const GenerationInput& input);

// The prompt of a conversation, which holds its special tokens. INVALID_ARGUMENT: the model has no
// template, or it refuses.
absl::StatusOr<std::string> RenderChat(const ServingContext& context, const ModelText& text,
                                       ChatRequest& request);

// INVALID_ARGUMENT names the first id that is not in [0, vocab_size), as what[i].
absl::Status ValidateTokenIds(const std::vector<int32_t>& ids, const char* what,
                              int32_t vocab_size);

// What is wrong in any vocabulary, so that nothing is fetched for it. INVALID_ARGUMENT names the
// field, the value and the bound.
absl::Status ValidateInput(const GenerationInput& input);

// Of a valid input, without an adapter and a tenant. INVALID_ARGUMENT names the field, the value and
// the bound. Moves the prompt out of `input`.
absl::StatusOr<Request> BuildRequest(const ServingContext& context, const ModelText& text,
                                     GenerationInput& input);

}  // namespace lorikeet
