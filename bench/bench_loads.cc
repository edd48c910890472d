// What loads of adapters cost everybody else, over a synthetic Llama-3.1-8B whose pool holds fewer
// adapters than are asked for: streams decode while requests for one token, each with an adapter of its
// own, come at a rate.
//   bench_loads [RATE...]   requests a second; 50 without
// Each rate is run twice: over adapters that stay on the device, then over more than have room, all
// of which the host has packed. The difference is what loading costs. Last, a burst of requests for
// adapters that are not there: bytes a second, beside a plain copy of pinned memory of the same size.
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
  const Adapters* streams;

  // kStreams streams, and beside them requests for `adapters` in turn.
  void Run(const char* what, double rate, const Adapters& adapters, bool print) const {
    Client streams_client(engine->engine(), &engine->clock());
    Client client(engine->engine(), &engine->clock());
    const auto tokens = static_cast<int32_t>(kSeconds * 110);  // outlast the requests
    for (int32_t i = 0; i < kStreams; ++i) {
      streams_client.Submit((*streams)[i % streams->size()], tokens);
    }
    const double begin = Now();
    while (Now() < begin + 1) streams_client.Poll();
    streams_client.between_ms.clear();
    const Engine::Gauges before = engine->engine()->gauges();
    const int64_t dropped = engine->sums().dropped;
    int64_t sent = 0;
    for (double start = Now(); Now() < start + kSeconds - 2;) {
      for (; static_cast<double>(sent) < (Now() - start) * rate; ++sent) {
        client.Submit(adapters[sent % adapters.size()], 1);
      }
      client.Poll();
      streams_client.Poll();
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    const std::vector<double> between = streams_client.between_ms;
    while (!client.idle() || !streams_client.idle()) {
      client.Poll();
      streams_client.Poll();
    }
    if (!print) return;
    std::printf("%-6s %8.0f %9.1f %8.3f %8.3f %8.3f %9.2f %9.2f %9.2f %8ld\n", what, rate,
                static_cast<double>(engine->sums().dropped - dropped) / kSeconds,
                Percentile(between, 0.5), Percentile(between, 0.9), Percentile(between, 0.99),
                Percentile(client.first_ms, 0.5), Percentile(client.first_ms, 0.99),
                Percentile(client.copy_ms, 0.5),
                static_cast<long>(engine->engine()->gauges().decode_waits - before.decode_waits));
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
  const Adapters streams(all.begin(), all.begin() + kStreamAdapters);
  const Adapters hot(all.begin() + kStreamAdapters, all.begin() + kStreamAdapters + kHot);
  const Adapters cold(all.begin() + kStreamAdapters + kHot, all.end());
  std::printf("%s, %d streams over %d adapters of rank %d, %.1f MB each; %.1f GiB of pages; hot: %d "
              "adapters, cold: %d in turn\n",
              DeviceName().c_str(), kStreams, kStreamAdapters, kRank, static_cast<double>(each) / 1e6,
              static_cast<double>(kPoolBytes) / (1 << 30), kHot, cold_count);
  {  // packs all of them
    Client client(engine.engine(), &engine.clock());
    for (const auto& adapter : all) client.Submit(adapter, 1);
    while (!client.idle()) client.Poll();
  }
  std::printf("%-6s %8s %9s %8s %8s %8s %9s %9s %9s %8s\n", "", "rate", "drops/s", "ITL p50", "p90",
              "p99", "TTFT p50", "p99", "copy p50", "waited");
  const Loads loads{&engine, &streams};
  for (const double rate : rates) {
    for (int i = 0; i < 2; ++i) {  // twice, for the noise
      loads.Run("hot", rate, hot, true);
      loads.Run("cold", rate, cold, true);
    }
  }
  const double pinned = PinnedRate(each);
  constexpr int32_t kBurst = 64;
  std::vector<double> shares;
  for (int i = 0; i < 5; ++i) {
    Client client(engine.engine(), &engine.clock());
    const int64_t begin_us = engine.clock().NowMicros();
    for (int32_t j = 0; j < kBurst; ++j) client.Submit(cold[(i * kBurst + j) % cold.size()], 1);
    while (!client.idle()) client.Poll();
    const double seconds = static_cast<double>(client.last_us - begin_us) * 1e-6;
    shares.push_back(static_cast<double>(kBurst * each) / seconds / pinned);
  }
  std::printf("burst of %d cold adapters: %.1f GB/s to the last answer, %.0f %% of pinned memory's %.1f\n",
              kBurst, Median(shares) * pinned / 1e9, 100 * Median(shares), pinned / 1e9);
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
