// Where images lie in a pool full of prefixes: their pages follow one another as far as copies want it,
// though streams come, grow and go all the while.
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/scheduler/scheduler.h"
#include "gtest/gtest.h"

namespace lorikeet {
namespace {

constexpr int32_t kImagePages = 161;  // rank 16 on an 8B model, in pages of 512 KiB
constexpr int32_t kStreams = 32, kStreamAdapters = 8, kAdapters = 200;

SchedulerOptions Options() {
  SchedulerOptions options;
  options.limits.max_batch_tokens = 768;
  options.limits.max_running_requests = 256;
  options.limits.max_context_tokens = 2048;
  options.kv.pages_per_block = 4;
  options.pages = 24'576;  // 12 GiB
  return options;
}

class FullPool {
 public:
  FullPool() {
    for (int i = 0; i < kAdapters; ++i) {
      auto adapter = std::make_shared<Adapter>();
      adapter->version = std::to_string(i);
      adapters_.push_back(std::move(adapter));
    }
  }

  // Streams that are followed by others, and three requests in ten steps for one token of an adapter
  // that is not there. Images are there two steps later.
  void Run(int steps) {
    for (const int end = step_ + steps; step_ < end; ++step_) {
      for (; streams_ < kStreams; ++streams_) Submit(Pick(0, kStreamAdapters - 1), Pick(64, 1024));
      if (Pick(0, 9) < 3) Submit(kStreamAdapters + next_++ % (kAdapters - kStreamAdapters), 1);
      Step();
    }
  }

  double PagesARun() const { return static_cast<double>(pages_) / static_cast<double>(runs_); }
  int64_t pages_loaded() const { return pages_; }
  int32_t pages_cached() const { return scheduler_.stats().pages_cached; }
  void Forget() { pages_ = runs_ = 0; }

 private:
  int32_t Pick(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random_);
  }

  void Submit(int32_t adapter, int32_t tokens) {
    Request request;
    for (int i = 0; i < 32; ++i) request.prompt.push_back(Pick(0, 30'000));
    request.max_new_tokens = tokens;
    request.ignore_eos = true;
    request.adapter = AdapterLease(adapters_[adapter]);
    is_stream_.push_back(tokens > 1);
    scheduler_.Enqueue(static_cast<RequestId>(is_stream_.size()), std::move(request), {kImagePages, 0});
  }

  void Step() {
    RequestEvents events;
    for (; !coming_.empty() && coming_.front().first <= step_; coming_.pop_front()) {
      scheduler_.Loaded({coming_.front().second, absl::OkStatus(), 1}, step_, &events);
    }
    const bool planned = scheduler_.Plan(step_, &batch_);
    for (const AdapterLoad& load : scheduler_.TakeMoves().loads) {
      coming_.push_back({step_ + 2, load.adapter.get()->serial});
      pages_ += std::ssize(load.pages);
      ++runs_;
      for (size_t i = 1; i < load.pages.size(); ++i) runs_ += load.pages[i] != load.pages[i - 1] + 1;
    }
    if (planned) {
      StepResult result;
      result.sampled.resize(batch_.logit_rows.size());
      for (SampledToken& sampled : result.sampled) sampled.token = Pick(0, 30'000);
      scheduler_.Commit(std::move(result), step_, &events);
    }
    for (const RequestEvent& event : events) {
      const bool finished = event.event.kind == TokenEvent::Kind::kFinished;
      streams_ -= finished && is_stream_[event.id - 1];
    }
  }

  std::mt19937_64 random_{1};
  std::vector<std::shared_ptr<const Adapter>> adapters_;
  Scheduler scheduler_{Options()};
  Batch batch_;
  std::deque<std::pair<int, uint64_t>> coming_;  // when, and whose
  std::vector<bool> is_stream_;                  // by request
  int32_t streams_ = 0, next_ = 0;
  int step_ = 0;
  int64_t pages_ = 0, runs_ = 0;  // of images that were loaded
};

TEST(ImageRuns, AreLongInAPoolFullOfPrefixes) {
  FullPool pool;
  pool.Run(30'000);
  pool.Forget();
  pool.Run(10'000);
  EXPECT_GT(pool.pages_cached(), Options().pages / 3);
  EXPECT_GT(pool.pages_loaded(), 1000 * kImagePages);
  // Copies of seven pages at a time reach 96 % of what whole images reach.
  EXPECT_GT(pool.PagesARun(), 7);
}

}  // namespace
}  // namespace lorikeet
