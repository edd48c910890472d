// A day of a busy server on a fake clock: bursts of requests for thousands of adapters, by Zipf's law,
// in a pool that holds a hundredth of them, while adapters are unloaded and reloaded, copies fail and
// clients leave. What a short history cannot show is looked for: pages that never come back, memory
// that grows, requests that wait on and on.
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/base/clock.h"
#include "engine/scheduler/scheduler.h"
#include "gtest/gtest.h"
#include "tests/sim/fake_runner.h"

namespace lorikeet {
namespace {

constexpr int64_t kSecond = 1'000'000;
constexpr int64_t kHour = 3600 * kSecond;
constexpr int64_t kStep = kSecond / 20;  // of a batch on a slow device
constexpr int kNames = 2000;
constexpr int32_t kPages = 160, kPageBytes = ImageSize::kSlots;
// A burst is worked off in less; a request that waits longer is forgotten.
constexpr int64_t kLongestWait = 60 * kSecond;

SchedulerOptions Options() {
  SchedulerOptions options;
  options.limits.max_batch_tokens = 256;
  options.limits.max_running_requests = 16;
  options.limits.max_context_tokens = kPages * KvLayout::kPageTokens;
  options.kv.pages_per_block = 2;
  options.pages = kPages;
  options.eos_ids = {3};
  return options;
}

struct Open {
  int64_t submitted_us = 0;
  bool answered = false;  // by its first token
};

class Day {
 public:
  Day() : adapters_(kNames), popularity_(Zipf()) {
    images_.steps_to_load = [this] { return Pick(0, 3); };
    for (auto& adapter : adapters_) adapter = NewVersion();
  }

  void RunHour() {
    const int64_t end = clock_.NowMicros() + kHour;
    while (clock_.NowMicros() < end) {
      const int64_t pause = static_cast<int64_t>(
          std::exponential_distribution<double>(1.0 / (60 * kSecond))(random_));
      clock_.Advance(pause);
      for (int n = Pick(1, 4); n > 0; --n) adapters_[Pick(0, kNames - 1)] = NewVersion();
      for (int n = Pick(1, 120); n > 0; --n) Submit();
      while (!scheduler_.empty()) {
        Step();
        if (::testing::Test::HasFailure()) return;
      }
      // Copies that were under way for who has left.
      for (int i = 0; i < 8; ++i) Step();
      ASSERT_TRUE(open_.empty());
      ASSERT_EQ(scheduler_.pages_used(), 0);
      ASSERT_EQ(scheduler_.pages_images(), images_.pages_held());
    }
  }

  // Nobody may need the pages of what is gone: one request takes them all.
  void EndInOneRequestForEverything() {
    adapters_.clear();
    for (auto& shared : shared_) shared.reset();
    Step();
    EXPECT_EQ(scheduler_.pages_images(), 0);
    EXPECT_EQ(images_.pages_held(), 0);
    Request request;
    request.prompt.assign(ContextTokens(Options()) - 1, 7);
    request.max_new_tokens = 1;
    Enqueue(std::move(request));
    while (!scheduler_.empty() && !::testing::Test::HasFailure()) Step();
    EXPECT_TRUE(open_.empty());
  }

  int64_t requests = 0, answers = 0, canceled = 0, failed = 0, preemptions = 0, drops = 0;
  int64_t longest_wait_us = 0;
  int64_t loads() const { return images_.loads; }
  int64_t loads_shared() const { return images_.loads_shared; }

 private:
  int32_t Pick(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random_);
  }

  static std::discrete_distribution<int> Zipf() {
    std::vector<double> weights(kNames);
    for (int i = 0; i < kNames; ++i) weights[i] = 1.0 / (i + 1);
    return {weights.begin(), weights.end()};
  }

  // Of ranks 8 to 64, say, or vectors that take some of a page.
  AdapterLease NewVersion() {
    auto adapter = std::make_shared<Adapter>();
    adapter->version = "version " + std::to_string(++versions_);
    adapter->bytes = Pick(0, 3) == 0 ? Pick(1, 2 * kPageBytes) : kPageBytes * 2 << Pick(0, 3);
    if (Pick(0, 2) == 0) {
      std::shared_ptr<Adapter>& shared = shared_[Pick(0, 3)];
      if (shared == nullptr || Pick(0, 19) == 0) {
        shared = std::make_shared<Adapter>();
        shared->bytes = Pick(1, 12 * kPageBytes);
      }
      adapter->shared = shared;
    }
    return AdapterLease(std::move(adapter));
  }

  void Submit() {
    Request request;
    request.adapter = adapters_[popularity_(random_)];
    for (int32_t n = Pick(2, 40); n > 0; --n) request.prompt.push_back(Pick(0, model_.vocab - 1));
    request.max_new_tokens = Pick(0, 19) == 0 ? Pick(1, 400) : Pick(1, 40);
    request.ignore_eos = true;
    if (Pick(0, 9) == 0) request.deadline_us = clock_.NowMicros() + Pick(1, 5) * kSecond;
    Enqueue(std::move(request));
  }

  void Enqueue(Request request) {
    const RequestId id = ++requests;
    open_[id] = {.submitted_us = clock_.NowMicros()};
    const Adapter* adapter = request.adapter.get();
    scheduler_.Enqueue(id, std::move(request), adapter ? images_.SizeOf(*adapter) : ImageSize(),
                       adapter ? images_.SharedSizeOf(*adapter) : ImageSize());
  }

  void Step() {
    clock_.Advance(kStep);
    images_.fail = Pick(0, 999) == 0;
    RequestEvents events;
    for (const AdapterLoaded& loaded : images_.TakeLoaded()) {
      scheduler_.Loaded(loaded, clock_.NowMicros(), &events);
    }
    scheduler_.Expire(clock_.NowMicros(), &events);
    if (Pick(0, 99) == 0 && !open_.empty()) {
      scheduler_.Cancel(open_.begin()->first, clock_.NowMicros(), &events);
    }
    const bool planned = scheduler_.Plan(clock_.NowMicros(), &batch_);
    images_.Move(scheduler_.TakeMoves());
    if (planned) {
      preemptions += scheduler_.stats().preempted;
      drops += scheduler_.stats().images_dropped;
      auto result = runner_.Run(batch_);
      ASSERT_TRUE(result.ok());
      scheduler_.Commit(*std::move(result), clock_.NowMicros(), &events);
    }
    for (const RequestEvent& event : events) Take(event);
  }

  void Take(const RequestEvent& event) {
    Open& open = open_.at(event.id);
    if (!open.answered) {
      open.answered = true;
      const int64_t wait = clock_.NowMicros() - open.submitted_us;
      longest_wait_us = std::max(longest_wait_us, wait);
      ASSERT_LE(wait, kLongestWait) << "request " << event.id;
    }
    if (event.event.kind != TokenEvent::Kind::kFinished) return;
    canceled += event.event.finish == FinishReason::kCanceled;
    failed += event.event.finish == FinishReason::kError;
    ++answers;
    open_.erase(event.id);
  }

  std::mt19937_64 random_{1};
  FakeClock clock_;
  FakeModel model_;
  std::vector<AdapterLease> adapters_;
  std::shared_ptr<Adapter> shared_[4];  // what new versions may have in common
  std::discrete_distribution<int> popularity_;
  FakeImages images_{kPages, kPageBytes};
  Scheduler scheduler_{Options()};
  FakeRunner runner_{model_, Options().kv, kPages, &images_};
  Batch batch_;
  std::unordered_map<RequestId, Open> open_;
  int64_t versions_ = 0;
};

TEST(ADayOfChurn, PagesComeBackMemoryStaysAndNobodyIsForgotten) {
  Day day;
  size_t after_three_hours = 0;
  for (int hour = 1; hour <= 24; ++hour) {
    day.RunHour();
    if (HasFailure()) return;
    if (hour == 3) after_three_hours = mallinfo2().uordblks;
  }
  const int64_t grown = static_cast<int64_t>(mallinfo2().uordblks - after_three_hours);
  day.EndInOneRequestForEverything();
  EXPECT_EQ(day.requests, day.answers) << "each ends once";
  // Names of versions grow by a digit; the day makes a hundred times as many objects as live.
  EXPECT_LT(grown, 64 << 10);
  RecordProperty("requests", std::to_string(day.requests));
  RecordProperty("longest_wait_ms", std::to_string(day.longest_wait_us / 1000));
  // The day must have been a hard one, or it proves nothing.
  EXPECT_GT(day.requests, 50'000);
  EXPECT_GT(day.loads(), 20'000);
  EXPECT_GT(day.loads_shared(), 1'000);
  EXPECT_GT(day.drops, 20'000);
  EXPECT_GT(day.preemptions, 50);
  EXPECT_GT(day.canceled, 500);
  EXPECT_GT(day.failed, 500);
}

}  // namespace
}  // namespace lorikeet
