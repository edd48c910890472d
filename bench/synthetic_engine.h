// The whole engine on a GPU over a synthetic model, as bench_engine, bench_trace, bench_loads and
// bench_popular load it: up to 256 requests at a time, 768 rows a step, no prefix cache.
#pragma once

#include <atomic>
#include <memory>

#include "bench/synthetic.h"
#include "engine/base/clock.h"
#include "engine/engine.h"
#include "engine/runner/model_runner.h"

namespace lorikeet::bench {

// Sums over steps, on the engine's thread.
class StepSums final : public StatsSink {
 public:
  void OnStep(const StepStats& stats) override;
  std::atomic<int64_t> steps{0}, rows{0}, micros{0}, preempted{0}, dropped{0}, hits{0}, misses{0};
};

class TimedRunner;

class SyntheticEngine {
 public:
  // What fails ends the program. Device and limits of `options` are set here.
  explicit SyntheticEngine(const ModelConfig& config, RunnerOptions options = {});
  ~SyntheticEngine();

  const SyntheticModel& model() const { return *model_; }
  int64_t weight_bytes() const { return runner_->weight_bytes(); }
  const EngineOptions& options() const { return options_; }
  const Clock& clock() const { return clock_; }
  const StepSums& sums() const { return sums_; }
  // When the copy of an image last ended, which the engine sees between steps.
  int64_t last_image_us() const;
  Engine* engine() { return engine_.get(); }

 private:
  const std::shared_ptr<SyntheticModel> model_;
  const SteadyClock clock_;
  StepSums sums_;
  EngineOptions options_;
  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<TimedRunner> timed_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace lorikeet::bench
