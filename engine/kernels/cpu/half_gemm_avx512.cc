#include <immintrin.h>

#include "engine/kernels/cpu/half_gemm.h"

namespace lorikeet {
namespace {

template <DType kType>
struct Avx512 {
  using Sum = __m512;
  using Weights = __m512;
  using Element = float;
  static constexpr int kLanes = 16;
  static constexpr int kMostRows = 12;
  static constexpr int kStepBytes = 2 * kLanes;

  static Sum Zero() { return _mm512_setzero_ps(); }
  static Weights Load(const std::byte* p) {
    const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kType == DType::kF16) return _mm512_cvtph_ps(v);
    else return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m512 Input(const float* x, int32_t step) { return _mm512_set1_ps(x[step]); }
  static Sum MultiplyAdd(Weights w, __m512 x, Sum sum) { return _mm512_fmadd_ps(w, x, sum); }
  static void Store(Sum sum, int32_t columns, float* y) {
    _mm512_mask_storeu_ps(y, static_cast<__mmask16>((1u << columns) - 1), sum);
  }
};

}  // namespace

void HalfGemmAvx512(const HalfWeight& w, Matrix x, int32_t tile_begin, int32_t tile_end,
                    Matrix y) {
  if (w.dtype == DType::kF16) HalfGemm<Avx512<DType::kF16>>(w, x, tile_begin, tile_end, y);
  else HalfGemm<Avx512<DType::kBF16>>(w, x, tile_begin, tile_end, y);
}

}  // namespace lorikeet
