// What loads of adapters cost everybody else, over a synthetic Llama-3.1-8B whose pool holds fewer
// adapters than are asked for: streams decode while requests for one token, each with an adapter of its
// own, come at a rate.
//   bench_loads [RATE...]   requests a second; 50 without
// Each rate is run twice: over adapters that stay on the device, then over more than have room, all
// of which the host has packed. The difference is what loading costs. Then bursts of requests for
// adapters that are not there: bytes a second, beside a plain copy of pinned memory of the same size. Last, as
// many requests as there are streams, each followed by another: tokens a second while 20 of them a second have an
// adapter that is not there, beside the same requests with adapters that are, in pairs.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "bench/device.h"
#include "bench/synthetic_engine.h"
#include "engine/base/check.h"

namespace lorikeet::bench {
namespace {

constexpr int64_t kPoolBytes = int64_t{12} << 30;
constexpr int32_t kRank = 16;
constexpr int32_t kStreams = 32, kStreamAdapters = 8, kHot = 32;
constexpr int32_t kPrompt = 32;
constexpr double kSeconds = 8;
constexpr int32_t kPairs = 6;
constexpr double kRampSeconds = 1, kRoundSeconds = 4, kRoundLoads = 20;  // loads a second
constexpr int32_t kBursts = 5, kBurst = 64;

double Percentile(std::vector<double> values, double share) {
  if (values.empty()) return NAN;
  const auto at = values.begin() + static_cast<int64_t>(share * (values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

using Adapters = std::vector<std::shared_ptr<const Adapter>>;

// Requests that are answered and forgotten, or started again.
class Client {
 public:
  struct Open {
    std::shared_ptr<TokenSink> sink;
    int64_t sent_us = 0, last_us = 0;  // of the last token; 0: none yet
  };

  Client(Engine* engine, const Clock* clock) : engine_(engine), clock_(clock) {}

  void Submit(const std::shared_ptr<const Adapter>& adapter, int32_t tokens) {
    Request request;
    for (int32_t i = 0; i < kPrompt; ++i) request.prompt.push_back(static_cast<int32_t>(rng_() % 30000));
    request.sampling.temperature = 0;
    request.max_new_tokens = tokens;
    request.ignore_eos = true;
    request.adapter = AdapterLease(adapter);
    request.adapter_name = "adapter";
    auto sink = std::make_shared<TokenSink>(tokens + 2, [] {});
    const absl::StatusOr<RequestId> id = engine_->Submit(std::move(request), sink);
    LK_CHECK_MSG(id.ok(), id.status().ToString());
    open_.push_back({std::move(sink), clock_->NowMicros(), 0});
  }

  // Pops what has come.
  void Poll() {
    std::erase_if(open_, [&](Open& open) { return Drain(&open); });
  }
  bool idle() const { return open_.empty(); }
  int32_t open() const { return static_cast<int32_t>(open_.size()); }
  int64_t tokens() const { return static_cast<int64_t>(first_ms.size() + between_ms.size()); }

  std::vector<double> first_ms, between_ms, copy_ms;
  int64_t last_us = 0;  // of any token

 private:
  bool Drain(Open* open) {
    TokenEvent event;
    while (open->sink->Pop(&event)) {
      if (event.kind == TokenEvent::Kind::kFinished) {
        LK_CHECK_MSG(event.finish == FinishReason::kLength, event.status.ToString());
        return true;
      }
      last_us = event.time_us;
      const bool first = open->last_us == 0;
      const int64_t before_us = first ? open->sent_us : open->last_us;
      (first ? first_ms : between_ms).push_back(static_cast<double>(event.time_us - before_us) * 1e-3);
      if (first) copy_ms.push_back(static_cast<double>(event.adapter_copy_us) * 1e-3);
      open->last_us = event.time_us;
    }
    return false;
  }

  Engine* const engine_;
  const Clock* const clock_;
  std::mt19937 rng_{1};
  std::vector<Open> open_;
};

struct Loads {
  SyntheticEngine* engine;
  Adapters streams, hot, cold;
  size_t next_cold = 0;

  // Of more than have room the one used longest ago: it is not there.
  const std::shared_ptr<const Adapter>& NextCold() { return cold[next_cold++ % cold.size()]; }

  // So that they are there, packed first if need be.
  void Fetch(const Adapters& adapters) {
    Client client(engine->engine(), &engine->clock());
    for (const auto& adapter : adapters) client.Submit(adapter, 1);
    while (!client.idle()) client.Poll();
  }

  // kStreams streams, and beside them requests at a rate.
  void Run(bool loads, double rate) {
    Fetch(hot);
    Client streams_client(engine->engine(), &engine->clock());
    Client client(engine->engine(), &engine->clock());
    const auto tokens = static_cast<int32_t>(kSeconds * 110);  // outlast the requests
    for (int32_t i = 0; i < kStreams; ++i) {
      streams_client.Submit(streams[i % streams.size()], tokens);
    }
    const double begin = Now();
    while (Now() < begin + 1) streams_client.Poll();
    streams_client.between_ms.clear();
    const Engine::Gauges before = engine->engine()->gauges();
    int64_t sent = 0;
    const double start = Now();
    while (Now() < start + kSeconds - 2) {
      for (; static_cast<double>(sent) < (Now() - start) * rate; ++sent) {
        client.Submit(loads ? NextCold() : hot[sent % hot.size()], 1);
      }
      client.Poll();
      streams_client.Poll();
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    const Engine::Gauges after = engine->engine()->gauges();
    const double seconds = Now() - start;
    const std::vector<double> between = streams_client.between_ms;
    while (!client.idle() || !streams_client.idle()) {
      client.Poll();
      streams_client.Poll();
    }
    std::printf("%-6s %8.0f %9.1f %8.3f %8.3f %8.3f %9.2f %9.2f %9.2f %8ld\n", loads ? "cold" : "hot",
                rate, static_cast<double>(after.images.loads - before.images.loads) / seconds,
                Percentile(between, 0.5), Percentile(between, 0.9), Percentile(between, 0.99),
                Percentile(client.first_ms, 0.5), Percentile(client.first_ms, 0.99),
                Percentile(client.copy_ms, 0.5),
                static_cast<long>(after.decode_waits - before.decode_waits));
    std::fflush(stdout);
  }

  struct Round {
    double tokens = 0, loads = 0;  // a second
  };

  // kStreams requests at a time, kRoundLoads of them a second with adapters that are not there or, without
  // `loads`, with others that are.
  Round RunClosed(bool loads) {
    Fetch(hot);
    Client client(engine->engine(), &engine->clock());
    int32_t sent = 0, others = 0;
    const double begin = Now();
    const auto until = [&](double end) {
      while (Now() < end) {
        for (; client.open() < kStreams; ++sent) {
          const int32_t tokens = 32 + sent * 37 % 64;
          if (others >= (Now() - begin) * kRoundLoads) {
            client.Submit(streams[sent % streams.size()], tokens);
          } else {
            client.Submit(loads ? NextCold() : hot[others % hot.size()], tokens);
            ++others;
          }
        }
        client.Poll();
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    };
    until(begin + kRampSeconds);
    const double start = Now();
    const int64_t tokens = client.tokens(), images = engine->engine()->gauges().images.loads;
    until(start + kRoundSeconds);
    const double seconds = Now() - start;
    const Round round{static_cast<double>(client.tokens() - tokens) / seconds,
                      static_cast<double>(engine->engine()->gauges().images.loads - images) / seconds};
    while (!client.idle()) client.Poll();
    return round;
  }

  void RunPairs() {
    std::vector<double> rates, shares, arrived;
    for (int32_t pair = 0; pair < kPairs; ++pair) {
      Round rounds[2];  // without and with loads
      for (const bool loads : {pair % 2 == 1, pair % 2 == 0}) rounds[loads] = RunClosed(loads);
      rates.push_back(rounds[0].tokens);
      shares.push_back(100 * rounds[1].tokens / rounds[0].tokens);
      arrived.push_back(rounds[1].loads);
    }
    std::printf("%d requests at a time: %.0f tokens/s; with %.1f loads a second %.1f %% of that in a pair "
                "(%.1f to %.1f in %d)\n",
                kStreams, Median(rates), Median(arrived), Median(shares),
                *std::min_element(shares.begin(), shares.end()),
                *std::max_element(shares.begin(), shares.end()), kPairs);
    std::fflush(stdout);
  }

  // `pinned`: bytes a second of a plain copy.
  void RunBursts(double pinned) {
    std::vector<double> there, answered;
    int64_t loads = engine->engine()->gauges().images.loads;
    for (int32_t i = 0; i < kBursts; ++i) {
      Client client(engine->engine(), &engine->clock());
      const int64_t begin_us = engine->clock().NowMicros();
      const int64_t bytes = engine->engine()->gauges().images.load_bytes;
      for (int32_t j = 0; j < kBurst; ++j) client.Submit(NextCold(), 1);
      while (!client.idle()) client.Poll();
      const auto loaded =
          static_cast<double>(engine->engine()->gauges().images.load_bytes - bytes);
      there.push_back(loaded / static_cast<double>(engine->last_image_us() - begin_us) * 1e6);
      answered.push_back(loaded / static_cast<double>(client.last_us - begin_us) * 1e6);
    }
    loads = engine->engine()->gauges().images.loads - loads;
    std::printf("%d bursts of %d cold adapters, %ld loads: %.1f GB/s until the last is there, %.0f %% of "
                "pinned memory's %.1f; %.1f GB/s, %.0f %%, until the last answer\n",
                kBursts, kBurst, static_cast<long>(loads), Median(there) / 1e9,
                100 * Median(there) / pinned, pinned / 1e9, Median(answered) / 1e9,
                100 * Median(answered) / pinned);
    std::fflush(stdout);
  }
};

// Bytes a second of one copy of `bytes` of pinned memory after another.
double PinnedRate(int64_t bytes) {
  void* host = nullptr;
  Check(cudaMallocHost(&host, bytes), "pinned memory");
  const DeviceBytes device(bytes);
  std::vector<double> seconds;
  for (int i = 0; i < 9; ++i) {
    const double begin = Now();
    for (int j = 0; j < 8; ++j) {
      Check(cudaMemcpyAsync(device.data(), host, bytes, cudaMemcpyHostToDevice, nullptr), "a copy");
    }
    Check(cudaDeviceSynchronize(), "a copy");
    seconds.push_back((Now() - begin) / 8);
  }
  cudaFreeHost(host);
  return static_cast<double>(bytes) / Median(seconds);
}

int Run(const std::vector<double>& rates) {
  SyntheticEngine engine(Llama8B(), {.kv_bytes = kPoolBytes});
  const int64_t each = AdapterBytes(engine.model(), kRank);
  // A third more than have room.
  const auto cold_count = static_cast<int32_t>(kPoolBytes / each * 4 / 3);
  const Adapters all = SyntheticAdapters(engine.model(), kStreamAdapters + kHot + cold_count, {kRank});
  Loads bench{.engine = &engine,
              .streams{all.begin(), all.begin() + kStreamAdapters},
              .hot{all.begin() + kStreamAdapters, all.begin() + kStreamAdapters + kHot},
              .cold{all.begin() + kStreamAdapters + kHot, all.end()}};
  std::printf("%s, %d streams over %d adapters of rank %d, %.1f MB each; %.1f GiB of pages; hot: %d "
              "adapters, cold: %d in turn\n",
              DeviceName().c_str(), kStreams, kStreamAdapters, kRank, static_cast<double>(each) / 1e6,
              static_cast<double>(kPoolBytes) / (1 << 30), kHot, cold_count);
  bench.Fetch(bench.cold);
  std::printf("%-6s %8s %9s %8s %8s %8s %9s %9s %9s %8s\n", "", "rate", "loads/s", "ITL p50", "p90",
              "p99", "TTFT p50", "p99", "copy p50", "waited");
  for (const double rate : rates) {
    for (int i = 0; i < 2; ++i) {  // twice, for the noise
      bench.Run(false, rate);
      bench.Run(true, rate);
    }
  }
  bench.RunBursts(PinnedRate(each));
  bench.RunPairs();
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  std::vector<double> rates;
  for (int i = 1; i < argc; ++i) rates.push_back(std::atof(argv[i]));
  if (rates.empty()) rates = {50};
  return lorikeet::bench::Run(rates);
}
