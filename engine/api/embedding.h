// A text as one vector: the final hidden states of its tokens, after the model's last norm, pooled.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace lorikeet {

enum class Pooling : uint8_t {
  kLast,  // the last token's
  kMean,  // the mean of all
};

// Filled by the engine while a request runs; read once the request has finished.
class Embedding {
 public:
  explicit Embedding(Pooling pooling) : pooling_(pooling) {}

  Pooling pooling() const { return pooling_; }

  // One token's [D]. The runner alone.
  void Add(std::span<const float> hidden);

  // The first `dimensions` values at length 1: [dimensions]. INTERNAL: they have no direction, from
  // a broken adapter, say. REQUIRES: dimensions in [1, D], something was added.
  absl::StatusOr<std::vector<float>> Unit(int32_t dimensions) const;

 private:
  const Pooling pooling_;
  std::vector<double> sum_;  // [D]; the mean has its direction
};

}  // namespace lorikeet
