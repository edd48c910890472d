#include "adapters_cache/low_rank_rows.h"

#include <algorithm>
#include <vector>

#include "engine/tensor/dequantize.h"

namespace lorikeet {

void ReadA(const LowRank& pair, int32_t k, int64_t width, float* out) {
  Dequantize(pair.dtype, pair.a + ByteSize(pair.dtype, k * pair.a_stride), width, out);
}

void ReadB(const LowRank& pair, int32_t k, int64_t width, float* out) {
  std::fill_n(out, width, 0.0f);
  std::vector<float> row(width);
  const auto add = [&](int32_t j, float mix) {
    Dequantize(pair.dtype, pair.b + ByteSize(pair.dtype, j * pair.b_stride), width, row.data());
    const float factor = pair.scale * (pair.rank_scale ? pair.rank_scale[j] : 1) * mix;
    for (int64_t o = 0; o < width; ++o) out[o] += factor * row[o];
  };
  if (pair.rank_mix == nullptr) add(k, 1);
  for (int32_t j = 0; pair.rank_mix && j < pair.rank; ++j) {
    add(j, pair.rank_mix[int64_t{j} * pair.rank + k]);
  }
  for (int64_t o = 0; pair.delta_scale && o < width; ++o) out[o] *= pair.delta_scale[o];
}

}  // namespace lorikeet
