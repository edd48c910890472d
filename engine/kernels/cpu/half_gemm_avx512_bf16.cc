// vdpbf16ps: two bfloat16 products a lane and step, added to a float32 sum.
#include <immintrin.h>

#include <cstring>

#include "engine/kernels/cpu/half_gemm.h"

namespace lorikeet {
namespace {

struct Avx512Bf16 {
  using Sum = __m512;
  using Weights = __m512i;
  using Element = uint16_t;
  static constexpr int kLanes = 16;
  static constexpr int kMostRows = 12;
  static constexpr int kStepBytes = 4 * kLanes;

  static Sum Zero() { return _mm512_setzero_ps(); }
  static Weights Load(const std::byte* p) { return _mm512_load_si512(p); }
  static __m512i Input(const uint16_t* x, int32_t step) {
    int32_t pair;
    std::memcpy(&pair, x + 2 * step, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Sum MultiplyAdd(Weights w, __m512i x, Sum sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  static void Store(Sum sum, int32_t columns, float* y) {
    _mm512_mask_storeu_ps(y, static_cast<__mmask16>((1u << columns) - 1), sum);
  }
};

}  // namespace

void HalfGemmAvx512Bf16(const HalfWeight& w, Matrix x, int32_t tile_begin, int32_t tile_end,
                        Matrix y) {
  HalfGemm<Avx512Bf16>(w, x, tile_begin, tile_end, y);
}

void RoundRowToBF16(const float* x, int32_t width, uint16_t* out) {
  for (int32_t i = 0; i < width; i += 16) {
    const int32_t left = std::min(width - i, 16);
    const auto read = static_cast<__mmask16>((1u << left) - 1);
    const auto write = static_cast<__mmask16>((1u << (left + left % 2)) - 1);
    const auto rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(read, x + i));
    _mm256_mask_storeu_epi16(out + i, write, rounded);
  }
}

}  // namespace lorikeet
