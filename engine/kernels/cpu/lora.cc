#include "engine/kernels/cpu/lora.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "engine/api/limits.h"
#include "engine/base/check.h"
#include "engine/base/dot.h"
#include "engine/kernels/cpu/simd.h"

namespace lorikeet {
namespace {

struct Pair {
  __m256 even;
  __m256 odd;
};

inline Pair Deinterleave(__m256 a, __m256 b) {
  const auto order = [](__m256 v) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
  };
  return {order(_mm256_shuffle_ps(a, b, 0x88)), order(_mm256_shuffle_ps(a, b, 0xdd))};
}

// 16 stored values from element `i` of a row, widened to even and odd halves.
template <DType kType>
inline Pair LoadPair(const std::byte* row, int64_t i) {
  if constexpr (kType == DType::kBF16) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * i));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff0000)))};
  } else if constexpr (kType == DType::kF16) {
    const auto* p = reinterpret_cast<const __m128i*>(row + 2 * i);
    return Deinterleave(_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p + 1)));
  } else {
    const auto* p = reinterpret_cast<const float*>(row) + i;
    return Deinterleave(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
  }
}

// Every result is summed in the same order whatever the block size, so a row's values do not
// depend on the rows beside it.
template <DType kType, int kRanks, int kRows>
void ShrinkBlock(const LowRank& pair, int32_t in, int32_t rank, const float* x, int64_t x_stride,
                 float* t, int64_t t_stride) {
  const int64_t stride_bytes = pair.a_stride * Info(kType).block_bytes;
  const std::byte* a = pair.a + rank * stride_bytes;
  __m256 acc[kRanks][kRows];
  for (auto& row : acc) {
    for (__m256& v : row) v = _mm256_setzero_ps();
  }
  for (int32_t i = 0; i < in; i += 16) {
#pragma GCC unroll 8
    for (int k = 0; k < kRanks; ++k) {
      const Pair w = LoadPair<kType>(a + k * stride_bytes, i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[k][r] = _mm256_fmadd_ps(w.even, _mm256_loadu_ps(x + r * x_stride + i), acc[k][r]);
        acc[k][r] = _mm256_fmadd_ps(w.odd, _mm256_loadu_ps(x + r * x_stride + i + 8), acc[k][r]);
      }
    }
  }
  for (int k = 0; k < kRanks; ++k) {
    for (int r = 0; r < kRows; ++r) t[r * t_stride + rank + k] = pair.scale * simd::Sum(acc[k][r]);
  }
}

template <DType kType, int kRows>
void ShrinkRows(const LowRank& pair, int32_t in, const float* x, int64_t x_stride, float* t,
                int64_t t_stride) {
  constexpr int kRanks = kRows == 1 ? 8 : 4;
  int32_t rank = 0;
  for (; rank + kRanks <= pair.rank; rank += kRanks) {
    ShrinkBlock<kType, kRanks, kRows>(pair, in, rank, x, x_stride, t, t_stride);
  }
  for (; rank < pair.rank; ++rank) {
    ShrinkBlock<kType, 1, kRows>(pair, in, rank, x, x_stride, t, t_stride);
  }
}

template <DType kType>
void Shrink(const LowRank& pair, int32_t in, const float* x, int64_t x_stride, int32_t rows,
            float* t, int64_t t_stride) {
  int32_t r = 0;
  for (; r + 3 <= rows; r += 3) {
    ShrinkRows<kType, 3>(pair, in, x + r * x_stride, x_stride, t + r * t_stride, t_stride);
  }
  for (; r < rows; ++r) {
    ShrinkRows<kType, 1>(pair, in, x + r * x_stride, x_stride, t + r * t_stride, t_stride);
  }
}

void MixRanks(const float* mix, int32_t rank, float* t) {
  static thread_local std::array<float, Limits::kMaxAdapterRank> mixed;
  for (int32_t k = 0; k < rank; ++k) mixed[k] = Dot(mix + int64_t{k} * rank, t, rank);
  std::copy_n(mixed.begin(), rank, t);
}

// Adds even/odd sums of 16 columns, times `scale` where there is one, to y in natural order; only
// `columns` of them when fewer.
inline void AddColumns(float* y, const float* scale, const Pair& sum, int32_t columns) {
  const __m256 low = _mm256_unpacklo_ps(sum.even, sum.odd);
  const __m256 high = _mm256_unpackhi_ps(sum.even, sum.odd);
  __m256 first = _mm256_permute2f128_ps(low, high, 0x20);
  __m256 second = _mm256_permute2f128_ps(low, high, 0x31);
  if (columns >= 16) {
    if (scale) {
      first = _mm256_mul_ps(first, _mm256_loadu_ps(scale));
      second = _mm256_mul_ps(second, _mm256_loadu_ps(scale + 8));
    }
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), first));
    _mm256_storeu_ps(y + 8, _mm256_add_ps(_mm256_loadu_ps(y + 8), second));
    return;
  }
  alignas(32) float lane[16];
  _mm256_store_ps(lane, first);
  _mm256_store_ps(lane + 8, second);
  for (int32_t c = 0; c < columns; ++c) y[c] += scale ? scale[c] * lane[c] : lane[c];
}

// kBlocks blocks of 16 columns of one row.
template <DType kType, int kBlocks>
void ExpandBlock(const LowRank& pair, const float* t, int32_t column, int32_t columns, float* y) {
  const int64_t stride_bytes = pair.b_stride * Info(kType).block_bytes;
  const std::byte* b = pair.b;
  Pair acc[kBlocks];
  for (Pair& p : acc) p.even = p.odd = _mm256_setzero_ps();
  for (int32_t k = 0; k < pair.rank; ++k, b += stride_bytes) {
    const __m256 weight = _mm256_set1_ps(t[k]);
#pragma GCC unroll 4
    for (int i = 0; i < kBlocks; ++i) {
      const Pair w = LoadPair<kType>(b, column + 16 * i);
      acc[i].even = _mm256_fmadd_ps(weight, w.even, acc[i].even);
      acc[i].odd = _mm256_fmadd_ps(weight, w.odd, acc[i].odd);
    }
  }
  for (int i = 0; i < kBlocks; ++i) {
    const int32_t c = column + 16 * i;
    AddColumns(y + c, pair.delta_scale ? pair.delta_scale + c : nullptr, acc[i], columns - 16 * i);
  }
}

template <DType kType>
void Expand(const LowRank& pair, const float* t, int64_t t_stride, int32_t rows,
            int32_t column_begin, int32_t column_end, float* y, int64_t y_stride) {
  for (int32_t r = 0; r < rows; ++r) {
    int32_t c = column_begin;
    for (; c + 64 <= column_end; c += 64) {
      ExpandBlock<kType, 4>(pair, t + r * t_stride, c, 64, y + r * y_stride);
    }
    for (; c < column_end; c += 16) {
      ExpandBlock<kType, 1>(pair, t + r * t_stride, c, column_end - c, y + r * y_stride);
    }
  }
}

template <typename Fn>
void SwitchType(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kBF16: return fn.template operator()<DType::kBF16>();
    case DType::kF16: return fn.template operator()<DType::kF16>();
    case DType::kF32: return fn.template operator()<DType::kF32>();
    default: LK_CHECK_MSG(false, Info(dtype).name);
  }
}

}  // namespace

void ToEvenOdd(const float* x, int32_t width, float* out) {
  int32_t i = 0;
  for (; i + 16 <= width; i += 16) {
    const Pair p = Deinterleave(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8));
    _mm256_storeu_ps(out + i, p.even);
    _mm256_storeu_ps(out + i + 8, p.odd);
  }
  if (i == width) return;
  float tail[16] = {};
  std::memcpy(tail, x + i, (width - i) * sizeof(float));
  ToEvenOdd(tail, 16, out + i);
}

void LoraShrink(const LowRank& pair, int32_t in, const float* x, int64_t x_stride, int32_t rows,
                float* t, int64_t t_stride) {
  SwitchType(pair.dtype, [&]<DType kType>() {
    Shrink<kType>(pair, in, x, x_stride, rows, t, t_stride);
  });
  for (int32_t r = 0; r < rows; ++r, t += t_stride) {
    if (pair.rank_mix) MixRanks(pair.rank_mix, pair.rank, t);
    for (int32_t k = 0; pair.rank_scale && k < pair.rank; ++k) t[k] *= pair.rank_scale[k];
  }
}

void LoraExpand(const LowRank& pair, const float* t, int64_t t_stride, int32_t rows,
                int32_t column_begin, int32_t column_end, float* y, int64_t y_stride) {
  SwitchType(pair.dtype, [&]<DType kType>() {
    Expand<kType>(pair, t, t_stride, rows, column_begin, column_end, y, y_stride);
  });
}

}  // namespace lorikeet
