#include "engine/tensor/tensor_view.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

// A float is finite unless all bits of its exponent are set, so 16 and 32 bit values need no
// conversion: one more in the exponent then carries into the sign. A chunk is tested as a whole, in what
// the compiler vectorises.
template <typename Bits>
bool AnyExponentFull(const std::byte* src, int64_t count, Bits exponent_mask) {
  const Bits one = exponent_mask & -exponent_mask;
  Bits carries = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, src + i * sizeof(Bits), sizeof(Bits));
    carries |= (bits & exponent_mask) + one;
  }
  return carries >> (8 * sizeof(Bits) - 1) != 0;
}

bool AnyNonFinite(DType dtype, const std::byte* src, int64_t count) {
  switch (dtype) {
    case DType::kF32:
      return AnyExponentFull<uint32_t>(src, count, 0x7f800000u);
    case DType::kF16:
      return AnyExponentFull<uint16_t>(src, count, 0x7c00u);
    case DType::kBF16:
      return AnyExponentFull<uint16_t>(src, count, 0x7f80u);
    default:
      return true;  // blocks are judged by their values
  }
}

}  // namespace

std::string ShapeString(std::span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape.begin(), shape.end(), ", "), "]");
}

namespace {

template <typename T>
std::vector<int64_t> WidenIndices(const TensorView& tensor) {
  std::vector<int64_t> values(tensor.elements());
  for (size_t i = 0; i < values.size(); ++i) {
    T value;
    std::memcpy(&value, tensor.bytes.data() + i * sizeof(T), sizeof(T));
    values[i] = value;
  }
  return values;
}

}  // namespace

absl::StatusOr<std::vector<int64_t>> ReadIndices(std::string_view name, const TensorView& tensor) {
  switch (tensor.dtype) {
    case DType::kU8: return WidenIndices<uint8_t>(tensor);
    case DType::kI16: return WidenIndices<int16_t>(tensor);
    case DType::kI32: return WidenIndices<int32_t>(tensor);
    case DType::kI64: return WidenIndices<int64_t>(tensor);
    default: break;
  }
  std::vector<float> values(tensor.elements());
  Dequantize(tensor.dtype, tensor.bytes.data(), tensor.elements(), values.data());
  std::vector<int64_t> indices;
  for (const float value : values) {
    if (!(std::abs(value) < 0x1p24f) || value != std::floor(value)) {
      return absl::InvalidArgumentError(
          absl::StrCat(absl::string_view(name.data(), name.size()), " holds ", value,
                       ", which is not a whole number"));
    }
    indices.push_back(static_cast<int64_t>(value));
  }
  return indices;
}

absl::Status CheckFinite(std::string_view name, const TensorView& tensor) {
  if (IsCode(tensor.dtype)) return absl::OkStatus();
  constexpr int64_t kChunk = 4096;  // a multiple of every block
  float values[kChunk];
  const int64_t elements = tensor.elements();
  for (int64_t begin = 0; begin < elements; begin += kChunk) {
    const int64_t count = std::min(kChunk, elements - begin);
    const std::byte* src = tensor.bytes.data() + ByteSize(tensor.dtype, begin);
    if (!AnyNonFinite(tensor.dtype, src, count)) continue;
    Dequantize(tensor.dtype, src, count, values);
    const float* bad =
        std::find_if_not(values, values + count, [](float value) { return std::isfinite(value); });
    if (bad == values + count) continue;
    const int64_t index = begin + (bad - values);
    return absl::InvalidArgumentError(
        absl::StrCat("tensor '", absl::string_view(name.data(), name.size()), "' ",
                     ShapeString(tensor.shape), ": element ", index, " is ",
                     std::isnan(*bad) ? "NaN" : "infinite", "; all values must be finite"));
  }
  return absl::OkStatus();
}

}  // namespace lorikeet
