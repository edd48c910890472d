#include <immintrin.h>

#include "engine/kernels/cpu/half_gemm.h"

namespace lorikeet {
namespace {

template <DType kType>
struct Avx2 {
  using Sum = __m256;
  using Weights = __m256;
  using Element = float;
  static constexpr int kLanes = 8;
  static constexpr int kMostRows = 6;
  static constexpr int kStepBytes = 2 * kLanes;

  static Sum Zero() { return _mm256_setzero_ps(); }
  static Weights Load(const std::byte* p) {
    const __m128i v = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (kType == DType::kF16) return _mm256_cvtph_ps(v);
    else return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static __m256 Input(const float* x, int32_t step) { return _mm256_broadcast_ss(x + step); }
  static Sum MultiplyAdd(Weights w, __m256 x, Sum sum) { return _mm256_fmadd_ps(w, x, sum); }
  static void Store(Sum sum, int32_t columns, float* y) {
    if (columns == kLanes) return _mm256_storeu_ps(y, sum);
    alignas(32) float lane[kLanes];
    _mm256_store_ps(lane, sum);
    std::copy_n(lane, columns, y);
  }
};

}  // namespace

void HalfGemmAvx2(const HalfWeight& w, Matrix x, int32_t tile_begin, int32_t tile_end, Matrix y) {
  if (w.dtype == DType::kF16) HalfGemm<Avx2<DType::kF16>>(w, x, tile_begin, tile_end, y);
  else HalfGemm<Avx2<DType::kBF16>>(w, x, tile_begin, tile_end, y);
}

}  // namespace lorikeet
