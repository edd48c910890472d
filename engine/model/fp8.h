// Weights of safetensors files in FP8, e4m3, as compressed-tensors, fbgemm, ModelOpt and
// Transformers' FineGrainedFP8 write them.
//
// For a weight K of [out, in] a file holds
//   K                           F8_E4M3 [out, in]
//   K_scale or K_scale_inv      F32, F16 or BF16: one [] or [1]; a row each [out] or [out, 1]; or a block
//                               of kFp8Block x kFp8Block each [ceil(out / block), ceil(in / block)]
// and K stands for code times scale, of either name. What it has to quantise inputs and keys and values by
// (input_scale, input_scale_ub, k_scale, v_scale) changes no weight: they are kept in more bits here.
#pragma once

#include <deque>

#include "absl/status/status.h"
#include "engine/base/aligned_buffer.h"
#include "engine/tensor/tensor_file.h"

namespace lorikeet {

inline constexpr int64_t kFp8Block = 128;

// Puts one tensor K of kScaledF8E4M3 in place of each such group; `buffers` gets its bytes.
// INVALID_ARGUMENT names the weight and what does not fit: a width that is no multiple of 64, a scale
// that is missing, of another type or shape, or not finite.
absl::Status RepackFp8(TensorFile* tensors, std::deque<AlignedBuffer>* buffers);

}  // namespace lorikeet
