// Quantised weights packed for the integer kernels, and activations quantised to meet them.
//
// Every block format of ggml's that the server reads is w = scale · code + min over groups of 16 or 32 inputs,
// with unsigned codes of 4 bits (Q4_0, Q4_1, Q4_K) or up to 8 bits (Q5_K, Q6_K, Q8_0); the file's
// codes are kept, only their order changes. Scales stay float16 where the file's are and products
// are exact there (Q4_0, Q4_1, Q8_0), else they are float32 products of the file's two levels.
//
// A tile is `lanes` output columns (one 32-bit lane of a vector each). It holds, group by group:
//   4-bit: group/8 vectors; in vector j, lane l, byte b: low nibble  = code[l][4j + b],
//                                                        high nibble = code[l][group/2 + 4j + b]
//   8-bit: group/4 vectors; in vector j, lane l, byte b: code[l][4j + b]
//   then scale[lanes], min[lanes].
#pragma once

#include <cstdint>

#include "engine/base/aligned_buffer.h"
#include "engine/kernels/args.h"
#include "engine/tensor/tensor_view.h"

namespace lorikeet {

struct QuantWeight {
  int32_t in = 0;
  int32_t out = 0;
  int32_t lanes = 0;        // 8 (AVX2) or 16 (AVX-512)
  int32_t group = 32;       // inputs a scale covers: 16 or 32
  bool wide_codes = false;  // 8-bit codes
  bool half_scales = true;  // float16 scales and mins, else float32
  AlignedBuffer data;

  int32_t groups() const { return in / group; }
  int32_t tiles() const { return (out + lanes - 1) / lanes; }
  int64_t code_bytes() const { return int64_t{lanes} * group / (wide_codes ? 1 : 2); }
  int64_t group_bytes() const { return code_bytes() + 2 * lanes * (half_scales ? 2 : 4); }
  int64_t tile_bytes() const { return groups() * group_bytes(); }
  const uint8_t* tile(int32_t t) const { return data.as<uint8_t>() + t * tile_bytes(); }
};

// REQUIRES: a block format of ggml's.
QuantWeight PackQuantWeight(const TensorView& weight, int32_t lanes);

// Rows of activations as int8 in groups of 32: x ≈ scale · q, scale = max|x| / 127 of the group.
// With two planes the second holds what the first left of x, so the pair is good to 16 bits.
struct QuantRows {
  static constexpr int32_t kGroup = 32;

  int32_t rows = 0;
  int32_t width = 0;        // multiple of kGroup
  int8_t* codes = nullptr;  // [planes, rows, width]
  float* scales = nullptr;  // [planes, rows, width / 32]
  float* sums32 = nullptr;  // [planes, rows, width / 32] scale · Σ q
  float* sums16 = nullptr;  // [planes, rows, width / 16] the same over half groups
  int32_t planes = 1;       // 1 or 2: x is their sum

  int32_t groups() const { return width / kGroup; }
};

// Quantises row r of x into row r of every plane of `out`.
void QuantizeRow(const float* x, int32_t r, const QuantRows& out);

// y[r, columns of tiles [tile_begin, tile_end)] = x[r] Wᵀ for rows [row_begin, row_end).
using QuantGemmFn = void (*)(const QuantWeight& weight, const QuantRows& x, int32_t row_begin,
                             int32_t row_end, int32_t tile_begin, int32_t tile_end, Matrix y);

void QuantGemmAvx2(const QuantWeight& weight, const QuantRows& x, int32_t row_begin,
                   int32_t row_end, int32_t tile_begin, int32_t tile_end, Matrix y);
// REQUIRES: AVX512-F, -BW, -VL and -VNNI.
void QuantGemmAvx512(const QuantWeight& weight, const QuantRows& x, int32_t row_begin,
                     int32_t row_end, int32_t tile_begin, int32_t tile_end, Matrix y);

}  // namespace lorikeet
