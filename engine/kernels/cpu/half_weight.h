// Weights of 16 bits packed for products with float32 sums: they are read as they are stored and
// widened in registers, or multiplied as bfloat16 pairs where the processor can.
//
// A tile is `lanes` output columns, one lane of a vector of float32 sums each. It holds, step by step
// over the inputs, [lanes][pairs ? 2 : 1] values; an odd last input is paired with zero.
#pragma once

#include <cstdint>

#include "engine/base/aligned_buffer.h"
#include "engine/kernels/args.h"
#include "engine/tensor/tensor_view.h"

namespace lorikeet {

struct HalfWeight {
  DType dtype = DType::kBF16;  // or kF16
  int32_t in = 0;
  int32_t out = 0;
  int32_t lanes = 0;   // 8 (AVX2) or 16 (AVX-512)
  bool pairs = false;  // for HalfGemmAvx512Bf16
  AlignedBuffer data;

  int32_t steps() const { return pairs ? (in + 1) / 2 : in; }
  int32_t tiles() const { return (out + lanes - 1) / lanes; }
  int64_t step_bytes() const { return int64_t{lanes} * (pairs ? 4 : 2); }
  int64_t tile_bytes() const { return steps() * step_bytes(); }
  const std::byte* tile(int32_t t) const { return data.data() + t * tile_bytes(); }
};

// REQUIRES: weight.dtype is kBF16 or kF16; kBF16 where `pairs`.
HalfWeight PackHalfWeight(const TensorView& weight, int32_t lanes, bool pairs);

// y[:, columns of tiles [tile_begin, tile_end)] = x Wᵀ. x: [rows, in] float32. A row's values do not
// depend on the rows beside it.
using HalfGemmFn = void (*)(const HalfWeight& weight, Matrix x, int32_t tile_begin,
                            int32_t tile_end, Matrix y);

void HalfGemmAvx2(const HalfWeight& weight, Matrix x, int32_t tile_begin, int32_t tile_end,
                  Matrix y);
// REQUIRES: AVX512-F, -BW and -VL.
void HalfGemmAvx512(const HalfWeight& weight, Matrix x, int32_t tile_begin, int32_t tile_end,
                    Matrix y);
// x: bfloat16, rows of RoundRowToBF16. REQUIRES: AVX512_BF16 too; weight.pairs.
void HalfGemmAvx512Bf16(const HalfWeight& weight, Matrix x, int32_t tile_begin, int32_t tile_end,
                        Matrix y);

// To nearest even. out: [width rounded up to 2], zero beyond width. REQUIRES: AVX512_BF16.
void RoundRowToBF16(const float* x, int32_t width, uint16_t* out);

}  // namespace lorikeet
