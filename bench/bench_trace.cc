// The whole engine under an open load, as S-LoRA's evaluation has it (Sheng et al. 2023, section 7):
// Gamma arrivals with a coefficient of variation of 1, adapters by a power law with exponent 1,
// prompts and answers of 8 to 512 tokens, random weights.
//   bench_trace 8b|7b REQUESTS_PER_SECOND SECONDS RANKS ADAPTERS...
// RANKS: comma-separated, taken in turn. One line for each of ADAPTERS; 0: the base alone. Adapters
// of one rank have the same values in the host's memory; each is packed and copied for itself.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "bench/device.h"
#include "bench/synthetic_engine.h"
#include "engine/base/check.h"

namespace lorikeet::bench {
namespace {

constexpr int32_t kLeastTokens = 8, kMostTokens = 512;
constexpr double kWarmUpSeconds = 8;
constexpr double kSloSeconds = 6;  // to the first token

struct Open {
  std::shared_ptr<TokenSink> sink;
  int64_t arrival_us = 0;
  int64_t last_us = 0;  // 0: no token yet
};

struct Measured {
  std::vector<double> first_ms, between_ms;
  int64_t finished = 0;
  double seconds = 0;
};

double Percentile(std::vector<double>& values, double share) {
  if (values.empty()) return NAN;
  const auto at = values.begin() + static_cast<int64_t>(share * (values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

class Trace {
 public:
  Trace(Engine* engine, const Clock* clock, double rate,
        std::vector<std::shared_ptr<const Adapter>> adapters)
      : engine_(engine), clock_(clock), arrivals_(rate), adapters_(std::move(adapters)) {
    std::vector<double> weights;
    for (size_t i = 0; i < adapters_.size(); ++i) weights.push_back(1.0 / (i + 1.0));
    popularity_ = std::discrete_distribution<int32_t>(weights.begin(), weights.end());
  }

  // Requests that arrive within `seconds`, to their end.
  Measured Run(double seconds) {
    Measured out;
    const int64_t begin_us = clock_->NowMicros();
    const int64_t end_us = begin_us + static_cast<int64_t>(seconds * 1e6);
    int64_t next_us = begin_us + Wait();
    while (next_us < end_us || !open_.empty()) {
      const int64_t now_us = clock_->NowMicros();
      for (; next_us < end_us && next_us <= now_us; next_us += Wait()) Submit(next_us);
      std::erase_if(open_, [&](Open& open) { return Drain(&open, &out); });
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    out.seconds = static_cast<double>(clock_->NowMicros() - begin_us) * 1e-6;
    return out;
  }

 private:
  int64_t Wait() { return static_cast<int64_t>(arrivals_(rng_) * 1e6); }

  void Submit(int64_t arrival_us) {
    std::uniform_int_distribution<int32_t> tokens(kLeastTokens, kMostTokens);
    Request request;
    for (int32_t n = tokens(rng_); n > 0; --n) {
      request.prompt.push_back(static_cast<int32_t>(rng_() % 30000));
    }
    request.sampling.temperature = 0;
    request.max_new_tokens = tokens(rng_);
    request.ignore_eos = true;
    if (!adapters_.empty()) {
      request.adapter = AdapterLease(adapters_[popularity_(rng_)]);
      request.adapter_name = "adapter";
    }
    auto sink = std::make_shared<TokenSink>(request.max_new_tokens + 2, [] {});
    const absl::StatusOr<RequestId> id = engine_->Submit(std::move(request), sink);
    LK_CHECK_MSG(id.ok(), id.status().ToString());
    open_.push_back({std::move(sink), arrival_us, 0});
  }

  // True: finished.
  bool Drain(Open* open, Measured* out) {
    TokenEvent event;
    while (open->sink->Pop(&event)) {
      if (event.kind == TokenEvent::Kind::kFinished) {
        LK_CHECK_MSG(event.finish == FinishReason::kLength, event.status.ToString());
        ++out->finished;
        return true;
      }
      const int64_t before_us = open->last_us == 0 ? open->arrival_us : open->last_us;
      (open->last_us == 0 ? out->first_ms : out->between_ms)
          .push_back(static_cast<double>(event.time_us - before_us) * 1e-3);
      open->last_us = event.time_us;
    }
    return false;
  }

  Engine* const engine_;
  const Clock* const clock_;
  std::exponential_distribution<double> arrivals_;  // Gamma with cv 1
  const std::vector<std::shared_ptr<const Adapter>> adapters_;
  std::discrete_distribution<int32_t> popularity_;
  std::mt19937 rng_{1};
  std::vector<Open> open_;
};

void Print(int32_t adapters, Measured result, const StepSums& steps, int64_t steps_before,
           int64_t micros_before, int64_t dropped_before) {
  const double count = static_cast<double>(steps.steps - steps_before);
  const auto within = std::count_if(result.first_ms.begin(), result.first_ms.end(),
                                    [](double ms) { return ms <= kSloSeconds * 1e3; });
  std::printf("%8d %10.2f %8.2f %9.2f %9.2f %10.1f %10.1f %6.1f%% %8.2f %10.1f %9ld\n", adapters,
              static_cast<double>(result.finished) / result.seconds,
              Percentile(result.between_ms, 0.5), Percentile(result.between_ms, 0.9),
              Percentile(result.between_ms, 0.99), Percentile(result.first_ms, 0.5),
              Percentile(result.first_ms, 0.99),
              100.0 * static_cast<double>(within) / static_cast<double>(result.first_ms.size()),
              static_cast<double>(steps.micros - micros_before) / count * 1e-3,
              static_cast<double>(steps.dropped - dropped_before) / result.seconds,
              static_cast<long>(steps.preempted));
  std::fflush(stdout);
}

int Run(const ModelConfig& config, double rate, double seconds, const std::vector<int32_t>& ranks,
        const std::vector<int32_t>& counts) {
  SyntheticEngine engine(config);
  std::printf("%s, %.1f GiB of pages, %.1f requests/s for %.0f s\n", DeviceName().c_str(),
              static_cast<double>(engine.options().pages) *
                  static_cast<double>(engine.options().kv.page_bytes()) / (1 << 30),
              rate, seconds);
  std::printf("%8s %10s %8s %9s %9s %10s %10s %7s %8s %10s %9s\n", "adapters", "requests/s",
              "ITL p50", "ITL p90", "ITL p99", "TTFT p50", "TTFT p99", "SLO", "step ms",
              "drops/s", "preempted");
  for (const int32_t count : counts) {
    Trace trace(engine.engine(), &engine.clock(), rate,
                SyntheticAdapters(engine.model(), count, ranks));
    trace.Run(kWarmUpSeconds);
    const StepSums& steps = engine.sums();
    const int64_t steps_before = steps.steps, micros = steps.micros, dropped = steps.dropped;
    Print(count, trace.Run(seconds), steps, steps_before, micros, dropped);
  }
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "bench_trace 8b|7b REQUESTS_PER_SECOND SECONDS RANKS ADAPTERS...\n");
    return 2;
  }
  std::vector<int32_t> ranks, counts;
  std::stringstream list(argv[4]);
  for (std::string rank; std::getline(list, rank, ',');) ranks.push_back(std::atoi(rank.c_str()));
  for (int i = 5; i < argc; ++i) counts.push_back(std::atoi(argv[i]));
  const bool small = std::strcmp(argv[1], "7b") == 0;
  return lorikeet::bench::Run(small ? lorikeet::bench::Llama7B() : lorikeet::bench::Llama8B(),
                              std::atof(argv[2]), std::atof(argv[3]), ranks, counts);
}
