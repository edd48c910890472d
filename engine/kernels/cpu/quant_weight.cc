#include "engine/kernels/cpu/quant_weight.h"

#include <immintrin.h>

#include <cstring>
#include <vector>

#include "engine/base/check.h"
#include "engine/base/dtype.h"
#include "engine/kernels/cpu/simd.h"

namespace lorikeet {
namespace {

uint16_t LoadU16(const std::byte* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
float LoadF16(const std::byte* p) { return F16ToFloat(LoadU16(p)); }
uint8_t Byte(const std::byte* p, int i) { return static_cast<uint8_t>(p[i]); }

// One row taken apart: codes[in], and scale and min per group.
struct RowCodes {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<float> mins;
};

void UnpackNibbles32(const std::byte* qs, uint8_t* codes) {
  for (int j = 0; j < 16; ++j) {
    codes[j] = Byte(qs, j) & 0xf;
    codes[j + 16] = Byte(qs, j) >> 4;
  }
}

void UnpackQ4_0(const std::byte* block, uint8_t* codes, float* scale, float* min) {
  *scale = LoadF16(block);
  *min = -8.0f * *scale;
  UnpackNibbles32(block + 2, codes);
}

void UnpackQ4_1(const std::byte* block, uint8_t* codes, float* scale, float* min) {
  *scale = LoadF16(block);
  *min = LoadF16(block + 2);
  UnpackNibbles32(block + 4, codes);
}

void UnpackQ8_0(const std::byte* block, uint8_t* codes, float* scale, float* min) {
  *scale = LoadF16(block);
  *min = -128.0f * *scale;
  for (int j = 0; j < 32; ++j) codes[j] = Byte(block + 2, j) ^ 0x80;  // int8 + 128
}

// The eight 6-bit (scale, min) pairs of Q4_K and Q5_K in their 12 bytes.
void UnpackScales6(const std::byte* packed, int sub, uint8_t* scale, uint8_t* min) {
  if (sub < 4) {
    *scale = Byte(packed, sub) & 63;
    *min = Byte(packed, sub + 4) & 63;
  } else {
    *scale = (Byte(packed, sub + 4) & 0xf) | (Byte(packed, sub - 4) >> 6) << 4;
    *min = (Byte(packed, sub + 4) >> 4) | (Byte(packed, sub) >> 6) << 4;
  }
}

void UnpackQ45_K(const std::byte* block, bool five_bits, uint8_t* codes, float* scales,
                 float* mins) {
  const float d = LoadF16(block);
  const float d_min = LoadF16(block + 2);
  const std::byte* high = block + 16;                        // Q5_K only: [32]
  const std::byte* low = block + 16 + (five_bits ? 32 : 0);  // [128]
  for (int sub = 0; sub < 8; ++sub) {
    uint8_t scale, min;
    UnpackScales6(block + 4, sub, &scale, &min);
    scales[sub] = d * scale;
    mins[sub] = -(d_min * min);
    for (int j = 0; j < 32; ++j) {
      const uint8_t pair = Byte(low, (sub / 2) * 32 + j);
      uint8_t code = sub % 2 == 0 ? pair & 0xf : pair >> 4;
      if (five_bits) code |= ((Byte(high, j) >> sub) & 1) << 4;
      codes[sub * 32 + j] = code;
    }
  }
}

void UnpackQ6_K(const std::byte* block, uint8_t* codes, float* scales, float* mins) {
  const std::byte* high = block + 128;   // [64]
  const std::byte* sub_scales = block + 192;  // int8 [16]
  const float d = LoadF16(block + 208);
  for (int half = 0; half < 2; ++half) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int j = 0; j < 32; ++j) {
        const uint8_t pair = Byte(block, half * 64 + (quarter % 2) * 32 + j);
        const uint8_t low = quarter < 2 ? pair & 0xf : pair >> 4;
        const uint8_t top = (Byte(high, half * 32 + j) >> (2 * quarter)) & 3;
        codes[half * 128 + quarter * 32 + j] = low | top << 4;
      }
    }
  }
  for (int g = 0; g < 16; ++g) {
    scales[g] = d * static_cast<int8_t>(sub_scales[g]);
    mins[g] = -32.0f * scales[g];
  }
}

void UnpackRow(DType dtype, const std::byte* row, int64_t in, RowCodes* out) {
  const DTypeInfo info = Info(dtype);
  const int64_t blocks = in / info.block_elements;
  for (int64_t b = 0; b < blocks; ++b) {
    const std::byte* block = row + b * info.block_bytes;
    uint8_t* codes = out->codes.data() + b * info.block_elements;
    switch (dtype) {
      case DType::kQ4_0: UnpackQ4_0(block, codes, &out->scales[b], &out->mins[b]); break;
      case DType::kQ4_1: UnpackQ4_1(block, codes, &out->scales[b], &out->mins[b]); break;
      case DType::kQ8_0: UnpackQ8_0(block, codes, &out->scales[b], &out->mins[b]); break;
      case DType::kQ4_K:
      case DType::kQ5_K:
        UnpackQ45_K(block, dtype == DType::kQ5_K, codes, &out->scales[b * 8], &out->mins[b * 8]);
        break;
      case DType::kQ6_K: UnpackQ6_K(block, codes, &out->scales[b * 16], &out->mins[b * 16]); break;
      default: LK_CHECK_MSG(false, Info(dtype).name);
    }
  }
}

void StoreScale(const QuantWeight& w, uint8_t* scales, int32_t index, float value) {
  if (w.half_scales) {
    reinterpret_cast<uint16_t*>(scales)[index] = FloatToF16(value);
  } else {
    reinterpret_cast<float*>(scales)[index] = value;
  }
}

void PackGroup(const QuantWeight& w, const RowCodes& row, int32_t group, int32_t lane,
               uint8_t* dst) {
  const uint8_t* codes = row.codes.data() + group * w.group;
  const int32_t vector_bytes = 4 * w.lanes;
  for (int32_t k = 0; k < w.group; ++k) {
    if (w.wide_codes) {
      dst[(k / 4) * vector_bytes + lane * 4 + k % 4] = codes[k];
    } else {
      const int32_t half = k % (w.group / 2);
      const int shift = k < w.group / 2 ? 0 : 4;
      dst[(half / 4) * vector_bytes + lane * 4 + half % 4] |= codes[k] << shift;
    }
  }
  uint8_t* scales = dst + w.code_bytes();
  StoreScale(w, scales, lane, row.scales[group]);
  StoreScale(w, scales, w.lanes + lane, row.mins[group]);
}

}  // namespace

QuantWeight PackQuantWeight(const TensorView& weight, int32_t lanes) {
  const DType dtype = weight.dtype;
  QuantWeight w;
  w.in = static_cast<int32_t>(weight.row_elements());
  w.out = static_cast<int32_t>(weight.rows());
  w.lanes = lanes;
  w.group = dtype == DType::kQ6_K ? 16 : 32;
  w.wide_codes = dtype == DType::kQ8_0 || dtype == DType::kQ5_K || dtype == DType::kQ6_K;
  w.half_scales = dtype == DType::kQ4_0 || dtype == DType::kQ4_1 || dtype == DType::kQ8_0;
  w.data = AlignedBuffer(w.tiles() * w.tile_bytes());
  RowCodes row{std::vector<uint8_t>(w.in), std::vector<float>(w.groups()),
               std::vector<float>(w.groups())};
  for (int32_t r = 0; r < w.out; ++r) {
    UnpackRow(dtype, weight.row(r), w.in, &row);
    uint8_t* tile = w.data.as<uint8_t>() + (r / lanes) * w.tile_bytes();
    for (int32_t g = 0; g < w.groups(); ++g) {
      PackGroup(w, row, g, r % lanes, tile + g * w.group_bytes());
    }
  }
  return w;
}

namespace {

// One group of 32 into `codes`; returns what rounding left of it in `v`.
void QuantizeGroup(__m256 (&v)[4], int8_t* codes, float* scale, int32_t (&sums)[2]) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 top = _mm256_setzero_ps();
  for (const __m256 part : v) top = _mm256_max_ps(top, _mm256_and_ps(part, magnitude));
  *scale = simd::Max(top) / 127.0f;
  const __m256 step = _mm256_set1_ps(*scale);
  const __m256 inverse = _mm256_set1_ps(*scale > 0 ? 1.0f / *scale : 0.0f);
  __m256i q[4];
  for (int i = 0; i < 4; ++i) {
    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    v[i] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(q[i]), step, v[i]);
  }
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i words01 = _mm256_packs_epi32(q[0], q[1]);
  const __m256i words23 = _mm256_packs_epi32(q[2], q[3]);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words01, words23), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
  // Sums of 16: dot with ones, then across the lane.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  const __m256i oct = _mm256_hadd_epi32(quads, quads);
  const __m256i halves = _mm256_hadd_epi32(oct, oct);
  sums[0] = _mm256_extract_epi32(halves, 0);
  sums[1] = _mm256_extract_epi32(halves, 4);
}

}  // namespace

void QuantizeRow(const float* x, int32_t r, const QuantRows& out) {
  const int32_t groups = out.groups();
  for (int32_t g = 0; g < groups; ++g) {
    __m256 v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm256_loadu_ps(x + g * QuantRows::kGroup + 8 * i);
    for (int32_t plane = 0; plane < out.planes; ++plane) {
      const int64_t at = (int64_t{plane} * out.rows + r) * groups + g;
      int32_t sums[2];
      QuantizeGroup(v, out.codes + at * QuantRows::kGroup, &out.scales[at], sums);
      const float scale = out.scales[at];
      out.sums32[at] = scale * (sums[0] + sums[1]);
      out.sums16[2 * at] = scale * sums[0];
      out.sums16[2 * at + 1] = scale * sums[1];
    }
  }
}

}  // namespace lorikeet
