// bitsandbytes' NF4 weights in safetensors files, with double quantisation or without (QLoRA,
// Dettmers et al. 2023; bitsandbytes' QuantState.as_dict).
//
// For a weight K of [out, in] a file holds, codes and scales running over the flattened weight:
//   K                                    out * in / 2 bytes, two codes each, the first one high
//   K.absmax                             a scale a block: F32, or U8 codes of it
//   K.quant_map                          F32 [16], the levels of NF4
//   K.nested_absmax, K.nested_quant_map  F32, only beside U8 codes: scales of blocks of scales, levels
//   K.quant_state.bitsandbytes__nf4      U8, JSON: quant_type, blocksize, shape, nested_*
#pragma once

#include <deque>

#include "absl/status/status.h"
#include "engine/base/aligned_buffer.h"
#include "engine/tensor/tensor_file.h"

namespace lorikeet {

// Puts one tensor K of kNF4 in place of each such group; `buffers` gets its bytes.
// INVALID_ARGUMENT names the weight and what is not supported: another type than nf4, a width or a
// blocksize that is no multiple of 64. DATA_LOSS names the tensor that is missing or does not fit.
absl::Status RepackNf4(TensorFile* tensors, std::deque<AlignedBuffer>* buffers);

}  // namespace lorikeet
