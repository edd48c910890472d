// The whole engine on a GPU with every kind of adapter of one base, in a pool that holds few of them:
// requests come, end and are cancelled at random, images come and go, and every answer is what it is
// without recorded steps.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/model_harness.h"
#include "tests/support/variant_server.h"

namespace lorikeet {
namespace {

constexpr char kBase[] = "llama";

struct Plan {
  Request request;       // without its lease
  int32_t adapter = -1;  // of the cases; -1: the base
  int32_t cancel_after = -1;  // tokens; -1: never
};

// Counted on the engine's thread, read once it is gone.
class Counts final : public StatsSink {
 public:
  void OnStep(const StepStats& stats) override {
    ++steps;
    dropped += stats.images_dropped;
    preempted += stats.preempted;
    most_adapters = std::max(most_adapters, stats.distinct_adapters);
    pages_used = stats.pages_used;
  }
  int64_t steps = 0, dropped = 0, preempted = 0;
  int32_t most_adapters = 0, pages_used = 0;
};

std::vector<VariantCase> Cases() {
  std::vector<VariantCase> cases;
  for (VariantCase& c : LoadVariantCases()) {
    if (c.base == kBase && RunsOnTestDevice(c)) cases.push_back(std::move(c));
  }
  return cases;
}

std::vector<Plan> RandomPlans(const std::vector<VariantCase>& cases, int32_t count, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<Plan> plans(count);
  for (Plan& plan : plans) {
    // A few adapters most of the time, so that some images stay and others go.
    const int32_t among = rng() % 3 == 0 ? static_cast<int32_t>(cases.size()) : 8;
    plan.adapter = static_cast<int32_t>(rng() % (among + 1)) - 1;
    for (int32_t i = 1 + rng() % 20; i > 0; --i) plan.request.prompt.push_back(rng() % 300);
    plan.request.max_new_tokens = 1 + rng() % 20;
    plan.request.ignore_eos = true;
    plan.request.sampling.temperature = 0;
    if (rng() % 8 == 0) plan.cancel_after = rng() % 5;
  }
  return plans;
}

// Tokens of each request; those that were cancelled have the first of them.
std::vector<std::vector<int32_t>> Serve(const std::vector<VariantCase>& cases,
                                        const std::vector<Plan>& plans, bool record,
                                        Counts* counts) {
  constexpr int64_t kPoolBytes = 3 << 20;  // a dense adapter takes a tenth of it
  constexpr size_t kOpen = 24;
  VariantServer server(kBase, {.device = "cuda", .precision = "exact", .kv_bytes = kPoolBytes,
                               .record = record}, counts);
  for (const VariantCase& c : cases) {
    if (c.mixture()) continue;
    const auto info = server.Load(c.name);
    LK_CHECK_MSG(info.ok(), info.status().ToString());
  }
  struct Open {
    size_t plan;
    RequestId id;
    std::shared_ptr<TokenSink> sink;
  };
  std::vector<std::vector<int32_t>> tokens(plans.size());
  std::vector<Open> open;
  for (size_t next = 0; next < plans.size() || !open.empty();) {
    for (; next < plans.size() && open.size() < kOpen; ++next) {
      Request request = plans[next].request;
      const int32_t adapter = plans[next].adapter;
      if (adapter >= 0) request.adapter = server.Lease(cases[adapter].adapters);
      auto sink = std::make_shared<TokenSink>(request.max_new_tokens + 2, [] {});
      const auto id = server.engine()->Submit(std::move(request), sink);
      LK_CHECK_MSG(id.ok(), id.status().ToString());
      open.push_back({next, *id, sink});
    }
    std::erase_if(open, [&](const Open& o) {
      TokenEvent event;
      while (o.sink->Pop(&event)) {
        if (event.kind == TokenEvent::Kind::kFinished) {
          const bool cancelled = plans[o.plan].cancel_after >= 0;
          EXPECT_TRUE(event.status.ok() || cancelled) << event.status;
          return true;
        }
        tokens[o.plan].push_back(event.token);
      }
      const int32_t after = plans[o.plan].cancel_after;
      if (after >= 0 && static_cast<int32_t>(tokens[o.plan].size()) >= after) {
        server.engine()->Cancel(o.id);
      }
      return false;
    });
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  server.engine()->Shutdown(0);
  return tokens;
}

TEST(CudaEngine, AThousandRandomStepsGiveTheTokensOfStepsNotRecorded) {
  const std::vector<VariantCase> cases = Cases();
  ASSERT_GE(cases.size(), 60u);
  const std::vector<Plan> plans = RandomPlans(cases, 2500, 1);
  Counts recorded_counts, plain_counts;
  const auto recorded = Serve(cases, plans, true, &recorded_counts);
  const auto plain = Serve(cases, plans, false, &plain_counts);
  for (size_t i = 0; i < plans.size(); ++i) {
    const std::string name = plans[i].adapter < 0 ? "base" : cases[plans[i].adapter].name;
    if (plans[i].cancel_after < 0) {
      EXPECT_EQ(recorded[i], plain[i]) << "request " << i << " of " << name;
      EXPECT_EQ(recorded[i].size(), static_cast<size_t>(plans[i].request.max_new_tokens));
      continue;
    }
    const size_t both = std::min(recorded[i].size(), plain[i].size());
    EXPECT_TRUE(std::equal(recorded[i].begin(), recorded[i].begin() + both, plain[i].begin()))
        << "cancelled request " << i << " of " << name;
  }
  for (const Counts* counts : {&recorded_counts, &plain_counts}) {
    std::printf("%lld steps, %lld images dropped, %lld preempted, up to %d adapters a step\n",
                static_cast<long long>(counts->steps), static_cast<long long>(counts->dropped),
                static_cast<long long>(counts->preempted), counts->most_adapters);
    EXPECT_GE(counts->steps, 1000);
    EXPECT_GE(counts->dropped, 100);
    EXPECT_GE(counts->most_adapters, 5);
  }
}

// The first step of its kind runs as it is, the second is recorded, the third is the recording again:
// in 16 bits, the same logits to the bit.
TEST(CudaEngine, RecordedStepsGiveTheSameLogitsToTheBit) {
  const std::vector<VariantCase> cases = Cases();
  VariantServer server(kBase, {.device = "cuda", .kv_bytes = 3 << 20});  // to load adapters with
  for (const VariantCase& c : cases) {
    if (c.mixture()) continue;
    ASSERT_TRUE(server.Load(c.name).ok()) << c.name;
  }
  ModelHarness harness(kGoldenRoot / "models" / kBase, Precision::kFast, 8, 64);
  std::mt19937 rng(3);
  for (int round = 0; round < 30; ++round) {
    std::vector<Lane> lanes(8);
    for (Lane& lane : lanes) {
      if (rng() % 4 != 0) lane.adapter = server.Lease(cases[rng() % cases.size()].adapters);
      // The runner's own pass makes gates of the base's states.
      if (lane.adapter.get() != nullptr && lane.adapter.get()->gating.experts > 0) lane.adapter = {};
      const Adapter* adapter = lane.adapter.get();
      const int32_t virtuals = adapter != nullptr ? adapter->virtual_tokens.count : 0;
      for (int32_t k = 0; k < virtuals; ++k) lane.tokens.push_back(-1 - k);
      for (int t = 0; t < 12; ++t) lane.tokens.push_back(rng() % 300);
    }
    std::vector<std::vector<std::vector<std::vector<float>>>> first;
    for (int pass = 0; pass < 3; ++pass) {
      std::vector<Lane> fresh = lanes;
      std::vector<Lane*> pointers;
      for (Lane& lane : fresh) pointers.push_back(&lane);
      for (int step = 0; step < 6; ++step) {
        std::vector<int32_t> rows;  // a prompt, then decoding
        for (const Lane& lane : fresh) {
          rows.push_back(step == 0 ? static_cast<int32_t>(lane.tokens.size()) - 5 : 1);
        }
        auto logits = harness.Step(pointers, rows);
        if (pass == 0) first.push_back(std::move(logits));
        else ASSERT_EQ(logits, first[step]) << "round " << round << " pass " << pass << " step " << step;
      }
    }
  }
}

}  // namespace
}  // namespace lorikeet
