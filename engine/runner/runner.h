// Computes batches: embeds, runs the model, samples. One per engine, called by its thread alone.
#pragma once

#include "absl/status/statusor.h"
#include "engine/api/adapter_images.h"
#include "engine/memory/kv_layout.h"
#include "engine/memory/memory_use.h"
#include "engine/scheduler/batch.h"

namespace lorikeet {

class Runner {
 public:
  virtual ~Runner() = default;

  // Computes every row, writes its K and V into its sequence's pages and samples the logit rows, or
  // adds their hidden states to embeddings.
  // A failure is the device's: no request can be served after it.
  virtual absl::StatusOr<StepResult> Run(const Batch& batch) = 0;

  // nullptr: adapters are used where the host has them.
  virtual AdapterImages* images() { return nullptr; }

  virtual MemoryUse memory_use() const { return {}; }  // of the device's memory; any thread
};

}  // namespace lorikeet
