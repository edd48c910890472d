// The whole engine under an open load, as S-LoRA's evaluation has it (Sheng et al. 2023, section 7):
// Gamma arrivals with a coefficient of variation of 1, adapters by a power law with exponent 1,
// prompts and answers of 8 to 512 tokens, random weights.
//   bench_trace 8b|7b RATES SECONDS RANKS ADAPTERS...
// RATES, requests a second, and RANKS, taken in turn: comma-separated. One line for each of RATES and
// ADAPTERS; 0: the base alone. Adapters of one rank have the same values in the host's memory; each is
// packed and copied for itself. Traffic has run for kWarmUpSeconds when the SECONDS begin, and done/s are the
// answers that end within them: what came/s where the engine holds the rate, what it is able to where not.
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

// Within the seconds that are measured.
struct Measured {
  std::vector<double> first_ms;    // of requests that came in them
  std::vector<double> between_ms;  // of tokens that came in them
  int64_t finished = 0;
  int64_t steps = 0, step_us = 0, dropped = 0, preempted = 0;
};

double Percentile(std::vector<double>& values, double share) {
  if (values.empty()) return NAN;
  const auto at = values.begin() + static_cast<int64_t>(share * (values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

class Trace {
 public:
  Trace(SyntheticEngine* engine, double rate, std::vector<std::shared_ptr<const Adapter>> adapters)
      : engine_(engine), arrivals_(rate), adapters_(std::move(adapters)) {
    std::vector<double> weights;
    for (size_t i = 0; i < adapters_.size(); ++i) weights.push_back(1.0 / (i + 1.0));
    popularity_ = std::discrete_distribution<int32_t>(weights.begin(), weights.end());
  }

  // Requests that arrive within the warm-up and `seconds`, to their end.
  Measured Run(double seconds) {
    const int64_t start_us = engine_->clock().NowMicros();
    next_us_ = start_us + Wait();
    begin_us_ = start_us + static_cast<int64_t>(kWarmUpSeconds * 1e6);
    end_us_ = begin_us_ + static_cast<int64_t>(seconds * 1e6);
    PollUntil(begin_us_);
    CountSteps(-1);
    PollUntil(end_us_);
    CountSteps(1);
    while (!open_.empty()) Poll();
    return std::move(out_);
  }

 private:
  int64_t Wait() { return static_cast<int64_t>(arrivals_(rng_) * 1e6); }
  bool IsMeasured(int64_t us) const { return us >= begin_us_ && us < end_us_; }

  void PollUntil(int64_t end_us) {
    for (int64_t now_us = 0; now_us < end_us;) {
      now_us = engine_->clock().NowMicros();
      for (; next_us_ < std::min(now_us, end_us); next_us_ += Wait()) Submit(next_us_);
      Poll();
    }
  }

  void Poll() {
    std::erase_if(open_, [&](Open& open) { return Drain(&open); });
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }

  void CountSteps(int64_t sign) {
    const StepSums& sums = engine_->sums();
    out_.steps += sign * sums.steps;
    out_.step_us += sign * sums.micros;
    out_.dropped += sign * sums.dropped;
    out_.preempted += sign * sums.preempted;
  }

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
    const absl::StatusOr<RequestId> id = engine_->engine()->Submit(std::move(request), sink);
    LK_CHECK_MSG(id.ok(), id.status().ToString());
    open_.push_back({std::move(sink), arrival_us, 0});
  }

  // True: finished.
  bool Drain(Open* open) {
    TokenEvent event;
    while (open->sink->Pop(&event)) {
      if (event.kind == TokenEvent::Kind::kFinished) {
        LK_CHECK_MSG(event.finish == FinishReason::kLength, event.status.ToString());
        out_.finished += IsMeasured(event.time_us);
        return true;
      }
      const bool first = open->last_us == 0;
      const int64_t before_us = first ? open->arrival_us : open->last_us;
      if (IsMeasured(first ? open->arrival_us : event.time_us)) {
        (first ? out_.first_ms : out_.between_ms)
            .push_back(static_cast<double>(event.time_us - before_us) * 1e-3);
      }
      open->last_us = event.time_us;
    }
    return false;
  }

  SyntheticEngine* const engine_;
  std::exponential_distribution<double> arrivals_;  // Gamma with cv 1
  const std::vector<std::shared_ptr<const Adapter>> adapters_;
  std::discrete_distribution<int32_t> popularity_;
  std::mt19937 rng_{1};
  int64_t next_us_ = 0, begin_us_ = 0, end_us_ = 0;  // the next arrival; what is measured
  std::vector<Open> open_;
  Measured out_;
};

void Print(int32_t adapters, double rate, double seconds, Measured result) {
  const auto within = std::count_if(result.first_ms.begin(), result.first_ms.end(),
                                    [](double ms) { return ms <= kSloSeconds * 1e3; });
  const auto came = static_cast<double>(result.first_ms.size());
  std::printf("%8.1f %8d %8.2f %8.2f %8.2f %8.2f %8.2f %9.1f %9.1f %6.1f%% %8.2f %8.1f %9ld\n", rate,
              adapters, came / seconds, static_cast<double>(result.finished) / seconds,
              Percentile(result.between_ms, 0.5), Percentile(result.between_ms, 0.9),
              Percentile(result.between_ms, 0.99), Percentile(result.first_ms, 0.5),
              Percentile(result.first_ms, 0.99), 100.0 * static_cast<double>(within) / came,
              static_cast<double>(result.step_us) / static_cast<double>(result.steps) * 1e-3,
              static_cast<double>(result.dropped) / seconds, static_cast<long>(result.preempted));
  std::fflush(stdout);
}

int Run(const ModelConfig& config, const std::vector<double>& rates, double seconds,
        const std::vector<int32_t>& ranks, const std::vector<int32_t>& counts) {
  SyntheticEngine engine(config);
  std::printf("%s, %.1f GiB of pages, %.0f s\n", DeviceName().c_str(),
              static_cast<double>(engine.options().pages) *
                  static_cast<double>(engine.options().kv.page_bytes()) / (1 << 30),
              seconds);
  std::printf("%8s %8s %8s %8s %8s %8s %8s %9s %9s %7s %8s %8s %9s\n", "rate", "adapters", "came/s",
              "done/s", "ITL p50", "ITL p90", "ITL p99", "TTFT p50", "TTFT p99", "SLO", "step ms",
              "drops/s", "preempted");
  for (const double rate : rates) {
    for (const int32_t count : counts) {
      Trace trace(&engine, rate, SyntheticAdapters(engine.model(), count, ranks));
      Print(count, rate, seconds, trace.Run(seconds));
    }
  }
  return 0;
}

// Comma-separated.
std::vector<double> Numbers(const char* text) {
  std::vector<double> out;
  std::stringstream list(text);
  for (std::string number; std::getline(list, number, ',');) out.push_back(std::atof(number.c_str()));
  return out;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  using namespace lorikeet::bench;
  if (argc < 6) {
    std::fprintf(stderr, "bench_trace 8b|7b RATES SECONDS RANKS ADAPTERS...\n");
    return 2;
  }
  const std::vector<double> ranks = Numbers(argv[4]);
  std::vector<int32_t> counts;
  for (int i = 5; i < argc; ++i) counts.push_back(std::atoi(argv[i]));
  const bool small = std::strcmp(argv[1], "7b") == 0;
  return Run(small ? Llama7B() : Llama8B(), Numbers(argv[2]), std::atof(argv[3]),
             {ranks.begin(), ranks.end()}, counts);
}
