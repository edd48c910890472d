// Stored values to float32, vectorised where it matters. Same results as Dequantize().
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/base/dtype.h"

namespace lorikeet {

void Widen(DType dtype, const std::byte* src, int64_t elements, float* dst);

}  // namespace lorikeet
