// LoRA on the tensors that hold a linear of all experts of a layer (PEFT's target_parameters, for
// Transformers 5): a pair for each expert's linears.
#pragma once

#include "absl/status/status.h"
#include "adapters_cache/formats/raw_adapter.h"
#include "adapters_cache/pack.h"
#include "engine/api/adapter.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// Fills the experts' modules of `adapter` from RawAdapter::parameters. NOT_FOUND: a layer without
// experts, or a parameter that the configuration asks for and the file does not have.
// INVALID_ARGUMENT names tensor, shape and what the base has.
absl::Status PackExpertParameters(const RawAdapter& raw, const BaseModel& base, Packer* packer,
                                  Adapter* adapter);

}  // namespace lorikeet
