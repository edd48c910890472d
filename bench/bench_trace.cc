// The whole engine under an open load, as S-LoRA's evaluation has it (Sheng et al. 2023, section 7):
// Gamma arrivals with a coefficient of variation of 1, adapters by a power law with exponent 1,
// prompts and answers of 8 to 512 tokens, random weights.
//   bench_trace 8b|7b SECONDS (RANKS RATES ADAPTERS)...
// RANKS, taken in turn, RATES, requests a second, and ADAPTERS, 0: the base alone, are comma-separated; a
// line for each rate and number of adapters. 7b's adapters are on q, k, v and o alone, as the target_modules
// of S-LoRA's own are, 8b's on all seven linears. Adapters of one rank have the same values in the host's
// memory; each is packed and copied for itself, once for all lines.
//
// Traffic does not pause between lines. Before the SECONDS of one begin it has run for as many steps as
// the longest answer has tokens, where the rate is new for twice as many. done/s are the answers that end
// within them: as many as came, but for how many more or fewer are open when they end.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <span>
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
constexpr double kSloSeconds = 6;  // to the first token

using Adapters = std::vector<std::shared_ptr<const Adapter>>;

struct Open {
  std::shared_ptr<TokenSink> sink;
  int64_t arrival_us = 0;
  int64_t last_us = 0;  // 0: no token yet
};

// Within the seconds that are measured.
struct Measured {
  size_t open_before = 0, open_after = 0;  // requests
  size_t came = 0;
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
  explicit Trace(SyntheticEngine* engine) : engine_(engine) {}

  // `adapters`: the most popular first.
  Measured Run(double rate, std::span<const std::shared_ptr<const Adapter>> adapters,
               int64_t warm_up_steps, double seconds) {
    adapters_ = adapters;
    popularity_.assign(1, 1);
    for (size_t i = 1; i < adapters.size(); ++i) popularity_.push_back(popularity_.back() + 1.0 / (i + 1.0));
    arrivals_ = std::exponential_distribution<double>(rate);
    const int64_t warm = engine_->sums().steps + warm_up_steps;
    Begin(1, 0);
    while (engine_->sums().steps < warm) Poll();
    Begin(2, seconds);
    CountSteps(-1);
    while (Now() < end_us_) Poll();
    CountSteps(1);
    out_.open_after = open_.size();
    const auto most_us = end_us_ + static_cast<int64_t>(kSloSeconds * 1e6);
    while (out_.first_ms.size() < out_.came && Now() < most_us) Poll();
    return std::move(out_);
  }

 private:
  int64_t Now() const { return engine_->clock().NowMicros(); }
  int64_t Wait() { return static_cast<int64_t>(arrivals_(rng_) * 1e6); }
  bool IsMeasured(int64_t us) const { return us >= begin_us_ && us < end_us_; }

  // What comes from now on is the seed's, whatever the adapters and how fast they are; measured for `seconds`.
  void Begin(uint32_t seed, double seconds) {
    rng_.seed(seed);
    out_ = {.open_before = open_.size()};
    begin_us_ = Now();
    end_us_ = begin_us_ + static_cast<int64_t>(seconds * 1e6);
    next_us_ = begin_us_ + Wait();
  }

  void Poll() {
    for (const int64_t now_us = Now(); next_us_ < now_us; next_us_ += Wait()) Submit(next_us_);
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
    const double drawn = std::uniform_real_distribution<>(0, popularity_.back())(rng_);
    const auto which = std::upper_bound(popularity_.begin(), popularity_.end() - 1, drawn);
    if (!adapters_.empty()) {
      request.adapter = AdapterLease(adapters_[which - popularity_.begin()]);
      request.adapter_name = "adapter";
    }
    auto sink = std::make_shared<TokenSink>(request.max_new_tokens + 2, [] {});
    const absl::StatusOr<RequestId> id = engine_->engine()->Submit(std::move(request), sink);
    LK_CHECK_MSG(id.ok(), id.status().ToString());
    open_.push_back({std::move(sink), arrival_us, 0});
    out_.came += IsMeasured(arrival_us);
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
  std::span<const std::shared_ptr<const Adapter>> adapters_;
  std::vector<double> popularity_;  // summed up
  std::mt19937 rng_;
  int64_t next_us_ = 0, begin_us_ = 0, end_us_ = 0;  // the next arrival; what is measured
  std::vector<Open> open_;
  Measured out_;
};

struct Group {
  std::string ranks;
  std::vector<double> rates;
  std::vector<int32_t> counts;  // of adapters
};

void PrintHead() {
  std::printf("%12s %6s %8s %7s %7s %11s %8s %8s %8s %9s %9s %7s %8s %8s %9s\n", "ranks", "rate",
              "adapters", "came/s", "done/s", "open", "ITL p50", "ITL p90", "ITL p99", "TTFT p50",
              "TTFT p99", "SLO", "step ms", "drops/s", "preempted");
  std::fflush(stdout);
}

void Print(const Group& group, double rate, int32_t count, double seconds, Measured result) {
  const auto within = std::count_if(result.first_ms.begin(), result.first_ms.end(),
                                    [](double ms) { return ms <= kSloSeconds * 1e3; });
  const auto came = static_cast<double>(result.came);
  std::printf("%12s %6.1f %8d %7.2f %7.2f %4zu to %4zu %8.2f %8.2f %8.2f %9.1f %9.1f %6.1f%% %8.2f %8.1f %9ld\n",
              group.ranks.c_str(), rate, count, came / seconds,
              static_cast<double>(result.finished) / seconds, result.open_before, result.open_after,
              Percentile(result.between_ms, 0.5), Percentile(result.between_ms, 0.9),
              Percentile(result.between_ms, 0.99), Percentile(result.first_ms, 0.5),
              Percentile(result.first_ms, 0.99), 100.0 * static_cast<double>(within) / came,
              static_cast<double>(result.step_us) / static_cast<double>(result.steps) * 1e-3,
              static_cast<double>(result.dropped) / seconds, static_cast<long>(result.preempted));
  std::fflush(stdout);
}

// Comma-separated.
template <typename Number>
std::vector<Number> Numbers(const std::string& text) {
  std::vector<Number> out;
  std::stringstream list(text);
  for (std::string number; std::getline(list, number, ',');) {
    out.push_back(static_cast<Number>(std::atof(number.c_str())));
  }
  return out;
}

// As many as any group asks for, by ranks.
std::map<std::string, Adapters> AdaptersOf(const ModelSource& model, const std::vector<Group>& groups,
                                           Linear last) {
  std::map<std::string, Adapters> made;
  for (const Group& group : groups) {
    const int32_t most = *std::max_element(group.counts.begin(), group.counts.end());
    Adapters& adapters = made[group.ranks];
    if (static_cast<int32_t>(adapters.size()) >= most) continue;
    adapters = SyntheticAdapters(model, most, Numbers<int32_t>(group.ranks), last);
  }
  return made;
}

// Adapters on a layer's linears up to `last`.
int Run(const ModelConfig& config, Linear last, double seconds, const std::vector<Group>& groups) {
  SyntheticEngine engine(config);
  std::printf("%s, %.1f GiB of pages, %.0f s\n", DeviceName().c_str(),
              static_cast<double>(engine.options().pages) *
                  static_cast<double>(engine.options().kv.page_bytes()) / (1 << 30),
              seconds);
  const std::map<std::string, Adapters> adapters = AdaptersOf(engine.model(), groups, last);
  PrintHead();
  Trace trace(&engine);
  for (const Group& group : groups) {
    for (const double rate : group.rates) {
      int64_t warm_up_steps = 2 * kMostTokens;
      for (const int32_t count : group.counts) {
        const std::span all = adapters.at(group.ranks);
        Print(group, rate, count, seconds, trace.Run(rate, all.first(count), warm_up_steps, seconds));
        warm_up_steps = kMostTokens;
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  using namespace lorikeet::bench;
  using lorikeet::Linear;
  if (argc < 6 || argc % 3 != 0) {
    std::fprintf(stderr, "bench_trace 8b|7b SECONDS (RANKS RATES ADAPTERS)...\n");
    return 2;
  }
  std::vector<Group> groups;
  for (int i = 3; i < argc; i += 3) {
    groups.push_back({argv[i], Numbers<double>(argv[i + 1]), Numbers<int32_t>(argv[i + 2])});
  }
  const double seconds = std::atof(argv[2]);
  if (std::strcmp(argv[1], "7b") == 0) return Run(Llama7B(), Linear::kO, seconds, groups);
  return Run(Llama8B(), Linear::kDown, seconds, groups);
}
