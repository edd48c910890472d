// What an adapter changes outside its linears' deltas and the tables of tokens: norms, replaced
// modules.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/formats/lowered.h"
#include "adapters_cache/formats/raw_adapter.h"
#include "adapters_cache/pack.h"
#include "engine/api/adapter.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// A tensor of floats in float32; one of one dimension is a row. INVALID_ARGUMENT: another shape or
// type, or a value that is not finite.
absl::StatusOr<Matrix2> ReadTensor(const RawTensor& tensor, std::vector<int64_t> shape);

// Fills everything of `adapter` that RawAdapter::parts states, but for the tables of tokens.
// INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED name tensor, shape and what the base has.
absl::Status PackModelParts(const RawAdapter& raw, const BaseModel& base, Packer* packer,
                            Adapter* adapter);

}  // namespace lorikeet
