// A tenant that asks for more adapters than its bound has pages for, beside others that ask for few: through
// random histories its images keep to the bound, its requests end, and the others wait no longer for it.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine/base/clock.h"
#include "engine/scheduler/scheduler.h"
#include "gtest/gtest.h"
#include "tests/sim/fake_runner.h"

namespace lorikeet {
namespace {

constexpr int32_t kPages = 400;  // enough for every context beside the images, so that nobody is preempted
constexpr int32_t kBound = 24;
constexpr int32_t kLongestAnswer = 12;
constexpr int32_t kLongestCopy = 3;
const std::string kTenants[] = {"greedy", "a", "b", ""};

SchedulerOptions Options() {
  SchedulerOptions options;
  options.limits.max_batch_tokens = 512;
  options.limits.max_running_requests = 64;
  options.limits.max_context_tokens = 64;
  options.kv.pages_per_block = 1;
  options.pages = kPages;
  options.eos_ids = {3};
  options.tenant_image_pages = kBound;
  return options;
}

class Crowd {
 public:
  explicit Crowd(uint64_t seed) : random_(seed) {
    images_.steps_to_load = [this] { return Pick(0, kLongestCopy); };
    images_.fail = false;
    for (const std::string& tenant : kTenants) {
      std::shared_ptr<Adapter> shared;
      for (int i = tenant == "greedy" ? 40 : 2; i > 0; --i) {
        auto adapter = std::make_shared<Adapter>();
        adapter->version = tenant + std::to_string(i);
        adapter->bytes = Pick(2, 7);
        if (tenant == "greedy" && Pick(0, 1) == 0) {
          if (shared == nullptr || Pick(0, 3) == 0) {
            shared = std::make_shared<Adapter>();
            shared->bytes = Pick(1, 9);
          }
          adapter->shared = shared;
        }
        adapters_[tenant].push_back(AdapterLease(adapter, adapter, tenant));
        leases_[adapter->serial] = adapters_[tenant].back();
      }
    }
  }

  void Run() {
    for (int step = 0; step < 400; ++step) {
      if (step % 40 == 0) {
        for (int n = Pick(40, 80); n > 0; --n) Submit("greedy");
      }
      if (Pick(0, 3) == 0) Submit(kTenants[Pick(1, 3)]);
      if (Pick(0, 9) == 0) Cancel();
      Step();
      if (::testing::Test::HasFailure()) return;
    }
    for (int left = 20'000; !scheduler_.empty(); --left) {
      ASSERT_GT(left, 0) << scheduler_.waiting() << " requests wait for ever";
      Step();
      if (::testing::Test::HasFailure()) return;
    }
    EXPECT_TRUE(open_.empty());
    EXPECT_EQ(scheduler_.pages_used(), 0);
    adapters_.clear();
    leases_.clear();
    Step();
    EXPECT_EQ(scheduler_.pages_images(), 0) << "pages in, pages out";
  }

  int64_t drops = 0;
  int32_t most_held = 0;  // of the greedy tenant
  int64_t longest_wait[2] = {};  // steps until the first token, of the greedy one's and of others

 private:
  int32_t Pick(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random_);
  }

  void Submit(const std::string& tenant) {
    Request request;
    const auto& adapters = adapters_[tenant];
    request.adapter = adapters[Pick(0, static_cast<int32_t>(adapters.size()) - 1)];
    for (int32_t n = Pick(2, 20); n > 0; --n) request.prompt.push_back(Pick(0, model_.vocab - 1));
    request.max_new_tokens = Pick(1, kLongestAnswer);
    request.ignore_eos = true;
    const Adapter& adapter = *request.adapter.get();
    open_[++requests_] = {steps_, tenant != "greedy"};
    scheduler_.Enqueue(requests_, std::move(request), images_.SizeOf(adapter), images_.SharedSizeOf(adapter));
  }

  void Cancel() {
    if (open_.empty()) return;
    RequestEvents events;
    scheduler_.Cancel(std::next(open_.begin(), Pick(0, static_cast<int32_t>(open_.size()) - 1))->first,
                      clock_.NowMicros(), &events);
    Take(events);
  }

  void Step() {
    ++steps_;
    clock_.Advance(1);
    RequestEvents events;
    for (const AdapterLoaded& loaded : images_.TakeLoaded()) {
      scheduler_.Loaded(loaded, clock_.NowMicros(), &events);
    }
    const bool planned = scheduler_.Plan(clock_.NowMicros(), &batch_);
    Move(scheduler_.TakeMoves());
    if (planned) {
      ASSERT_EQ(scheduler_.stats().preempted, 0);
      auto result = runner_.Run(batch_);
      ASSERT_TRUE(result.ok());
      scheduler_.Commit(*std::move(result), clock_.NowMicros(), &events);
    }
    Take(events);
  }

  void Move(AdapterMoves moves) {
    drops += static_cast<int64_t>(moves.drops.size());
    for (const uint64_t serial : moves.drops) held_.erase(serial);
    for (const AdapterLoad& load : moves.loads) held_.insert(load.adapter.get()->serial);
    images_.Move(std::move(moves));
    std::map<std::string, int32_t> pages;
    std::set<std::pair<std::string, const Adapter*>> shared;
    for (const uint64_t serial : held_) {
      const auto lease = leases_.find(serial);
      if (lease == leases_.end()) continue;  // what others have in common
      const Adapter& adapter = *lease->second.get();
      int32_t& of_tenant = pages[lease->second.tenant()];
      of_tenant += images_.SizeOf(adapter).pages;
      const bool first = shared.emplace(lease->second.tenant(), adapter.shared.get()).second;
      if (first) of_tenant += images_.SharedSizeOf(adapter).pages;
    }
    for (const auto& [tenant, held] : pages) {
      ASSERT_LE(held, tenant.empty() ? kPages : kBound) << tenant;
    }
    most_held = std::max(most_held, pages["greedy"]);
  }

  void Take(const RequestEvents& events) {
    for (const RequestEvent& event : events) {
      Open& open = open_.at(event.id);
      if (!open.answered) {
        int64_t& longest = longest_wait[open.other];
        longest = std::max(longest, steps_ - open.since);
      }
      open.answered = true;
      if (event.event.kind == TokenEvent::Kind::kFinished) open_.erase(event.id);
    }
  }

  struct Open {
    int64_t since = 0;
    bool other = false;  // than the greedy one's
    bool answered = false;
  };

  std::mt19937_64 random_;
  FakeClock clock_;
  FakeModel model_;
  std::map<std::string, std::vector<AdapterLease>> adapters_;  // by tenant
  std::map<uint64_t, AdapterLease> leases_;                    // by serial
  FakeImages images_{kPages};
  Scheduler scheduler_{Options()};
  FakeRunner runner_{model_, Options().kv, kPages, &images_};
  Batch batch_;
  std::map<RequestId, Open> open_;
  std::set<uint64_t> held_;  // images there or on their way
  int64_t steps_ = 0;
  RequestId requests_ = 0;
};

TEST(TenantsSimulation, TheGreedyOneKeepsToItsBoundAndOthersDoNotFeelIt) {
  int64_t drops = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Crowd crowd(seed);
    crowd.Run();
    if (HasFailure()) return;
    // A step to fetch, the copy, and a step to run, behind nobody but who runs already.
    EXPECT_LE(crowd.longest_wait[1], kLongestCopy + kLongestAnswer + 3);
    EXPECT_GT(crowd.longest_wait[0], 10 * crowd.longest_wait[1]) << "it waits for itself";
    EXPECT_GT(crowd.most_held, kBound - 8) << "and uses what it has";
    drops += crowd.drops;
  }
  EXPECT_GT(drops, 1000);
}

}  // namespace
}  // namespace lorikeet
