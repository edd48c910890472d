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
// conversion. A chunk is tested as a whole, which the compiler vectorises.
template <typename Bits>
bool AnyExponentFull(const std::byte* src, int64_t count, Bits exponent_mask) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, src + i * sizeof(Bits), sizeof(Bits));
    any |= (bits & exponent_mask) == exponent_mask;
  }
  return any;
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

absl::Status CheckFinite(std::string_view name, const TensorView& tensor) {
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
