// Matrices kept as tensor trains (Oseledets 2011).
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "adapters_cache/formats/lowered.h"

namespace lorikeet {

struct TrainCore {
  std::vector<int64_t> shape;  // [left, size, right]
  std::vector<float> values;
};

// The product of the cores, [Π size] values, as a matrix, row-major; -1 in the place of rows or columns: as
// many as there are. INVALID_ARGUMENT: cores do not meet, have another number of values in all, or pass
// through more of them than a load should hold.
absl::StatusOr<Matrix2> ContractTrain(const std::vector<TrainCore>& cores, int64_t rows, int64_t columns);

}  // namespace lorikeet
