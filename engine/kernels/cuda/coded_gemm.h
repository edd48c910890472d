// Products with weights of 8 bits, which are widened in registers on their way to the tensor cores:
// a weight costs the memory and the bandwidth of its codes, its values are exactly code times scale.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/low_rank.h"

namespace lorikeet::cuda {

// Linears on top of each other, as codes in the FP8 format e4m3 (Micikevicius et al. 2022, "FP8
// Formats for Deep Learning") with a float32 scale a row. Codes lie in strips of kCodedBlockRows rows
// and kStripWidth columns, strips of a block of rows one after the other, in the order in which lanes
// take them (see coded_gemm.cu). Each part begins a block of rows of its own.
inline constexpr int32_t kCodedBlockRows = 128;
inline constexpr int32_t kStripWidth = 64;

struct CodedPart {
  std::byte* codes = nullptr;  // [row blocks, strips, kCodedBlockRows, kStripWidth]
  float* scales = nullptr;     // [row blocks, kCodedBlockRows]
  int32_t rows = 0;
};

struct CodedWeight {
  CodedPart parts[kMaxParts];
  int32_t count = 0;
  int32_t width = 0;  // columns

  int32_t strips() const { return (width + kStripWidth - 1) / kStripWidth; }
  // Of a part of `rows` rows, those of its blocks that it has not included: they must be zero.
  int64_t PaddedRows(int32_t rows) const {
    return int64_t{rows + kCodedBlockRows - 1} / kCodedBlockRows * kCodedBlockRows;
  }
  int64_t CodeBytes(int32_t rows) const { return PaddedRows(rows) * strips() * kStripWidth; }
};

// Whether this device has what the products need: compute capability 9.0. Widths and rows of parts
// must be multiples of kCodedWidthUnit.
bool CanMultiplyCoded();
inline constexpr int32_t kCodedWidthUnit = 8;

// Codes of `count` rows from row `first` of the part on: [count, weight.width] of `dtype` (kBF16 or
// kF16), rows adjacent. A row's scale is its largest magnitude over e4m3's, 448.
cudaError_t LaunchEncode(const void* rows, DType dtype, int32_t first, int32_t count,
                         const CodedPart& part, int32_t width, cudaStream_t stream);

// Codes and scales of a file's rows, [count, width / kStripWidth] blocks of kScaledF8E4M3 on the device:
// a row's blocks have one scale. REQUIRES: width is a multiple of kStripWidth.
cudaError_t LaunchStoreCodes(const std::byte* blocks, int32_t first, int32_t count,
                             const CodedPart& part, int32_t width, cudaStream_t stream);

// y = x Wᵀ with float32 sums. x is of a 16-bit type, y of that or float32; columns of y are the parts' one
// after the other. in_chains: each sum is one chain of products in the order of columns, the same for a row
// whatever the others are; else several blocks may share a sum's columns, as many as the rows leave idle.
cudaError_t LaunchCodedGemm(const CodedWeight& weight, Matrix x, Matrix y, cudaStream_t stream, bool in_chains);

}  // namespace lorikeet::cuda
