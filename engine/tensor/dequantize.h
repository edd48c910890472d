// The meaning of each DType: stored values to float. Portable reference code, exact as the GGUF
// block formats define it; the CPU backend's fast kernels are checked against it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/base/dtype.h"

namespace lorikeet {

// Writes `elements` floats. REQUIRES: elements is a multiple of the type's block.
void Dequantize(DType dtype, const std::byte* src, int64_t elements, float* dst);

}  // namespace lorikeet
