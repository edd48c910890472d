#include "engine/api/embedding.h"

#include <cmath>

#include "engine/base/check.h"

namespace lorikeet {

void Embedding::Add(std::span<const float> hidden) {
  sum_.resize(hidden.size());
  for (size_t i = 0; i < hidden.size(); ++i) sum_[i] += hidden[i];
}

absl::StatusOr<std::vector<float>> Embedding::Unit(int32_t dimensions) const {
  LK_CHECK(dimensions >= 1 && static_cast<size_t>(dimensions) <= sum_.size());
  double squares = 0;
  for (int32_t i = 0; i < dimensions; ++i) squares += sum_[i] * sum_[i];
  if (!(squares > 0) || std::isinf(squares)) {
    return absl::InternalError(
        "the hidden states have no direction: they are zero, infinite or not numbers");
  }
  const double scale = 1 / std::sqrt(squares);
  std::vector<float> unit(dimensions);
  for (int32_t i = 0; i < dimensions; ++i) unit[i] = static_cast<float>(sum_[i] * scale);
  return unit;
}

}  // namespace lorikeet
