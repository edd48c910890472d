// Values of files and of lowered tensors to memory, in the type and order that kernels read.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "adapters_cache/formats/raw_adapter.h"
#include "engine/base/dtype.h"

namespace lorikeet {

// dtype: kF32 or kBF16. The index of the first value that is not finite in it, else `count`; all are
// stored.
int64_t StoreFloats(const float* values, int64_t count, DType dtype, std::byte* to);

// Row r of a matrix at r · stride elements; or the matrix's column c there. `dtype`: the tensor's own, kF32 or
// kBF16. INVALID_ARGUMENT: a value, all of which are finite, that is too large for it.
absl::Status StoreRows(const RawTensor& tensor, DType dtype, int64_t stride, std::byte* to);
absl::Status StoreColumns(const RawTensor& tensor, DType dtype, int64_t stride, std::byte* to);

}  // namespace lorikeet
