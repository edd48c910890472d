// What an adapter changes in the two tables of tokens, the input embedding and the head: low-rank
// parts, whole tables, single rows, and a vocabulary of another size than the base's.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/formats/raw_adapter.h"
#include "adapters_cache/pack.h"
#include "engine/api/adapter.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// How many tokens the adapter's tables have, the base's where it has none. INVALID_ARGUMENT: they do
// not agree; RESOURCE_EXHAUSTED: more than Limits::kMaxAddedTokens beyond the base's.
absl::StatusOr<int32_t> VocabularyOf(const RawAdapter& raw, const BaseModel& base);

// Fills the embedding and the head's replaced rows, and the head's low-rank part where `vocab` is not
// the base's. A file may carry copies of the base's tables: what differs from the base in them is
// taken, unless rounding explains all of it. INVALID_ARGUMENT, NOT_FOUND and UNIMPLEMENTED name
// tensor, shape and what the base has.
absl::Status PackTokenTables(const RawAdapter& raw, const BaseModel& base, int32_t vocab,
                             Packer* packer, Adapter* adapter);

}  // namespace lorikeet
