// The product of two rows.
#pragma once

#include <cstdint>

namespace lorikeet {

// Eight sums, so that the compiler may vectorise.
inline float Dot(const float* a, const float* b, int32_t n) {
  float sums[8] = {};
  int32_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int32_t k = 0; k < 8; ++k) sums[k] += a[i + k] * b[i + k];
  }
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace lorikeet
