// A model and adapters of any size with random weights: all layers' views share one block of host
// memory, yet each is a weight of its own on the device.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/api/module.h"
#include "engine/base/aligned_buffer.h"
#include "engine/model/model_source.h"

namespace lorikeet::bench {

class SyntheticModel final : public ModelSource {
 public:
  // bfloat16. `config` as CheckConfig wants it.
  explicit SyntheticModel(const ModelConfig& config);

 private:
  const TensorView* View(std::vector<int64_t> shape);

  AlignedBuffer block_;
  std::vector<std::unique_ptr<TensorView>> views_;
};

// Llama-3.1-8B's shapes (Grattafiori et al. 2024), Llama-7B's (Touvron et al. 2023), and
// SmolLM2-135M's (Ben Allal et al. 2025).
ModelConfig Llama8B();
ModelConfig Llama7B();
ModelConfig SmolLM2();

// `count` adapters on the linears of every layer up to `last`, all seven or, with kO, attention's four;
// ranks taken in turn. Factors of one rank share a block of host memory; every adapter is copied to the
// device on its own.
std::vector<std::shared_ptr<const Adapter>> SyntheticAdapters(const ModelSource& model,
                                                              int32_t count,
                                                              const std::vector<int32_t>& ranks,
                                                              Linear last = Linear::kDown);
// Bytes of one adapter's factors.
int64_t AdapterBytes(const ModelSource& model, int32_t rank, Linear last = Linear::kDown);

}  // namespace lorikeet::bench
