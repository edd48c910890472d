// Rows of a pair as float32, for those who make other weights of them.
#pragma once

#include <cstdint>

#include "engine/api/adapter.h"

namespace lorikeet {

// The first `width` elements of row k of a.
void ReadA(const LowRank& pair, int32_t k, int64_t width, float* out);
// The same of b, with the pair's scale and what stands beside a and b in it.
void ReadB(const LowRank& pair, int32_t k, int64_t width, float* out);

}  // namespace lorikeet
