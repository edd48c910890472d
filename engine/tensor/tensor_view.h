// A tensor somebody else owns: type, shape and bytes, row-major, outermost dimension first
// (Hugging Face order; readers of formats that list dimensions the other way turn them round).
// The last dimension of a quantised tensor is a multiple of its block. The bytes of a view into a
// file lie wherever the file has them: aligned to nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/dtype.h"

namespace lorikeet {

struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // exactly ByteSize(dtype, elements())

  int64_t elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  // A tensor seen as a matrix [rows, row_elements]: the last dimension is the row.
  int64_t row_elements() const { return shape.empty() ? 1 : shape.back(); }
  int64_t rows() const { return row_elements() == 0 ? 0 : elements() / row_elements(); }
  int64_t row_bytes() const { return ByteSize(dtype, row_elements()); }
  const std::byte* row(int64_t r) const { return bytes.data() + r * row_bytes(); }
};

// "[64, 128]"
std::string ShapeString(std::span<const int64_t> shape);

// The values of an index tensor: of an integer type, or of whole floats.
// INVALID_ARGUMENT with `name` and the first that is not whole.
absl::StatusOr<std::vector<int64_t>> ReadIndices(std::string_view name, const TensorView& tensor);

// INVALID_ARGUMENT with `name`, the first NaN or infinity and its index. Reads every byte.
absl::Status CheckFinite(std::string_view name, const TensorView& tensor);

}  // namespace lorikeet
