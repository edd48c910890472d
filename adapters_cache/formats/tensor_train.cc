#include "adapters_cache/formats/tensor_train.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/matrix.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

constexpr int64_t kMostValues = int64_t{1} << 28;  // of a product on the way

absl::Status CheckCores(const std::vector<TrainCore>& cores) {
  if (cores.empty()) return absl::InvalidArgumentError("the train has no cores");
  int64_t left = 1, values = 1;
  for (size_t k = 0; k < cores.size(); ++k) {
    const std::vector<int64_t>& shape = cores[k].shape;
    const int64_t right = shape[2];
    if (shape[0] != left || shape[1] < 1 || right < 1 || (k + 1 == cores.size() && right != 1)) {
      return absl::InvalidArgumentError(absl::StrCat("core ", k, " is [", shape[0], ", ", shape[1], ", ", right,
                                                     "], behind one that ends in ", left,
                                                     "; the first begins with 1, the last ends in 1"));
    }
    if (shape[1] > kMostValues / values || right > kMostValues / (values * shape[1])) {
      return absl::InvalidArgumentError(
          absl::StrCat("the cores up to ", k, " make more than ", kMostValues, " values"));
    }
    values *= shape[1];
    left = right;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Matrix2> ContractTrain(const std::vector<TrainCore>& cores, int64_t rows, int64_t columns) {
  LK_RETURN_IF_ERROR(CheckCores(cores));
  Matrix2 product(1, 1, {1});  // [sizes so far, right]
  for (const TrainCore& core : cores) {
    const int64_t left = core.shape[0], size = core.shape[1], right = core.shape[2];
    product = Multiply(product, Matrix2(left, size * right, core.values));
    product.rows *= size;
    product.columns = right;
  }
  const int64_t values = product.rows;
  if (rows < 0) rows = values / columns;
  if (columns < 0) columns = values / rows;
  if (rows * columns != values) {
    return absl::InvalidArgumentError(
        absl::StrCat("the train has ", values, " values, which are no matrix [", rows, ", ", columns, "]"));
  }
  return Matrix2(rows, columns, std::move(product.values));
}

}  // namespace lorikeet
