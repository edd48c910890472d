#include "engine/kernels/cpu/half_weight.h"

#include <cstring>

#include "engine/base/check.h"

namespace lorikeet {

HalfWeight PackHalfWeight(const TensorView& weight, int32_t lanes, bool pairs) {
  LK_CHECK(weight.dtype == DType::kBF16 || (weight.dtype == DType::kF16 && !pairs));
  HalfWeight w;
  w.dtype = weight.dtype;
  w.in = static_cast<int32_t>(weight.row_elements());
  w.out = static_cast<int32_t>(weight.rows());
  w.lanes = lanes;
  w.pairs = pairs;
  w.data = AlignedBuffer(w.tiles() * w.tile_bytes());
  const int32_t group = pairs ? 2 : 1;
  for (int32_t column = 0; column < w.out; ++column) {
    const std::byte* row = weight.row(column);
    std::byte* lane = w.data.data() + (column / lanes) * w.tile_bytes() + (column % lanes) * group * 2;
    for (int32_t k = 0; k < w.in; ++k) {
      std::memcpy(lane + (k / group) * w.step_bytes() + (k % group) * 2, row + 2 * int64_t{k}, 2);
    }
  }
  return w;
}

}  // namespace lorikeet
