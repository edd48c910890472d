#include "engine/tensor/dequantize.h"

#include <bit>
#include <cstring>

#include "engine/base/check.h"

// Block layouts and formulas: ggml's block_q8_0, block_q4_0, block_q4_1, block_q4_K, block_q5_K and
// block_q6_K (ggml-org/ggml). The order of the roundings is part of the format: this file is
// compiled without contraction of a * b + c.
namespace lorikeet {
namespace {

uint16_t LoadU16(const std::byte* src) {
  uint16_t bits;
  std::memcpy(&bits, src, sizeof(bits));
  return bits;
}

// F16ToFloat without a branch, so that several are widened at a time: the exponent is 112 more.
float WidenHalf(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t not_finite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(uint32_t{bits & 0x8000u} << 16 | not_finite | std::bit_cast<uint32_t>(scaled));
}
float LoadF16(const std::byte* src) { return F16ToFloat(LoadU16(src)); }

int Low(std::byte packed) { return std::to_integer<int>(packed & std::byte{15}); }
int High(std::byte packed) { return std::to_integer<int>(packed >> 4); }
int8_t Signed(std::byte value) { return static_cast<int8_t>(value); }

// d f16, 32 x int8.
void BlockQ8_0(const std::byte* block, float* dst) {
  const float d = LoadF16(block);
  for (int i = 0; i < 32; ++i) dst[i] = Signed(block[2 + i]) * d;
}

// d f16, 16 bytes: the low nibbles are values 0..15, the high ones 16..31.
void BlockQ4_0(const std::byte* block, float* dst) {
  const float d = LoadF16(block);
  for (int i = 0; i < 16; ++i) {
    dst[i] = (Low(block[2 + i]) - 8) * d;
    dst[i + 16] = (High(block[2 + i]) - 8) * d;
  }
}

// d f16, m f16, nibbles as in Q4_0.
void BlockQ4_1(const std::byte* block, float* dst) {
  const float d = LoadF16(block);
  const float m = LoadF16(block + 2);
  for (int i = 0; i < 16; ++i) {
    dst[i] = Low(block[4 + i]) * d + m;
    dst[i + 16] = High(block[4 + i]) * d + m;
  }
}

struct ScaleMin {
  int scale, min;
};

// Sub-block j of 8: six bits of scale and of minimum, packed into 12 bytes.
ScaleMin KScaleMin(const std::byte* packed, int j) {
  auto at = [packed](int i) { return std::to_integer<int>(packed[i]); };
  if (j < 4) return {at(j) & 63, at(j + 4) & 63};
  return {(at(j + 4) & 15) | ((at(j - 4) >> 6) << 4), (at(j + 4) >> 4) | ((at(j) >> 6) << 4)};
}

// d f16, dmin f16, scales[12], qs[128]; every 32 bytes of qs hold two sub-blocks of 32.
void BlockQ4_K(const std::byte* block, float* dst) {
  const float d = LoadF16(block);
  const float dmin = LoadF16(block + 2);
  for (int j = 0; j < 8; ++j) {
    const ScaleMin sm = KScaleMin(block + 4, j);
    const float scale = d * sm.scale;
    const float min = dmin * sm.min;
    const std::byte* qs = block + 16 + j / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      dst[j * 32 + i] = scale * (j % 2 == 0 ? Low(qs[i]) : High(qs[i])) - min;
    }
  }
}

// As Q4_K with a fifth bit a value: bit j of qh[i] belongs to sub-block j. d, dmin, scales[12],
// qh[32], qs[128].
void BlockQ5_K(const std::byte* block, float* dst) {
  const float d = LoadF16(block);
  const float dmin = LoadF16(block + 2);
  const std::byte* qh = block + 16;
  for (int j = 0; j < 8; ++j) {
    const ScaleMin sm = KScaleMin(block + 4, j);
    const float scale = d * sm.scale;
    const float min = dmin * sm.min;
    const std::byte* qs = block + 48 + j / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int low = j % 2 == 0 ? Low(qs[i]) : High(qs[i]);
      const int high = std::to_integer<int>(qh[i] >> j) & 1;
      dst[j * 32 + i] = scale * (low + 16 * high) - min;
    }
  }
}

// ql[128], qh[64], 16 x int8 scale, d f16. Either half of 128 values has four groups of 32: group
// g takes nibble g / 2 of ql[32 * (g % 2) + i] and two bits of qh[i] from bit 2 g on.
void BlockQ6_K(const std::byte* block, float* dst) {
  const float d = LoadF16(block + 208);
  for (int half = 0; half < 2; ++half) {
    const std::byte* ql = block + 64 * half;
    const std::byte* qh = block + 128 + 32 * half;
    const std::byte* scales = block + 192 + 8 * half;
    for (int group = 0; group < 4; ++group) {
      for (int i = 0; i < 32; ++i) {
        const std::byte packed = ql[32 * (group % 2) + i];
        const int low = group < 2 ? Low(packed) : High(packed);
        const int high = std::to_integer<int>(qh[i] >> (2 * group)) & 3;
        const float scale = d * Signed(scales[2 * group + i / 16]);
        dst[128 * half + 32 * group + i] = scale * (low + 16 * high - 32);
      }
    }
  }
}

// scale f32, 32 bytes of codes, the first of two in the high nibble.
void BlockNF4(const std::byte* block, float* dst) {
  float scale;
  std::memcpy(&scale, block, sizeof(scale));
  for (int i = 0; i < 32; ++i) {
    dst[2 * i] = kNf4Levels[High(block[4 + i])] * scale;
    dst[2 * i + 1] = kNf4Levels[Low(block[4 + i])] * scale;
  }
}

void BlockScaledF8E4M3(const std::byte* block, float* dst) {
  float scale;
  std::memcpy(&scale, block, sizeof(scale));
  for (int i = 0; i < 64; ++i) {
    dst[i] = F8E4M3ToFloat(std::to_integer<uint8_t>(block[sizeof(scale) + i])) * scale;
  }
}

template <typename Decode>
void ForEachBlock(DType dtype, const std::byte* src, int64_t elements, float* dst, Decode decode) {
  const DTypeInfo info = Info(dtype);
  LK_CHECK(elements % info.block_elements == 0);
  for (int64_t i = 0; i < elements / info.block_elements; ++i) {
    decode(src + i * info.block_bytes, dst + i * info.block_elements);
  }
}

}  // namespace

void Dequantize(DType dtype, const std::byte* src, int64_t elements, float* dst) {
  switch (dtype) {
    case DType::kF32:
      if (elements > 0) std::memcpy(dst, src, elements * sizeof(float));
      return;
    case DType::kF16:
      for (int64_t i = 0; i < elements; ++i) dst[i] = WidenHalf(LoadU16(src + 2 * i));
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < elements; ++i) dst[i] = BF16ToFloat(LoadU16(src + 2 * i));
      return;
    case DType::kQ8_0:
      return ForEachBlock(dtype, src, elements, dst, BlockQ8_0);
    case DType::kQ4_0:
      return ForEachBlock(dtype, src, elements, dst, BlockQ4_0);
    case DType::kQ4_1:
      return ForEachBlock(dtype, src, elements, dst, BlockQ4_1);
    case DType::kQ4_K:
      return ForEachBlock(dtype, src, elements, dst, BlockQ4_K);
    case DType::kQ5_K:
      return ForEachBlock(dtype, src, elements, dst, BlockQ5_K);
    case DType::kQ6_K:
      return ForEachBlock(dtype, src, elements, dst, BlockQ6_K);
    case DType::kNF4:
      return ForEachBlock(dtype, src, elements, dst, BlockNF4);
    case DType::kF8E4M3:
      for (int64_t i = 0; i < elements; ++i) dst[i] = F8E4M3ToFloat(std::to_integer<uint8_t>(src[i]));
      return;
    case DType::kScaledF8E4M3:
      return ForEachBlock(dtype, src, elements, dst, BlockScaledF8E4M3);
    case DType::kU8:
    case DType::kI16:
    case DType::kI32:
    case DType::kI64:
      LK_CHECK_MSG(false, "integers are no weights");
  }
}

}  // namespace lorikeet
