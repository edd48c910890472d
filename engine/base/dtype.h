// Element types of tensors on disk and in memory, quantised blocks included.
//
// A quantised type stores rows in blocks of `block_elements` values in `block_bytes` bytes, laid
// along the row (the input dimension of a linear); the block formats are ggml's, as in the GGUF
// specification, NF4's, of QLoRA (Dettmers et al. 2023), and a scale before codes of e4m3 (Micikevicius
// et al. 2022, "FP8 Formats for Deep Learning"). Plain types have one-element blocks.
#pragma once

#include <bit>
#include <cstdint>

namespace lorikeet {

enum class DType : uint8_t { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1, kQ4_K, kQ5_K, kQ6_K,
                             kNF4, kScaledF8E4M3,
                             kU8, kI16, kI32, kI64, kF8E4M3 };  // see IsCode

struct DTypeInfo {
  const char* name;
  int block_elements;
  int block_bytes;
};

constexpr DTypeInfo Info(DType dtype) {
  switch (dtype) {
    case DType::kF32:  return {"F32", 1, 4};
    case DType::kF16:  return {"F16", 1, 2};
    case DType::kBF16: return {"BF16", 1, 2};
    case DType::kQ8_0: return {"Q8_0", 32, 34};
    case DType::kQ4_0: return {"Q4_0", 32, 18};
    case DType::kQ4_1: return {"Q4_1", 32, 20};
    case DType::kQ4_K: return {"Q4_K", 256, 144};
    case DType::kQ5_K: return {"Q5_K", 256, 176};
    case DType::kQ6_K: return {"Q6_K", 256, 210};
    case DType::kNF4:  return {"NF4", 64, 36};
    case DType::kF8E4M3: return {"F8_E4M3", 1, 1};
    case DType::kScaledF8E4M3: return {"scaled F8_E4M3", 64, 68};
    case DType::kU8:   return {"U8", 1, 1};
    case DType::kI16:  return {"I16", 1, 2};
    case DType::kI32:  return {"I32", 1, 4};
    case DType::kI64:  return {"I64", 1, 8};
  }
  return {"?", 1, 0};
}

// What is no weight by itself: indices of adapters, e4m3 before it has its scale.
constexpr bool IsCode(DType dtype) { return dtype >= DType::kU8; }
constexpr bool IsQuantized(DType dtype) { return Info(dtype).block_elements > 1; }

// Bytes of `elements` values. REQUIRES: elements is a multiple of the block.
constexpr int64_t ByteSize(DType dtype, int64_t elements) {
  return elements / Info(dtype).block_elements * Info(dtype).block_bytes;
}

// bfloat16 <-> float; the conversion from float rounds to nearest even and keeps NaN a NaN.
inline float BF16ToFloat(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t FloatToBF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// e4m3: no infinity, the largest value is 448, the pattern past it NaN.
inline float F8E4M3ToFloat(uint8_t bits) {
  const uint32_t sign = uint32_t{bits & 0x80u} << 24;
  const uint32_t magnitude = bits & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude < 8) {  // zero or subnormal: mantissa * 2^-9
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
}

// IEEE half <-> float without instruction-set requirements; from float rounds to nearest even.
inline float F16ToFloat(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline uint16_t FloatToF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {                        // subnormal half: round at 2^-24
    const float scaled = std::bit_cast<float>(magnitude) + 0.5f;  // aligns to a 2^-24 step
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(scaled) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

}  // namespace lorikeet
