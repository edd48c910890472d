#include "adapters_cache/store_factors.h"

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

// Rows that are transposed together: few enough to stay in the nearest cache, enough for whole lines.
constexpr int64_t kRowsAtOnce = 64;

// Magnitudes below float16's normal ones, k · 2^-24, in bfloat16.
__m128i NarrowSmall(__m128i magnitudes) {
  const auto narrow = [](__m128i k) {
    const __m128i bits = _mm_castps_si128(_mm_mul_ps(_mm_cvtepi32_ps(k), _mm_set1_ps(0x1p-24f)));
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    return _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd), 16);
  };
  const __m128i zero = _mm_setzero_si128();
  return _mm_packs_epi32(narrow(_mm_unpacklo_epi16(magnitudes, zero)), narrow(_mm_unpackhi_epi16(magnitudes, zero)));
}

// Eight finite float16 to the nearest bfloat16, which all have: three bits of the fraction fewer, and 112 more in
// the exponent.
__m128i NarrowHalves(__m128i halves) {
  const __m128i sign = _mm_and_si128(halves, _mm_set1_epi16(INT16_MIN));
  const __m128i magnitude = _mm_xor_si128(halves, sign);
  const __m128i odd = _mm_and_si128(_mm_srli_epi16(magnitude, 3), _mm_set1_epi16(1));
  const __m128i rounded = _mm_srli_epi16(_mm_add_epi16(_mm_add_epi16(magnitude, _mm_set1_epi16(3)), odd), 3);
  __m128i narrow = _mm_add_epi16(rounded, _mm_set1_epi16(112 << 7));
  const __m128i is_small = _mm_cmplt_epi16(magnitude, _mm_set1_epi16(1 << 10));
  if (_mm_movemask_epi8(is_small) != 0) {
    narrow = _mm_or_si128(_mm_andnot_si128(is_small, narrow), _mm_and_si128(is_small, NarrowSmall(magnitude)));
  }
  return _mm_or_si128(sign, narrow);
}

// The same of all whole sixteens; returns how many values they are.
__attribute__((target("avx2"))) int64_t NarrowSixteens(const std::byte* from, int64_t count, std::byte* to) {
  const __m256i magnitudes = _mm256_set1_epi16(INT16_MAX), smallest = _mm256_set1_epi16(1 << 10);
  const __m256i one = _mm256_set1_epi16(1), three = _mm256_set1_epi16(3), bias = _mm256_set1_epi16(112 << 7);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * i));
    const __m256i magnitude = _mm256_and_si256(halves, magnitudes);
    if (_mm256_movemask_epi8(_mm256_cmpgt_epi16(smallest, magnitude)) != 0) {
      for (int half = 0; half < 32; half += 16) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i + half));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i + half), NarrowHalves(eight));
      }
      continue;
    }
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(magnitude, 3), one);
    const __m256i rounded = _mm256_srli_epi16(_mm256_add_epi16(_mm256_add_epi16(magnitude, three), odd), 3);
    const __m256i sign = _mm256_xor_si256(halves, magnitude);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i),
                        _mm256_or_si256(sign, _mm256_add_epi16(rounded, bias)));
  }
  return i;
}

void NarrowHalves(const std::byte* from, int64_t count, std::byte* to) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  int64_t i = has_avx2 ? NarrowSixteens(from, count, to) : 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i), NarrowHalves(halves));
  }
  alignas(16) uint16_t last[8] = {};
  std::memcpy(last, from + 2 * i, 2 * (count - i));
  const __m128i narrow = NarrowHalves(*reinterpret_cast<const __m128i*>(last));
  _mm_store_si128(reinterpret_cast<__m128i*>(last), narrow);
  std::memcpy(to + 2 * i, last, 2 * (count - i));
}

// Rows of a tensor in the type they are stored in.
class StoredRows {
 public:
  StoredRows(const RawTensor& tensor, DType dtype) : tensor_(tensor), dtype_(dtype) {}

  absl::Status Write(int64_t first, int64_t rows, std::byte* to) {
    const TensorView& view = tensor_.view;
    const int64_t count = rows * view.row_elements();
    if (view.dtype == dtype_) {
      std::memcpy(to, view.row(first), ByteSize(dtype_, count));
      return absl::OkStatus();
    }
    if (view.dtype == DType::kF16 && dtype_ == DType::kBF16) {
      NarrowHalves(view.row(first), count, to);
      return absl::OkStatus();
    }
    floats_.resize(count);
    Dequantize(view.dtype, view.row(first), count, floats_.data());
    const int64_t bad = StoreFloats(floats_.data(), count, dtype_, to);
    if (bad == count) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(tensor_.name, ": element ", first * view.row_elements() + bad, " is ", floats_[bad],
                     ", too large for the bfloat16 that `fast` precision stores; use `exact`"));
  }

  // Until the next call.
  absl::StatusOr<const std::byte*> Read(int64_t first, int64_t rows) {
    if (tensor_.view.dtype == dtype_) return tensor_.view.row(first);
    stored_.resize(ByteSize(dtype_, rows * tensor_.view.row_elements()));
    LK_RETURN_IF_ERROR(Write(first, rows, stored_.data()));
    return stored_.data();
  }

 private:
  const RawTensor& tensor_;
  const DType dtype_;
  std::vector<float> floats_;
  std::vector<std::byte> stored_;
};

// Eight columns of eight rows of 16 bits: pairs, quarters and halves of columns interleave.
void TransposeTile(const std::byte* from, int64_t columns, int64_t stride, std::byte* to) {
  __m128i row[8], pair[8], quad[8];
  for (int r = 0; r < 8; ++r) {
    row[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * r * columns));
  }
  for (int r = 0; r < 8; r += 2) {
    pair[r] = _mm_unpacklo_epi16(row[r], row[r + 1]);
    pair[r + 1] = _mm_unpackhi_epi16(row[r], row[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    for (int half = 0; half < 2; ++half) {
      quad[r + 2 * half] = _mm_unpacklo_epi32(pair[r + half], pair[r + 2 + half]);
      quad[r + 2 * half + 1] = _mm_unpackhi_epi32(pair[r + half], pair[r + 2 + half]);
    }
  }
  for (int c = 0; c < 8; ++c) {
    const __m128i low = quad[c / 2], high = quad[4 + c / 2];
    const __m128i column = c % 2 ? _mm_unpackhi_epi64(low, high) : _mm_unpacklo_epi64(low, high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * c * stride), column);
  }
}

// `from` [rows, columns], perhaps not aligned.
template <typename Bits>
void Transpose(const std::byte* from, int64_t rows, int64_t columns, int64_t stride, std::byte* to) {
  const bool tiles = sizeof(Bits) == 2;
  const int64_t tile_rows = tiles ? rows / 8 * 8 : 0, tile_columns = tiles ? columns / 8 * 8 : 0;
  for (int64_t c = 0; c < tile_columns; c += 8) {
    for (int64_t r = 0; r < tile_rows; r += 8) {
      TransposeTile(from + 2 * (r * columns + c), columns, stride, to + 2 * (c * stride + r));
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = c < tile_columns ? tile_rows : 0; r < rows; ++r) {
      std::memcpy(to + (c * stride + r) * sizeof(Bits), from + (r * columns + c) * sizeof(Bits),
                  sizeof(Bits));
    }
  }
}

}  // namespace

int64_t StoreFloats(const float* values, int64_t count, DType dtype, std::byte* to) {
  uint32_t carries = 0;  // of one more in the exponent, into the sign: then all its bits were set
  if (dtype == DType::kF32) {
    std::memcpy(to, values, count * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      carries |= (std::bit_cast<uint32_t>(values[i]) & 0x7f800000u) + 0x800000u;
    }
  } else {
    LK_CHECK(dtype == DType::kBF16);
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = FloatToBF16(values[i]);
      std::memcpy(to + i * sizeof(bits), &bits, sizeof(bits));
      carries |= ((bits & 0x7f80u) + 0x80u) << 16;
    }
  }
  if (carries >> 31 == 0) return count;
  const auto stays_finite = [dtype](float value) {
    return std::isfinite(dtype == DType::kF32 ? value : BF16ToFloat(FloatToBF16(value)));
  };
  return std::find_if_not(values, values + count, stays_finite) - values;
}

absl::Status StoreRows(const RawTensor& tensor, DType dtype, int64_t stride, std::byte* to) {
  StoredRows from(tensor, dtype);
  for (int64_t r = 0; r < tensor.view.rows(); ++r) {
    LK_RETURN_IF_ERROR(from.Write(r, 1, to + ByteSize(dtype, r * stride)));
  }
  return absl::OkStatus();
}

absl::Status StoreColumns(const RawTensor& tensor, DType dtype, int64_t stride, std::byte* to) {
  const int64_t columns = tensor.view.row_elements();
  const int64_t width = Info(dtype).block_bytes;
  StoredRows from(tensor, dtype);
  for (int64_t r = 0; r < tensor.view.rows(); r += kRowsAtOnce, to += kRowsAtOnce * width) {
    const int64_t rows = std::min(kRowsAtOnce, tensor.view.rows() - r);
    LK_ASSIGN_OR_RETURN(const std::byte* values, from.Read(r, rows));
    if (width == 2) Transpose<uint16_t>(values, rows, columns, stride, to);
    else Transpose<uint32_t>(values, rows, columns, stride, to);
  }
  return absl::OkStatus();
}

}  // namespace lorikeet
