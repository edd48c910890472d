// The whole engine on Llama-3.1-8B's shapes with random weights: requests of 256 tokens in, 128 out
// in a closed loop, rank-16 adapters on all seven linears. Prints output tokens a second and the
// floor of a decode step.
//   bench_engine [--quick] [--fp8]
// --fp8: with the layers' weights in 8 bits.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "bench/device.h"
#include "bench/synthetic_engine.h"
#include "engine/base/check.h"

namespace lorikeet::bench {
namespace {

constexpr int32_t kPrompt = 256, kOutput = 128;

struct Case {
  int32_t concurrency;
  int32_t distinct;
  std::vector<int32_t> ranks;
};

struct Result {
  double tokens_per_second = 0;
  double step_ms = 0;
  double rows_per_step = 0;
  double busy = 0;  // share of the time that the engine was in a step
  int64_t preempted = 0;
};

// `concurrency` requests are always open; a finished one is replaced at once.
class ClosedLoop {
 public:
  ClosedLoop(Engine* engine, const Case& c, const std::vector<std::shared_ptr<const Adapter>>& adapters)
      : engine_(engine), adapters_(adapters), case_(c), rng_(1) {}

  void Start() {
    for (int32_t i = 0; i < case_.concurrency; ++i) Submit(i);
  }
  // Pops events for `seconds`; returns the tokens that came.
  int64_t Run(double seconds) {
    const double end = Now() + seconds;
    int64_t tokens = 0;
    while (Now() < end) {
      const uint64_t before = wakes_.load();
      for (size_t i = 0; i < open_.size(); ++i) tokens += Drain(i);
      if (wakes_.load() == before) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return tokens;
  }
  void Stop() {
    for (Open& open : open_) engine_->Cancel(open.id);
    for (Open& open : open_) {
      TokenEvent event;
      while (event.kind != TokenEvent::Kind::kFinished) {
        if (!open.sink->Pop(&event)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
    open_.clear();
  }

 private:
  struct Open {
    RequestId id = 0;
    std::shared_ptr<TokenSink> sink;
  };

  void Submit(size_t slot) {
    Request request;
    for (int32_t i = 0; i < kPrompt; ++i) request.prompt.push_back(static_cast<int32_t>(rng_() % 100000));
    request.sampling.temperature = 0;
    request.max_new_tokens = kOutput;
    request.ignore_eos = true;
    if (case_.distinct > 0) {
      request.adapter = AdapterLease(adapters_[next_++ % case_.distinct]);
      request.adapter_name = "adapter";
    }
    auto sink = std::make_shared<TokenSink>(kOutput + 2, [this] { ++wakes_; });
    const absl::StatusOr<RequestId> id = engine_->Submit(std::move(request), sink);
    LK_CHECK_MSG(id.ok(), id.status().ToString());
    if (slot == open_.size()) open_.emplace_back();
    open_[slot] = {*id, std::move(sink)};
  }
  int64_t Drain(size_t slot) {
    int64_t tokens = 0;
    TokenEvent event;
    while (open_[slot].sink->Pop(&event)) {
      if (event.kind == TokenEvent::Kind::kToken) ++tokens;
      if (event.kind != TokenEvent::Kind::kFinished) continue;
      LK_CHECK_MSG(event.finish == FinishReason::kLength, event.status.ToString());
      Submit(slot);
      break;
    }
    return tokens;
  }

  Engine* const engine_;
  const std::vector<std::shared_ptr<const Adapter>>& adapters_;
  const Case case_;
  std::mt19937 rng_;
  std::vector<Open> open_;
  std::atomic<uint64_t> wakes_{0};
  int64_t next_ = 0;
};

Result Measure(Engine* engine, const StepSums& steps, const Case& c, const SyntheticModel& model, bool quick) {
  const auto adapters = SyntheticAdapters(model, c.distinct, c.ranks);
  ClosedLoop loop(engine, c, adapters);
  loop.Start();
  // Until every adapter has come to the device and requests are spread over their lives.
  for (int64_t tokens = 0; tokens < int64_t{c.concurrency} * kOutput * 3 / 2;) tokens += loop.Run(0.1);
  loop.Run(quick ? 1 : 3);
  const int64_t steps_before = steps.steps, rows = steps.rows, micros = steps.micros;
  const int64_t preempted = steps.preempted;
  const double start = Now();
  const int64_t tokens = loop.Run(quick ? 3 : 8);
  const double seconds = Now() - start;
  Result result;
  const double count = static_cast<double>(steps.steps - steps_before);
  result.tokens_per_second = static_cast<double>(tokens) / seconds;
  result.step_ms = static_cast<double>(steps.micros - micros) / count * 1e-3;
  result.rows_per_step = static_cast<double>(steps.rows - rows) / count;
  result.busy = static_cast<double>(steps.micros - micros) * 1e-6 / seconds;
  result.preempted = steps.preempted - preempted;
  loop.Stop();
  return result;
}

int Run(bool quick, const RunnerOptions& options) {
  const double bandwidth = ReadBandwidth();
  std::printf("%s, read bandwidth %.0f GB/s\n", DeviceName().c_str(), bandwidth / 1e9);
  SyntheticEngine engine(Llama8B(), options);
  const SyntheticModel& model = engine.model();

  const std::vector<int32_t> mixed = {64, 32, 16, 8};
  const std::vector<Case> cases = {{1, 0, {16}},     {32, 0, {16}},    {256, 0, {16}},
                                   {256, 1, {16}},   {256, 16, {16}},  {32, 32, {16}},
                                   {64, 64, {16}},   {256, 64, {16}},  {256, 256, {16}},
                                   {64, 64, mixed},  {256, 64, mixed}};
  std::printf("%9s %9s %-12s %12s %9s %10s %9s %6s %9s\n", "requests", "adapters", "ranks",
              "tokens/s", "step ms", "rows/step", "floor ms", "busy", "preempted");
  for (const Case& c : cases) {
    const Result r = Measure(engine.engine(), engine.sums(), c, model, quick);
    double bytes = static_cast<double>(engine.weight_bytes());
    for (int32_t i = 0; i < c.distinct; ++i) {
      bytes += static_cast<double>(AdapterBytes(model, c.ranks[i % c.ranks.size()]));
    }
    const KvLayout& kv = engine.options().kv;
    bytes += static_cast<double>(kv.layer_bytes()) * kv.layers / KvLayout::kPageTokens *
             c.concurrency * (kPrompt + kOutput / 2);
    std::printf("%9d %9d %-12s %12.0f %9.2f %10.0f %9.2f %5.0f%% %9ld\n", c.concurrency, c.distinct,
                c.ranks.size() > 1 ? "64/32/16/8" : "16", r.tokens_per_second, r.step_ms,
                r.rows_per_step, bytes / bandwidth * 1e3, 100 * r.busy,
                static_cast<long>(r.preempted));
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  const auto has = [&](const char* flag) {
    return std::any_of(argv + 1, argv + argc, [&](const char* a) { return !std::strcmp(a, flag); });
  };
  return lorikeet::bench::Run(has("--quick"), {.quantization = has("--fp8") ? "fp8" : "none",
                                               .batch_invariant = has("--batch-invariant")});
}
