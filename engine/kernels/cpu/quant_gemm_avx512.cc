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

// Σ code · q of one group, in `out`. Inlined whatever its size: the sums must stay in registers.
template <typename F, int kRows>
[[gnu::always_inline]] inline void DotGroup(const uint8_t* codes, const int8_t* a, int64_t stride,
                                            __m512i* out) {
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

// Adds one plane of kRows rows times kTiles adjacent tiles: `acc` sums the codes' part, `offset` the
// minima's.
template <typename F, int kTiles, int kRows>
[[gnu::always_inline]] inline void AddPlane(const QuantWeight& w, const QuantRows& x,
                                            int64_t plane_row, int32_t tile,
                                            __m512 (&acc)[kTiles][kRows],
                                            __m512 (&offset)[kTiles][kRows]) {
  constexpr int kSumsPerScale = QuantRows::kGroup / F::kGroup;
  constexpr int kScaleBytes = kLanes * (F::kHalfScales ? 2 : 4);
  const uint8_t* group = w.tile(tile);
  const int64_t tile_bytes = w.tile_bytes();
  const int8_t* a = x.codes + plane_row * x.width;
  const int32_t groups = w.groups();
  const float* scales = x.scales + plane_row * x.groups();
  const float* sums = (kSumsPerScale == 1 ? x.sums32 : x.sums16) + plane_row * groups;
  for (int32_t g = 0; g < groups; ++g, group += F::kGroupBytes, a += F::kGroup) {
    Unroll<kTiles>([&](auto t) LK_INLINE {
      const uint8_t* codes = group + t * tile_bytes;
      __m512i dots[kRows];
      DotGroup<F, kRows>(codes, a, x.width, dots);
      const uint8_t* scale_bytes = codes + F::kVectors * 64;
      const __m512 w_scale = LoadScales<F::kHalfScales>(scale_bytes);
      const __m512 w_min = LoadScales<F::kHalfScales>(scale_bytes + kScaleBytes);
      Unroll<kRows>([&](auto m) LK_INLINE {
        const float a_scale = scales[int64_t{m} * x.groups() + g / kSumsPerScale];
        const __m512 scale = _mm512_mul_ps(w_scale, _mm512_set1_ps(a_scale));
        const __m512 sum = _mm512_set1_ps(sums[int64_t{m} * groups + g]);
        acc[t][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[m]), scale, acc[t][m]);
        offset[t][m] = _mm512_fmadd_ps(w_min, sum, offset[t][m]);
      });
    });
  }
}

// kTiles adjacent tiles for kRows rows: together enough independent sums to hide the latency of
// the products. A value is summed in the same order whatever the block.
template <typename F, int kTiles, int kRows>
void Block(const QuantWeight& w, const QuantRows& x, int32_t row, int32_t tile, Matrix y) {
  __m512 acc[kTiles][kRows], offset[kTiles][kRows];
  Unroll<kTiles * kRows>([&](auto i) LK_INLINE {
    acc[i / kRows][i % kRows] = offset[i / kRows][i % kRows] = _mm512_setzero_ps();
  });
  for (int32_t plane = 0; plane < x.planes; ++plane) {
    AddPlane<F, kTiles, kRows>(w, x, int64_t{plane} * x.rows + row, tile, acc, offset);
  }
  Unroll<kTiles>([&](auto t) LK_INLINE {
    const int32_t column = (tile + t) * kLanes;
    const int32_t columns = w.out - column;
    const __mmask16 keep = columns >= kLanes ? 0xffff : static_cast<__mmask16>((1u << columns) - 1);
    Unroll<kRows>([&](auto m) LK_INLINE {
      _mm512_mask_storeu_ps(y.row(row + m) + column, keep, _mm512_add_ps(acc[t][m], offset[t][m]));
    });
  });
}

template <typename F, int kTiles, int kRows>
void Tiles(const QuantWeight& w, const QuantRows& x, int32_t row, int32_t tile_begin,
           int32_t tile_end, Matrix y) {
  int32_t t = tile_begin;
  for (; t + kTiles <= tile_end; t += kTiles) Block<F, kTiles, kRows>(w, x, row, t, y);
  for (; t < tile_end; ++t) Block<F, 1, kRows>(w, x, row, t, y);
}

template <typename F>
void Gemm(const QuantWeight& w, const QuantRows& x, int32_t row_begin, int32_t row_end,
          int32_t tile_begin, int32_t tile_end, Matrix y) {
  int32_t row = row_begin;
  for (; row + 8 <= row_end; row += 8) Tiles<F, 1, 8>(w, x, row, tile_begin, tile_end, y);
  if (row + 4 <= row_end) {
    Tiles<F, 2, 4>(w, x, row, tile_begin, tile_end, y);
    row += 4;
  }
  switch (row_end - row) {
    case 3: return Tiles<F, 2, 3>(w, x, row, tile_begin, tile_end, y);
    case 2: return Tiles<F, 4, 2>(w, x, row, tile_begin, tile_end, y);
    case 1: return Tiles<F, 4, 1>(w, x, row, tile_begin, tile_end, y);
    default: return;
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
