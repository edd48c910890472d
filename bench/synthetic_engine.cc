#include "bench/synthetic_engine.h"

#include <utility>

#include "engine/base/check.h"

namespace lorikeet::bench {

void StepSums::OnStep(const StepStats& stats) {
  ++steps;
  rows += stats.rows;
  micros += stats.step_us;
  preempted += stats.preempted;
  dropped += stats.images_dropped;
}

SyntheticEngine::SyntheticEngine(const ModelConfig& config, RunnerOptions options)
    : model_(std::make_shared<SyntheticModel>(config)) {
  options.device = "cuda";
  options.limits.max_batch_tokens = 768;
  options.limits.max_running_requests = 256;
  options.limits.max_queued_requests = 4096;
  options.limits.max_context_tokens = 2048;
  absl::StatusOr<std::unique_ptr<ModelRunner>> runner = ModelRunner::Create(model_, options);
  LK_CHECK_MSG(runner.ok(), runner.status().ToString());
  runner_ = *std::move(runner);
  options_.limits = options.limits;
  options_.kv = runner_->kv();
  options_.pages = runner_->pages();
  options_.prefix_cache = false;
  options_.vocab = model_->config().vocab;
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      Engine::Start(options_, runner_.get(), &clock_, &sums_);
  LK_CHECK_MSG(engine.ok(), engine.status().ToString());
  engine_ = *std::move(engine);
}

}  // namespace lorikeet::bench
