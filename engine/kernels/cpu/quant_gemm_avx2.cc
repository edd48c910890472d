// Integer products on AVX2: unsigned 4-bit codes times int8 activations through vpmaddubsw.
//
// A product of a 4-bit code and an int8 is at most 15 · 127; vpmaddubsw adds two, and eight of
// those fit an int16, so a group of 32 inputs accumulates in 16 bits and widens once. An 8-bit code
// is two 4-bit planes.
#include <immintrin.h>

#include <type_traits>

#include "engine/base/check.h"
#include "engine/kernels/cpu/quant_weight.h"
#include "engine/kernels/cpu/unroll.h"

namespace lorikeet {
namespace {

static_assert(8 * 2 * 15 * 127 <= 32767);

constexpr int kLanes = 8;

template <bool kWide_, bool kHalfScales_, int kGroup_>
struct Format {
  static constexpr bool kWide = kWide_;
  static constexpr bool kHalfScales = kHalfScales_;
  static constexpr int kGroup = kGroup_;
  static constexpr int kVectors = kGroup / (kWide ? 4 : 8);  // of codes, a group
  static constexpr int kScaleBytes = kLanes * (kHalfScales ? 2 : 4);
  static constexpr int kGroupBytes = kVectors * 32 + 2 * kScaleBytes;
};

template <bool kHalf>
__m256 LoadScales(const uint8_t* p) {
  if constexpr (kHalf) return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  else return _mm256_load_ps(reinterpret_cast<const float*>(p));
}

inline __m256i BroadcastQuad(const int8_t* a) {
  return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(a));
}

// acc += product, now: left alone, the compiler sums all products at the end and spills them.
inline void AddWords(__m256i* acc, __m256i product) {
  *acc = _mm256_add_epi16(*acc, product);
  asm("" : "+x"(*acc));
}

// A block of kTiles tiles by kRows rows: few enough of both that all sums stay in registers. Every
// result is summed in the same order in every block shape, so a row's values do not depend on how
// many rows are beside it.
template <typename F, int kTiles, int kRows>
struct Block {
  static constexpr int kSumsPerScale = QuantRows::kGroup / F::kGroup;

  const QuantWeight& w;
  const QuantRows& x;
  const int32_t row;
  const int32_t tile;

  // Integer dot products of one group, widened to int32 lanes.
  LK_INLINE void DotGroup(const uint8_t* codes, const int8_t* a,
                          __m256i (&out)[kTiles * kRows]) const {
    const __m256i mask = _mm256_set1_epi8(0xf);
    const int64_t tile_bytes = w.tile_bytes();
    __m256i low[kTiles * kRows], high[kTiles * kRows];  // high: the upper plane of wide codes
    Unroll<kTiles * kRows>([&](auto i) LK_INLINE { low[i] = high[i] = _mm256_setzero_si256(); });
    Unroll<F::kVectors>([&](auto j) LK_INLINE {
      constexpr int kHighQuad = F::kWide ? j : j + F::kVectors;
      Unroll<kTiles>([&](auto t) LK_INLINE {
        const auto* tile_codes = reinterpret_cast<const __m256i*>(codes + t * tile_bytes);
        const __m256i v = _mm256_load_si256(tile_codes + j);
        const __m256i lo = _mm256_and_si256(v, mask);
        const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
        Unroll<kRows>([&](auto m) LK_INLINE {
          constexpr int kAt = t * kRows + m;
          const __m256i a_lo = BroadcastQuad(a + m * x.width + 4 * j);
          const __m256i a_hi = F::kWide ? a_lo : BroadcastQuad(a + m * x.width + 4 * kHighQuad);
          AddWords(&low[kAt], _mm256_maddubs_epi16(lo, a_lo));
          AddWords(F::kWide ? &high[kAt] : &low[kAt], _mm256_maddubs_epi16(hi, a_hi));
        });
      });
    });
    Unroll<kTiles * kRows>([&](auto i) LK_INLINE {
      out[i] = _mm256_madd_epi16(low[i], _mm256_set1_epi16(1));
      if constexpr (F::kWide) {
        out[i] = _mm256_add_epi32(out[i], _mm256_madd_epi16(high[i], _mm256_set1_epi16(16)));
      }
    });
  }

  void Run(Matrix y) const {
    __m256 acc[kTiles * kRows];
    Unroll<kTiles * kRows>([&](auto i) LK_INLINE { acc[i] = _mm256_setzero_ps(); });
    for (int32_t plane = 0; plane < x.planes; ++plane) AddPlane(plane, acc);
    Unroll<kTiles * kRows>([&](auto i) LK_INLINE {
      Store(acc[i], tile + i / kRows, y.row(row + i % kRows));
    });
  }

  LK_INLINE void AddPlane(int32_t plane, __m256 (&acc)[kTiles * kRows]) const {
    const int64_t plane_row = int64_t{plane} * x.rows + row;
    const uint8_t* group = w.tile(tile);
    const int8_t* a = x.codes + plane_row * x.width;
    const int32_t groups = w.groups();
    const int64_t scale_stride = x.groups();
    const float* scales = x.scales + plane_row * scale_stride;
    const float* sums = (kSumsPerScale == 1 ? x.sums32 : x.sums16) + plane_row * groups;
    for (int32_t g = 0; g < groups; ++g, group += F::kGroupBytes, a += F::kGroup) {
      __m256i dots[kTiles * kRows];
      DotGroup(group, a, dots);
      Unroll<kTiles>([&](auto t) LK_INLINE {
        const uint8_t* scale_bytes = group + t * w.tile_bytes() + F::kVectors * 32;
        const __m256 w_scale = LoadScales<F::kHalfScales>(scale_bytes);
        const __m256 w_min = LoadScales<F::kHalfScales>(scale_bytes + F::kScaleBytes);
        Unroll<kRows>([&](auto m) LK_INLINE {
          constexpr int kAt = t * kRows + m;
          const float a_scale = scales[m * scale_stride + g / kSumsPerScale];
          const __m256 a_sum = _mm256_set1_ps(sums[int64_t{m} * groups + g]);
          const __m256 scale = _mm256_mul_ps(w_scale, _mm256_set1_ps(a_scale));
          acc[kAt] = _mm256_fmadd_ps(w_min, a_sum, acc[kAt]);
          acc[kAt] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[kAt]), scale, acc[kAt]);
        });
      });
    }
  }

  void Store(__m256 value, int32_t at_tile, float* out) const {
    const int32_t column = at_tile * kLanes;
    const int32_t columns = w.out - column;
    if (columns >= kLanes) {
      _mm256_storeu_ps(out + column, value);
      return;
    }
    alignas(32) float lane[kLanes];
    _mm256_store_ps(lane, value);
    for (int32_t i = 0; i < columns; ++i) out[column + i] = lane[i];
  }
};

template <typename F, int kTiles, int kRows>
void Tiles(const QuantWeight& w, const QuantRows& x, int32_t row, int32_t tile_begin,
           int32_t tile_end, Matrix y) {
  int32_t t = tile_begin;
  for (; t + kTiles <= tile_end; t += kTiles) Block<F, kTiles, kRows>{w, x, row, t}.Run(y);
  for (; t < tile_end; ++t) Block<F, 1, kRows>{w, x, row, t}.Run(y);
}

template <typename F>
void Gemm(const QuantWeight& w, const QuantRows& x, int32_t row_begin, int32_t row_end,
          int32_t tile_begin, int32_t tile_end, Matrix y) {
  constexpr int kMost = F::kWide ? 3 : 4;  // rows: wide codes need two sums each
  int32_t row = row_begin;
  for (; row + kMost <= row_end; row += kMost) {
    Tiles<F, 1, kMost>(w, x, row, tile_begin, tile_end, y);
  }
  switch (row_end - row) {
    case 3: return Tiles<F, 1, 3>(w, x, row, tile_begin, tile_end, y);
    case 2: return Tiles<F, F::kWide ? 1 : 2, 2>(w, x, row, tile_begin, tile_end, y);
    case 1: return Tiles<F, F::kWide ? 2 : 4, 1>(w, x, row, tile_begin, tile_end, y);
    default: return;
  }
}

}  // namespace

void QuantGemmAvx2(const QuantWeight& w, const QuantRows& x, int32_t row_begin, int32_t row_end,
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
