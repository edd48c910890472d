#include "adapters_cache/formats/dora.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/matrix.h"

namespace lorikeet {
namespace {

// Eight independent sums, so that the loop vectorises without reassociation by the compiler.
double SumOfSquares(const float* row, int32_t n) {
  double sums[8] = {};
  int32_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int32_t k = 0; k < 8; ++k) sums[k] += double{row[i + k]} * row[i + k];
  }
  for (; i < n; ++i) sums[0] += double{row[i]} * row[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

absl::Status DoraOutScale(const BaseModel& base, ModuleId id, const std::vector<float>& a,
                          const std::vector<float>& b, int32_t rank, float scale,
                          const std::vector<float>& magnitude, float* out_scale) {
  constexpr int32_t kRows = 64;  // of W at a time: they stay in the caches
  const auto [in, out] = base.shape(id);
  std::vector<float> weight(int64_t{kRows} * in);
  for (int32_t first = 0; first < out; first += kRows) {
    const int32_t rows = std::min(kRows, out - first);
    base.ReadRows(id, first, rows, weight.data());
    AddProduct(scale, &b[int64_t{first} * rank], a.data(), {rows, rank, in}, weight.data());
    for (int32_t r = 0; r < rows; ++r) {
      const double norm = std::sqrt(SumOfSquares(&weight[int64_t{r} * in], in));
      const float value = static_cast<float>(magnitude[first + r] / norm);
      if (!std::isfinite(value)) {
        return absl::InvalidArgumentError(
            absl::StrCat(base.path(id), ": DoRA's scale of output ", first + r,
                         " is not finite: magnitude ", magnitude[first + r], ", row norm ", norm));
      }
      out_scale[first + r] = value;
    }
  }
  return absl::OkStatus();
}

}  // namespace lorikeet
