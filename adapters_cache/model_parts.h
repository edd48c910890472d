// What an adapter changes outside its linears' deltas: embedding, norms, replaced modules, trained
// rows, the copies of base weights that files carry.
#pragma once

#include "absl/status/status.h"
#include "adapters_cache/formats/raw_adapter.h"
#include "adapters_cache/pack.h"
#include "engine/api/adapter.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// The input embedding's path, and a LoRA's path on it.
inline constexpr char kEmbeddingPath[] = "model.embed_tokens";

// Fills everything of `adapter` that RawAdapter::parts and the embedding's module state.
// INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED name tensor, shape and what the base has.
absl::Status PackModelParts(const RawAdapter& raw, const BaseModel& base, Packer* packer,
                            Adapter* adapter);

// OK unless `copy` ([rows, in] of base rows read by `read`) differs from the base's own by more than
// quantisation explains: then the adapter belongs to another base.
absl::Status CheckBaseCopy(const RawTensor& copy, const std::string& path,
                           const std::function<void(int32_t, int32_t, float*)>& read);

}  // namespace lorikeet
