#include "engine/kernels/cpu/widen.h"

#include <immintrin.h>

#include <cstring>

#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

void WidenBF16(const std::byte* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + 2 * i));
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16);
    _mm256_storeu_ps(dst + i, _mm256_castsi256_ps(bits));
  }
  Dequantize(DType::kBF16, src + 2 * i, n - i, dst + i);
}

void WidenF16(const std::byte* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + 2 * i));
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(v));
  }
  Dequantize(DType::kF16, src + 2 * i, n - i, dst + i);
}

}  // namespace

void Widen(DType dtype, const std::byte* src, int64_t elements, float* dst) {
  switch (dtype) {
    case DType::kBF16: return WidenBF16(src, elements, dst);
    case DType::kF16: return WidenF16(src, elements, dst);
    default: return Dequantize(dtype, src, elements, dst);
  }
}

}  // namespace lorikeet
