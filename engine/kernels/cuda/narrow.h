// Float32 to an activation type, on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "engine/base/dtype.h"

namespace lorikeet::cuda {

// dtype: kF32, kF16 or kBF16.
inline void Narrow(const float* from, int64_t count, DType dtype, std::byte* to) {
  if (dtype == DType::kF32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  const bool brain = dtype == DType::kBF16;
  for (int64_t i = 0; i < count; ++i) out[i] = brain ? FloatToBF16(from[i]) : FloatToF16(from[i]);
}

}  // namespace lorikeet::cuda
