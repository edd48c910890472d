// What ten thousand adapters cost beside five, on SmolLM2-135M's shapes with random weights: 64 streams in a closed
// loop, 128 tokens in and 64 out, adapters of ranks 8, 16, 32 and 64 in turn on all seven linears, their popularity by
// Zipf's law with exponent 1. Rounds over five and over all come by turns, with the same prompts.
//   bench_popular SECONDS PAIRS GIB...
// SECONDS a round; GIB of pages, as a pool each: what has no room there is packed and copied once more when it is asked
// for; 0: what the device can spare. Adapters of one rank have the same values in the host's memory.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "bench/device.h"
#include "bench/synthetic_engine.h"
#include "engine/base/check.h"

namespace lorikeet::bench {
namespace {

constexpr int32_t kStreams = 64, kPrompt = 128, kOutput = 64, kFew = 5, kMany = 10000;
constexpr double kSettleSeconds = 0.7;  // longer than an answer

using Adapters = std::vector<std::shared_ptr<const Adapter>>;

struct Round {
  double tokens_per_second = 0, step_ms = 0;
  int64_t hits = 0, misses = 0;  // requests whose adapter was on the device when they came, and others
};

class Streams {
 public:
  Streams(SyntheticEngine* engine, Adapters adapters) : engine_(engine), adapters_(std::move(adapters)) {
    for (size_t i = 0; i < adapters_.size(); ++i) {
      popularity_.push_back((i == 0 ? 0 : popularity_.back()) + 1 / (static_cast<double>(i) + 1));
    }
  }

  // The most popular `count` come to the device, the most popular last, so that it evicts others first.
  void Fetch(int32_t count) {
    for (; count > 0 || !streams_.empty(); DropFinished()) {
      for (; count > 0 && streams_.size() < kStreams; --count) streams_.push_back(Submit(count - 1, 1));
    }
  }

  // Over the most popular `count`.
  Round Run(int32_t count, uint32_t seed, double seconds) {
    rng_.seed(seed);
    drawn_ = std::uniform_real_distribution<>(0, popularity_[count - 1]);
    if (streams_.empty()) {
      for (int32_t i = 0; i < kStreams; ++i) streams_.push_back(SubmitDrawn());
    }
    Poll(kSettleSeconds);
    const StepSums& sums = engine_->sums();
    const int64_t steps = sums.steps, micros = sums.micros, hits = sums.hits, misses = sums.misses;
    const double begin = Now();
    const int64_t tokens = Poll(seconds);
    return {static_cast<double>(tokens) / (Now() - begin),
            static_cast<double>(sums.micros - micros) / static_cast<double>(sums.steps - steps) * 1e-3,
            sums.hits - hits, sums.misses - misses};
  }

  // Before the engine goes.
  void Stop() {
    while (!streams_.empty()) DropFinished();
  }

 private:
  void DropFinished() {
    int64_t tokens = 0;
    std::erase_if(streams_, [&](const auto& sink) { return Drain(sink.get(), &tokens); });
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }

  std::shared_ptr<TokenSink> Submit(size_t which, int32_t tokens) {
    Request request;
    const auto vocab = static_cast<uint32_t>(engine_->options().vocab);
    for (int32_t i = 0; i < kPrompt; ++i) request.prompt.push_back(static_cast<int32_t>(rng_() % vocab));
    request.sampling.temperature = 0;
    request.max_new_tokens = tokens;
    request.ignore_eos = true;
    request.adapter = AdapterLease(adapters_[which]);
    request.adapter_name = "adapter";
    auto sink = std::make_shared<TokenSink>(tokens + 2, [] {});
    const absl::StatusOr<RequestId> id = engine_->engine()->Submit(std::move(request), sink);
    LK_CHECK_MSG(id.ok(), id.status().ToString());
    return sink;
  }

  std::shared_ptr<TokenSink> SubmitDrawn() {
    const auto at = std::upper_bound(popularity_.begin(), popularity_.end() - 1, drawn_(rng_));
    return Submit(at - popularity_.begin(), kOutput);
  }

  // Adds the tokens that came; true: it has finished.
  static bool Drain(TokenSink* sink, int64_t* tokens) {
    TokenEvent event;
    while (sink->Pop(&event)) {
      if (event.kind == TokenEvent::Kind::kFinished) {
        LK_CHECK_MSG(event.finish == FinishReason::kLength, event.status.ToString());
        return true;
      }
      ++*tokens;
    }
    return false;
  }

  // The tokens that came in `seconds`; who has finished makes room for another at once.
  int64_t Poll(double seconds) {
    int64_t tokens = 0;
    for (const double end = Now() + seconds; Now() < end;) {
      for (auto& sink : streams_) {
        if (Drain(sink.get(), &tokens)) sink = SubmitDrawn();
      }
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return tokens;
  }

  SyntheticEngine* const engine_;
  const Adapters adapters_;          // the most popular first
  std::vector<double> popularity_;   // summed up
  std::uniform_real_distribution<double> drawn_;
  std::mt19937 rng_;
  std::vector<std::shared_ptr<TokenSink>> streams_;
};

double MissedPercent(const std::vector<Round>& rounds) {
  int64_t hits = 0, misses = 0;
  for (const Round& round : rounds) hits += round.hits, misses += round.misses;
  return 100 * static_cast<double>(misses) / static_cast<double>(hits + misses);
}

template <typename Value>
double MedianOf(const std::vector<Round>& rounds, Value Round::*value) {
  std::vector<double> values;
  for (const Round& round : rounds) values.push_back(round.*value);
  return Median(std::move(values));
}

void Measure(int64_t pool_bytes, double seconds, int pairs) {
  SyntheticEngine engine(SmolLM2(), {.kv_bytes = pool_bytes});
  const EngineOptions& options = engine.options();
  const int64_t bytes = int64_t{options.pages} * options.kv.page_bytes();
  const Adapters adapters = SyntheticAdapters(engine.model(), kMany, {8, 16, 32, 64});
  int32_t room = 0;
  for (int64_t used = 0; room < kMany && used < bytes; ++room) used += adapters[room]->bytes;
  Streams streams(&engine, adapters);
  streams.Fetch(room);
  std::vector<Round> few, many;
  std::vector<double> shares;
  for (int pair = 0; pair < pairs; ++pair) {
    few.push_back(streams.Run(kFew, pair, seconds));
    many.push_back(streams.Run(kMany, pair, seconds));
    shares.push_back(100 * many.back().tokens_per_second / few.back().tokens_per_second);
  }
  streams.Stop();
  for (const auto& [count, rounds] : {std::pair(kFew, &few), std::pair(kMany, &many)}) {
    std::printf("%8.1f %9d %10.0f %9.2f %8.1f%%\n", static_cast<double>(bytes) / (1 << 30), count,
                MedianOf(*rounds, &Round::tokens_per_second), MedianOf(*rounds, &Round::step_ms),
                MissedPercent(*rounds));
  }
  std::sort(shares.begin(), shares.end());
  std::printf("%8s %d beside %d: %.1f %% (pairs %.1f to %.1f), room for %d\n", "", kMany, kFew, Median(shares),
              shares.front(), shares.back(), room);
  std::fflush(stdout);
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  using namespace lorikeet::bench;
  if (argc < 4) {
    std::fprintf(stderr, "bench_popular SECONDS PAIRS GIB...\n");
    return 2;
  }
  std::printf("%s, %d streams of %d tokens in, %d out\n", DeviceName().c_str(), kStreams, kPrompt, kOutput);
  std::printf("%8s %9s %10s %9s %9s\n", "GiB", "adapters", "tokens/s", "step ms", "missed");
  for (int i = 3; i < argc; ++i) {
    Measure(static_cast<int64_t>(std::atof(argv[i]) * (1 << 30)), std::atof(argv[1]), std::atoi(argv[2]));
  }
  return 0;
}
