// Plain counters of one engine step, handed to a sink on the engine thread.
#pragma once

#include <cstdint>

namespace lorikeet {

struct StepStats {
  int32_t rows = 0;               // tokens computed
  int32_t prefill_rows = 0;       // of them, prompt tokens and tokens recomputed after preemption
  int32_t sequences = 0;          // requests in the step
  int32_t distinct_adapters = 0;  // base not counted
  int32_t base_rows = 0;          // rows without an adapter
  int32_t waiting = 0;            // requests queued after planning
  int32_t running = 0;
  int32_t preempted = 0;          // requests sent back to the queue by this step
  int32_t admitted_tokens = 0;    // prompt tokens of the requests that this step admitted first
  int32_t cached_tokens = 0;      // of them, those that earlier requests had computed
  int32_t pages_used = 0;         // by requests
  int32_t pages_cached = 0;       // of earlier requests, free once they are needed
  int32_t pages_images = 0;       // of adapters' images
  int32_t pages_total = 0;
  int32_t pages_images_used = 0;  // of them, of this step's adapters
  int32_t images_loading = 0;     // on their way after planning
  int32_t images_dropped = 0;     // by this step
  int32_t image_hits = 0;         // requests admitted first whose image was there when they came
  int32_t image_misses = 0;       // and those that had to wait for it
  int64_t context_bytes = 0;      // keys, values and adapters that the step reads, each once
  int32_t tokens_sampled = 0;
  int64_t step_us = 0;
};

class StatsSink {
 public:
  virtual ~StatsSink() = default;
  virtual void OnStep(const StepStats& stats) = 0;  // engine thread; must not block
};

}  // namespace lorikeet
