#include "bench/synthetic_engine.h"

#include <functional>
#include <utility>
#include <vector>

#include "engine/base/check.h"

namespace lorikeet::bench {

// The model's images, and when one came.
class TimedImages final : public AdapterImages {
 public:
  TimedImages(AdapterImages* images, const Clock* clock) : images_(images), clock_(clock) {}

  absl::StatusOr<ImageSize> Size(const Adapter& adapter) const override { return images_->Size(adapter); }
  void SetWake(std::function<void()> wake) override {
    if (wake == nullptr) return images_->SetWake(nullptr);
    images_->SetWake([this, wake = std::move(wake)] {
      last_us = clock_->NowMicros();
      wake();
    });
  }
  void Move(AdapterMoves moves) override { images_->Move(std::move(moves)); }
  std::vector<AdapterLoaded> TakeLoaded() override { return images_->TakeLoaded(); }

  std::atomic<int64_t> last_us{0};

 private:
  AdapterImages* const images_;
  const Clock* const clock_;
};

class TimedRunner final : public Runner {
 public:
  TimedRunner(ModelRunner* runner, const Clock* clock)
      : runner_(runner), images_(runner->images(), clock) {}

  absl::StatusOr<StepResult> Run(const Batch& batch) override { return runner_->Run(batch); }
  AdapterImages* images() override { return &images_; }
  int64_t last_image_us() const { return images_.last_us; }

 private:
  ModelRunner* const runner_;
  TimedImages images_;
};

void StepSums::OnStep(const StepStats& stats) {
  ++steps;
  rows += stats.rows;
  micros += stats.step_us;
  preempted += stats.preempted;
  dropped += stats.images_dropped;
  hits += stats.image_hits;
  misses += stats.image_misses;
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
  timed_ = std::make_unique<TimedRunner>(runner_.get(), &clock_);
  options_.limits = options.limits;
  options_.kv = runner_->kv();
  options_.pages = runner_->pages();
  options_.prefix_cache = false;
  options_.vocab = model_->config().vocab;
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      Engine::Start(options_, timed_.get(), &clock_, &sums_);
  LK_CHECK_MSG(engine.ok(), engine.status().ToString());
  engine_ = *std::move(engine);
}

SyntheticEngine::~SyntheticEngine() = default;

int64_t SyntheticEngine::last_image_us() const { return timed_->last_image_us(); }

}  // namespace lorikeet::bench
