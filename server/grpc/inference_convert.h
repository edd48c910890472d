// The Open Inference Protocol's messages and the server's own types.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "inference/inference.pb.h"
#include "lorikeet/v1/adapters.pb.h"
#include "server/generation.h"

namespace lorikeet {

// INVALID_ARGUMENT: a tensor that is missing, unknown or malformed, or a parameter that
// /v1/completions does not have. `stream`: pieces are wanted, should the call have them.
absl::StatusOr<GenerationInput> ToInput(const inference::ModelInferRequest& request, bool* stream);

// The answer's head: whose it is.
inference::ModelInferResponse ResponseTo(const inference::ModelInferRequest& request);
// Adds "text_output" with `texts`, one a choice.
void SetTexts(const std::vector<std::string>& texts, inference::ModelInferResponse* response);
void SetEnd(const GenerationEnd& end, inference::ModelInferResponse* response);

// INVALID_ARGUMENT unless it is empty: there is one repository.
absl::Status CheckRepository(const std::string& name);
absl::StatusOr<v1::LoadAdapterRequest> ToLoad(const inference::RepositoryModelLoadRequest& request);

}  // namespace lorikeet
