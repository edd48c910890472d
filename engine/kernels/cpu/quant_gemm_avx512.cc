// Integer products on AVX-512 VNNI: vpdpbusd takes the codes, 4 or 8 bits wide, as they are.
#include <immintrin.h>

#include "engine/base/check.h"
#include "engine/kernels/cpu/quant_weight.h"
#include "engine/kernels/cpu/unroll.h"

namespace lorikeet {
namespace {

constexpr int kLanes = 16;

template <bool kWide_, bool kHalfScales_, int kGroup_>
struct Format {
  static constexpr bool kWide = kWide_;
  static constexpr bool kHalfScales = kHalfScales_;
  static constexpr int kGroup = kGroup_;
  static constexpr int kVectors = kGroup / (kWide ? 4 : 8);
  static constexpr int kGroupBytes = kVectors * 64 + 2 * kLanes * (kHalfScales ? 2 : 4);
};

template <bool kHalf>
__m512 LoadScales(const uint8_t* p) {
  if constexpr (kHalf) {
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
  } else {
    return _mm512_loadu_ps(p);
  }
}

inline __m512i BroadcastQuad(const int8_t* a) {
  return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a));
}

template <typename F, int kRows>
inline void DotGroup(const uint8_t* codes, const int8_t* a, int64_t stride, __m512i out[kRows]) {
  const __m512i mask = _mm512_set1_epi8(0xf);
  Unroll<kRows>([&](auto m) LK_INLINE { out[m] = _mm512_setzero_si512(); });
  Unroll<F::kVectors>([&](auto j) LK_INLINE {
    const __m512i v = _mm512_loadu_si512(codes + 64 * j);
    if constexpr (F::kWide) {
      Unroll<kRows>([&](auto m) LK_INLINE {
        out[m] = _mm512_dpbusd_epi32(out[m], v, BroadcastQuad(a + m * stride + 4 * j));
      });
    } else {
      const __m512i lo = _mm512_and_si512(v, mask);
      const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
      Unroll<kRows>([&](auto m) LK_INLINE {
        const int8_t* quad = a + m * stride + 4 * j;
        out[m] = _mm512_dpbusd_epi32(out[m], lo, BroadcastQuad(quad));
        out[m] = _mm512_dpbusd_epi32(out[m], hi, BroadcastQuad(quad + F::kGroup / 2));
      });
    }
  });
}

template <typename F, int kRows>
void TileRows(const QuantWeight& w, const QuantRows& x, int32_t row, int32_t tile, Matrix y) {
  const uint8_t* group = w.tile(tile);
  const int8_t* a = x.codes + int64_t{row} * x.width;
  constexpr int kSumsPerScale = QuantRows::kGroup / F::kGroup;
  const int32_t groups = w.groups();
  const float* scales = x.scales + int64_t{row} * x.groups();
  const float* sums = (kSumsPerScale == 1 ? x.sums32 : x.sums16) + int64_t{row} * groups;
  __m512 acc[kRows], offset[kRows];
  Unroll<kRows>([&](auto m) LK_INLINE { acc[m] = offset[m] = _mm512_setzero_ps(); });
  for (int32_t g = 0; g < groups; ++g, group += F::kGroupBytes, a += F::kGroup) {
    __m512i dots[kRows];
    DotGroup<F, kRows>(group, a, x.width, dots);
    const uint8_t* scale_bytes = group + F::kVectors * 64;
    const __m512 w_scale = LoadScales<F::kHalfScales>(scale_bytes);
    const __m512 w_min = LoadScales<F::kHalfScales>(scale_bytes + kLanes * (F::kHalfScales ? 2 : 4));
    Unroll<kRows>([&](auto m) LK_INLINE {
      const float a_scale = scales[int64_t{m} * x.groups() + g / kSumsPerScale];
      const __m512 scale = _mm512_mul_ps(w_scale, _mm512_set1_ps(a_scale));
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[m]), scale, acc[m]);
      offset[m] = _mm512_fmadd_ps(w_min, _mm512_set1_ps(sums[int64_t{m} * groups + g]), offset[m]);
    });
  }
  const int32_t column = tile * kLanes;
  const int32_t columns = w.out - column;
  const __mmask16 keep = columns >= kLanes ? 0xffff : static_cast<__mmask16>((1u << columns) - 1);
  Unroll<kRows>([&](auto m) LK_INLINE {
    _mm512_mask_storeu_ps(y.row(row + m) + column, keep, _mm512_add_ps(acc[m], offset[m]));
  });
}

template <typename F>
void Gemm(const QuantWeight& w, const QuantRows& x, int32_t row_begin, int32_t row_end,
          int32_t tile_begin, int32_t tile_end, Matrix y) {
  int32_t row = row_begin;
  for (; row + 8 <= row_end; row += 8) {
    for (int32_t t = tile_begin; t < tile_end; ++t) TileRows<F, 8>(w, x, row, t, y);
  }
  for (int32_t left = row_end - row; left > 0; left = row_end - row) {
    const int32_t step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int32_t t = tile_begin; t < tile_end; ++t) {
      if (step == 4) TileRows<F, 4>(w, x, row, t, y);
      else if (step == 2) TileRows<F, 2>(w, x, row, t, y);
      else TileRows<F, 1>(w, x, row, t, y);
    }
    row += step;
  }
}

}  // namespace

void QuantGemmAvx512(const QuantWeight& w, const QuantRows& x, int32_t row_begin, int32_t row_end,
                     int32_t tile_begin, int32_t tile_end, Matrix y) {
  LK_CHECK(w.lanes == kLanes);
  const auto run = [&](auto format) {
    Gemm<decltype(format)>(w, x, row_begin, row_end, tile_begin, tile_end, y);
  };
  if (!w.wide_codes && w.half_scales) run(Format<false, true, 32>());
  else if (!w.wide_codes) run(Format<false, false, 32>());
  else if (w.half_scales) run(Format<true, true, 32>());
  else if (w.group == 32) run(Format<true, false, 32>());
  else run(Format<true, false, 16>());
}

}  // namespace lorikeet
