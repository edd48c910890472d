// Steps of a model on a backend, timed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/kernels/backend.h"
#include "engine/model/model.h"

namespace lorikeet::bench {

// Sequences of `context` tokens, each to compute its last `rows` tokens.
class ModelSteps {
 public:
  // `pages`: those not taken by images, from 0 on.
  ModelSteps(Backend* backend, Model* model, const KvLayout& layout, int32_t pages)
      : backend_(backend), model_(model), layout_(layout), pages_(pages) {}

  bool Fits(int32_t sequences, int32_t context) const {
    return int64_t{layout_.PagesFor(context)} * sequences <= pages_;
  }

  // Median seconds of a step, sampling included. `adapters`: of the sequences in turn, nullptr the base, or empty.
  double Measure(int32_t sequences, int32_t context, int32_t rows,
                 const std::vector<std::shared_ptr<const Adapter>>& adapters, int repeats = 12);

 private:
  void Step();

  Backend* const backend_;
  Model* const model_;
  const KvLayout layout_;
  const int32_t pages_;
  std::vector<int32_t> tokens_, positions_, begin_, page_begin_, page_ids_, logits_;
  std::vector<AdapterSegment> segments_;
};

}  // namespace lorikeet::bench
