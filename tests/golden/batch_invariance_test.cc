// With `batch_invariant` a token's logits are the same to the bit whatever its step holds beside it and however
// the tokens before it were cut into steps: with adapters of every kind, models with experts among the bases.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "tests/support/compare_variants.h"
#include "tests/support/model_harness.h"
#include "tests/support/variant_server.h"

namespace lorikeet {
namespace {

constexpr int32_t kLanes = 24;
constexpr int32_t kTokens = 96;  // of a lane at most

// Adapters that a step alone computes: gates per token take a pass of their own.
std::vector<AdapterLease> LoadAdapters(VariantServer* server, const std::string& base) {
  std::vector<AdapterLease> leases;
  for (const VariantCase& c : LoadVariantCases()) {
    if (c.base != base || c.mixture() || !RunsOnTestDevice(c)) continue;
    const auto info = server->Load(c.name);
    LK_CHECK_MSG(info.ok(), info.status().ToString());
    AdapterLease lease = server->Lease(c.adapters);
    const bool alone = lease.get()->gating.experts == 0 && lease.get()->mlp_mixture.experts.empty();
    if (alone) leases.push_back(std::move(lease));
  }
  return leases;
}

std::vector<Lane> RandomLanes(const std::vector<AdapterLease>& adapters, std::mt19937& rng) {
  std::vector<Lane> lanes(kLanes);
  for (Lane& lane : lanes) {
    if (!adapters.empty() && rng() % 4 != 0) lane.adapter = adapters[rng() % adapters.size()];
    const int32_t virtuals = lane.adapter.get() != nullptr ? lane.adapter.get()->virtual_tokens.count : 0;
    for (int32_t k = 0; k < virtuals; ++k) lane.tokens.push_back(-1 - k);
    for (int32_t left = 2 + rng() % 60; left > 0; --left) lane.tokens.push_back(rng() % 300);
    LK_CHECK(static_cast<int32_t>(lane.tokens.size()) <= kTokens);
  }
  return lanes;
}

using Rows = std::vector<std::vector<float>>;

// All lanes in the same steps, each with none, one or several of its tokens.
std::vector<Rows> Together(ModelHarness* harness, std::vector<Lane> lanes, std::mt19937& rng) {
  std::vector<Rows> logits(lanes.size());
  std::vector<Lane*> pointers;
  for (Lane& lane : lanes) pointers.push_back(&lane);
  const auto left = [](const Lane& lane) { return static_cast<int32_t>(lane.tokens.size()) - lane.computed; };
  while (std::any_of(lanes.begin(), lanes.end(), [&](const Lane& lane) { return left(lane) > 0; })) {
    std::vector<int32_t> rows;
    for (const Lane& lane : lanes) {
      const int32_t wanted = rng() % 2 == 0 ? 1 : static_cast<int32_t>(rng() % 20);
      rows.push_back(std::min(left(lane), wanted));
    }
    if (std::all_of(rows.begin(), rows.end(), [](int32_t r) { return r == 0; })) continue;
    auto step = harness->Step(pointers, rows);
    for (size_t i = 0; i < lanes.size(); ++i) std::move(step[i].begin(), step[i].end(), std::back_inserter(logits[i]));
  }
  return logits;
}

// Values that differ, of a row.
int32_t Differing(const std::vector<float>& a, const std::vector<float>& b) {
  int32_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += std::memcmp(&a[i], &b[i], sizeof(float)) != 0;
  return count;
}

void CheckBase(const std::string& base, Precision precision) {
  SCOPED_TRACE(base + (precision == Precision::kExact ? ", exact" : ", fast"));
  VariantServer server(base, {.device = kTestDevice, .kv_bytes = 4 << 20});  // to load adapters with
  const std::vector<AdapterLease> adapters = LoadAdapters(&server, base);
  ModelHarness harness(kGoldenRoot / "models" / base, precision, kLanes, kTokens, 2, /*batch_invariant=*/true);
  std::mt19937 rng(5);
  for (int round = 0; round < 3; ++round) {
    const std::vector<Lane> lanes = RandomLanes(adapters, rng);
    std::vector<Rows> alone;
    for (Lane lane : lanes) alone.push_back(harness.Run(&lane));
    const std::vector<Rows> together = Together(&harness, lanes, rng);
    for (size_t i = 0; i < lanes.size(); ++i) {
      ASSERT_EQ(alone[i].size(), together[i].size());
      for (size_t t = 0; t < alone[i].size(); ++t) {
        ASSERT_EQ(Differing(alone[i][t], together[i][t]), 0) << "round " << round << " lane " << i << " token " << t;
      }
    }
  }
}

TEST(BatchInvariance, LogitsAreTheSameToTheBitInAnyCompany) {
  // Weights of every type that has products of its own, then models with experts.
  for (const std::string base :
       {"llama", "llama3-bf16", "qwen2-f16", "llama-Q8_0.gguf", "llama-fp8", "mixtral", "qwen3-moe"}) {
    CheckBase(base, Precision::kFast);
  }
  if (kTestDevice == std::string("cpu")) CheckBase("llama", Precision::kExact);
}

// Counted on the engine's thread, read once it is gone.
class Preemptions final : public StatsSink {
 public:
  void OnStep(const StepStats& stats) override { count += stats.preempted; }
  int64_t count = 0;
};

Request SampledRequest(int32_t seed, std::mt19937& rng) {
  Request request;
  if (rng() % 3 == 0) request.prompt.assign(17, 7);  // the prefix cache has it from the second on
  for (int32_t left = 1 + rng() % 6; left > 0; --left) request.prompt.push_back(rng() % 300);
  request.max_new_tokens = 30 + rng() % 10;
  request.ignore_eos = true;
  request.sampling.temperature = 1;
  request.sampling.seed = seed;
  request.sampling.top_logprobs = 5;
  return request;
}

void ExpectSame(const std::vector<TokenEvent>& alone, const std::vector<TokenEvent>& together) {
  ASSERT_EQ(alone.size(), together.size());
  for (size_t i = 0; i < alone.size(); ++i) {
    ASSERT_TRUE(alone[i].status.ok() && together[i].status.ok()) << alone[i].status << together[i].status;
    ASSERT_EQ(alone[i].token, together[i].token) << "token " << i;
    ASSERT_EQ(alone[i].logprobs.top, together[i].logprobs.top) << "token " << i;
  }
}

TEST(BatchInvariance, ASeedGivesTheSameAnswerInAnyCompany) {
  constexpr int32_t kRequests = 96;
  constexpr int64_t kPoolBytes = 400 << 10;  // too few for all at a time
  Preemptions preemptions;
  VariantServer server("llama", {.device = kTestDevice, .precision = "fast", .kv_bytes = kPoolBytes,
                                 .batch_invariant = true}, &preemptions);
  const std::vector<AdapterLease> adapters = LoadAdapters(&server, "llama");
  std::mt19937 rng(9);
  std::vector<Request> requests;
  for (int32_t i = 0; i < kRequests; ++i) {
    requests.push_back(SampledRequest(i, rng));
    if (i % 4 != 0) requests[i].adapter = adapters[rng() % 8];
  }
  std::vector<std::vector<TokenEvent>> alone;
  for (const Request& request : requests) alone.push_back(Drain(Submit(&server, request).get()));
  std::vector<std::shared_ptr<TokenSink>> together;
  for (const Request& request : requests) together.push_back(Submit(&server, request));
  for (int32_t i = 0; i < kRequests; ++i) {
    SCOPED_TRACE(i);
    ExpectSame(alone[i], Drain(together[i].get()));
  }
  server.engine()->Shutdown(0);
  EXPECT_GT(preemptions.count, 0);
}

}  // namespace
}  // namespace lorikeet
