// Thousands of random histories of submit, cancel, deadline and finish through the scheduler and a
// fake model, with pools small enough that preemption is usual. A failure prints its seed.
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

struct Client {
  Request request;
  std::vector<int32_t> prompt;
  std::vector<TokenEvent> events;
  bool canceled = false;
  bool finished = false;
  bool admitted = false;
  // For the bound on waiting.
  int64_t admissions_at_submit = 0;
  int32_t ahead = 0;          // k: requests of its adapter waiting at submit
  int32_t most_adapters = 0;  // A: adapters with waiting requests, at most, while it waited
};

constexpr int32_t kPageBytes = ImageSize::kSlots;

class Simulation {
 public:
  explicit Simulation(uint64_t seed) : random_(seed) {
    options_.limits.max_batch_tokens = Pick(1, 40);
    options_.limits.max_running_requests = Pick(1, 10);
    options_.limits.max_context_tokens = Pick(2, 120);
    options_.kv.pages_per_block = Pick(1, 3);
    options_.pages = Pick(1, 14) * options_.kv.pages_per_block + Pick(0, 2);
    options_.eos_ids = {3, 5};
    options_.prefix_cache = Pick(0, 3) > 0;
    for (int i = Pick(0, 3); i >= 0; --i) {
      families_.emplace_back();
      for (int n = Pick(0, 50); n > 0; --n) families_.back().push_back(Pick(0, model_.vocab - 1));
    }
    const bool with_images = Pick(0, 1) == 1;
    if (with_images) {
      images_ = std::make_unique<FakeImages>(options_.pages, kPageBytes);
      images_->steps_to_load = [this] { return Pick(0, 3); };
    }
    with_tenants_ = with_images && Pick(0, 1) == 1;
    int32_t largest = 0;
    std::shared_ptr<Adapter> shared;
    for (int i = Pick(0, 5); i >= 0; --i) {
      auto adapter = std::make_shared<Adapter>();
      adapter->version = "adapter " + std::to_string(i);
      // Gates: a second set of keys and values. Its image leaves a block of each at least.
      const bool gates = options_.pages >= 2 * options_.kv.pages_per_block && Pick(0, 2) == 0;
      if (gates) adapter->gating.experts = 1;
      adapter->cacheable = !gates;
      const int32_t beside = options_.pages - adapter->kv_sets() * options_.kv.pages_per_block;
      const int32_t pages = with_images ? Pick(0, std::min(5, beside)) : 0;
      adapter->bytes = BytesOfPages(pages);
      // What it has in common with the one before, or nobody yet, takes of what its image leaves.
      const int32_t left = beside - pages;
      if (pages > 0 && left > 0 && Pick(0, 1) == 0) {
        if (!shared || shared->bytes > left * kPageBytes || Pick(0, 2) == 0) {
          shared = std::make_shared<Adapter>();
          shared->bytes = BytesOfPages(Pick(1, std::min(4, left)));
        }
        adapter->shared = shared;
      }
      const std::string tenant = with_tenants_ && Pick(0, 3) > 0 ? "tenant " + std::to_string(Pick(0, 1)) : "";
      adapters_.push_back(i == 0 ? AdapterLease() : AdapterLease(adapter, adapter, tenant));
      if (with_images) largest = std::max(largest, MostPages(*adapter));
    }
    if (with_tenants_) options_.tenant_image_pages = largest + Pick(0, 4);
    scheduler_ = std::make_unique<Scheduler>(options_);
    runner_ = std::make_unique<FakeRunner>(model_, options_.kv, options_.pages, images_.get());
  }

  void Run() {
    const int32_t requests = Pick(1, 40);
    const int32_t submit_percent = Pick(10, 100);
    while (static_cast<int32_t>(clients_.size()) < requests) {
      while (Pick(0, 99) < submit_percent && static_cast<int32_t>(clients_.size()) < requests) {
        Submit();
      }
      if (Pick(0, 9) == 0) Cancel(Pick(1, static_cast<int32_t>(clients_.size()) + 1));
      Step();
      if (::testing::Test::HasFailure()) return;
    }
    int64_t steps_left = MostSteps();
    while (!scheduler_->empty() && !::testing::Test::HasFailure()) {
      ASSERT_GE(--steps_left, 0) << scheduler_->waiting() << " requests wait for ever";
      Step();
    }
    EXPECT_EQ(scheduler_->pages_used(), 0) << "pages in, pages out";
    EXPECT_EQ(scheduler_->waiting() + scheduler_->running(), 0);
    for (auto& [id, client] : clients_) CheckAnswer(id, client);
  }

  int64_t preemptions() const { return preemptions_; }
  int64_t cached_tokens() const { return cached_tokens_; }
  int64_t waits_for_images() const { return waits_for_images_; }
  int64_t images_loaded() const { return images_ ? images_->loads : 0; }
  int64_t loads_shared() const { return images_ ? images_->loads_shared : 0; }

 private:
  int32_t Pick(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random_);
  }

  // Of an image of so many pages, of which half leave some of the last one to others.
  int64_t BytesOfPages(int32_t pages) {
    if (pages == 0 || Pick(0, 1) == 0) return pages * kPageBytes;
    return pages * kPageBytes - Pick(1, kPageBytes - 1);
  }

  void Submit() {
    const RequestId id = clients_.size() + 1;
    Client& client = clients_[id];
    Request& request = client.request;
    request.adapter = adapters_[Pick(0, static_cast<int32_t>(adapters_.size()) - 1)];
    const int32_t context = Context(request);
    const std::vector<int32_t>& family = families_[Pick(0, int32_t(families_.size()) - 1)];
    const int32_t shared = Pick(0, std::min<int32_t>(family.size(), context - 2));
    request.prompt.assign(family.begin(), family.begin() + shared);
    for (int32_t n = Pick(shared == 0, std::min(context - 1 - shared, 30)); n > 0; --n) {
      request.prompt.push_back(Pick(0, model_.vocab - 1));
    }
    client.prompt = request.prompt;
    request.max_new_tokens = Pick(1, 80);
    request.ignore_eos = Pick(0, 1) == 1;
    if (Pick(0, 3) == 0) request.stop_token_ids = {Pick(0, model_.vocab - 1), 5};
    request.sampling.seed = Pick(0, 1 << 20);
    request.sampling.prompt_logprobs = Pick(0, 3) == 0;
    request.skip_prefix_cache = Pick(0, 7) == 0;
    if (Pick(0, 3) == 0) request.cache_salt = "salt";
    if (Pick(0, 7) == 0) request.deadline_us = clock_.NowMicros() + Pick(0, 60);

    std::set<const Adapter*> distinct = {request.adapter.get()};
    for (auto& [other_id, other] : clients_) {
      if (!Waiting(other) || other_id == id) continue;
      if (other.request.adapter.get() == request.adapter.get()) ++client.ahead;
      distinct.insert(other.request.adapter.get());
    }
    for (auto& [other_id, other] : clients_) {
      other.most_adapters = std::max(other.most_adapters, static_cast<int32_t>(distinct.size()));
    }
    client.admissions_at_submit = admissions_;
    const Adapter* adapter = request.adapter.get();
    scheduler_->Enqueue(id, request, adapter && images_ ? images_->SizeOf(*adapter) : ImageSize(),
                        adapter && images_ ? images_->SharedSizeOf(*adapter) : ImageSize());
  }

  static bool Waiting(const Client& client) { return !client.admitted && !client.finished; }

  void Cancel(RequestId id) {
    const bool open = clients_.count(id) > 0 && !clients_[id].finished;
    RequestEvents events;
    scheduler_->Cancel(id, clock_.NowMicros(), &events);
    ASSERT_EQ(events.size(), open ? 1u : 0u);
    if (open) clients_[id].canceled = true;
    Take(std::move(events));
  }

  void Step() {
    clock_.Advance(Pick(0, 3));
    RequestEvents events;
    scheduler_->Expire(clock_.NowMicros(), &events);
    Take(std::move(events));
    for (const auto& [id, client] : clients_) {
      ASSERT_TRUE(client.finished || client.request.deadline_us > clock_.NowMicros())
          << "request " << id << " outlives its deadline";
    }
    TakeLoaded();
    const bool planned = scheduler_->Plan(clock_.NowMicros(), &batch_);
    if (images_ != nullptr) images_->Move(scheduler_->TakeMoves());
    // All may wait for images, but then some are on their way.
    if (!planned) {
      ASSERT_TRUE(scheduler_->empty() || scheduler_->stats().images_loading > 0);
      waits_for_images_ += !scheduler_->empty();
      return;
    }
    ASSERT_FALSE(scheduler_->empty());
    CheckBatch();
    NoteAdmissions();
    preemptions_ += scheduler_->stats().preempted;
    cached_tokens_ += scheduler_->stats().cached_tokens;
    auto result = runner_->Run(batch_);
    ASSERT_TRUE(result.ok());
    events.clear();
    scheduler_->Commit(*std::move(result), clock_.NowMicros(), &events);
    Take(std::move(events));
  }

  void TakeLoaded() {
    if (images_ == nullptr) return;
    RequestEvents events;
    for (const AdapterLoaded& loaded : images_->TakeLoaded()) {
      scheduler_->Loaded(loaded, clock_.NowMicros(), &events);
    }
    ASSERT_TRUE(events.empty());
  }

  int32_t MostPages(const Adapter& adapter) const {
    return images_->SizeOf(adapter).most_pages() + images_->SharedSizeOf(adapter).most_pages();
  }

  // Tokens that a request can come to.
  int32_t Context(const Request& request) const {
    const Adapter* adapter = request.adapter.get();
    const bool image = adapter && images_;
    return ContextTokens(options_, image ? MostPages(*adapter) : 0,
                         adapter ? adapter->kv_sets() : 1);
  }

  void CheckBatch() {
    const int32_t rows = batch_.rows();
    ASSERT_GT(rows, 0);
    ASSERT_LE(rows, options_.limits.max_batch_tokens);
    ASSERT_LE(scheduler_->running(), options_.limits.max_running_requests);
    ASSERT_LE(batch_.sequences(), scheduler_->running());
    ASSERT_LE(scheduler_->pages_used() + scheduler_->pages_images(), options_.pages);
    if (images_ != nullptr) {
      ASSERT_EQ(scheduler_->pages_images(), images_->pages_held());
    }
    ASSERT_EQ(batch_.positions.size(), rows);
    ASSERT_EQ(batch_.sequence_begin.back(), rows);
    ASSERT_EQ(batch_.page_begin.back(), batch_.pages.size());
    ASSERT_EQ(batch_.base_page_begin.size(), batch_.page_begin.size());
    ASSERT_EQ(batch_.base_page_begin.back(), batch_.base_pages.size());
    CheckWrites();
    for (int32_t s = 0; s < batch_.sequences(); ++s) {
      ASSERT_LT(batch_.sequence_begin[s], batch_.sequence_begin[s + 1]);
    }
    // Segments tile the rows after the base's; no adapter has two.
    std::set<const Adapter*> seen = {nullptr};
    int32_t at = scheduler_->stats().base_rows;
    for (const AdapterSegment& segment : batch_.segments) {
      ASSERT_EQ(segment.row_begin, at);
      ASSERT_GT(segment.row_end, segment.row_begin);
      ASSERT_TRUE(seen.insert(segment.adapter).second);
      at = segment.row_end;
    }
    ASSERT_EQ(at, rows);
  }

  // What a sequence writes to, in this step or later ones, is its own.
  void CheckWrites() {
    std::map<int32_t, int32_t> writers;
    for (int32_t s = 0; s < batch_.sequences(); ++s) {
      const int32_t first = batch_.positions[batch_.sequence_begin[s]] / KvLayout::kPageTokens;
      const int32_t begin = batch_.page_begin[s] + first * options_.kv.pages_per_block;
      for (int32_t p = begin; p < batch_.page_begin[s + 1]; ++p) ++writers[batch_.pages[p]];
    }
    for (const int32_t page : batch_.base_pages) ++writers[page];
    for (const auto& [page, count] : writers) ASSERT_EQ(count, 1) << "page " << page;
  }

  void NoteAdmissions() {
    std::vector<RequestId> admitted;
    for (const RequestId id : batch_.requests) {
      if (!clients_.at(id).admitted) admitted.push_back(id);
    }
    for (const RequestId id : admitted) {
      Client& client = clients_.at(id);
      client.admitted = true;
      if (images_ != nullptr) continue;  // whose image is on its way is passed over
      const int64_t before = admissions_ - client.admissions_at_submit;
      const int64_t bound = client.ahead + int64_t{client.ahead + 1} * (client.most_adapters - 1);
      ASSERT_LE(before, bound) << "request " << id << " waited too long: " << client.ahead
                               << " ahead of it, " << client.most_adapters << " adapters";
    }
    admissions_ += admitted.size();
  }

  void Take(RequestEvents events) {
    for (RequestEvent& e : events) {
      Client& client = clients_.at(e.id);
      ASSERT_FALSE(client.finished) << "an event after kFinished, request " << e.id;
      client.finished = e.event.kind == TokenEvent::Kind::kFinished;
      client.events.push_back(std::move(e.event));
    }
  }

  // The oldest sequence always advances, so one request after the other is an upper bound, and a
  // preemption costs at most a whole context again: generous, but finite.
  int64_t MostSteps() const {
    return int64_t{5000} * static_cast<int64_t>(clients_.size()) * ContextTokens(options_);
  }

  struct Answer {
    std::vector<int32_t> tokens;
    FinishReason reason = FinishReason::kNone;
  };

  // The same request with nothing beside it: the model and the rules of ending, nothing else.
  Answer Alone(const Client& client) const {
    const Request& request = client.request;
    Answer answer;
    std::vector<int32_t> history = client.prompt;
    const std::set<int32_t> stops(request.stop_token_ids.begin(), request.stop_token_ids.end());
    while (answer.reason == FinishReason::kNone) {
      const uint64_t state = model_.State(history, request.adapter.get());
      const int32_t token = model_.Token(state, request.sampling.seed);
      history.push_back(token);
      answer.tokens.push_back(token);
      if (!request.ignore_eos && (token == 3 || token == 5)) {
        answer.reason = FinishReason::kEos;
      } else if (stops.count(token)) {
        answer.reason = FinishReason::kStop;
      } else if (static_cast<int32_t>(answer.tokens.size()) == request.max_new_tokens ||
                 static_cast<int32_t>(history.size()) == Context(request)) {
        answer.reason = FinishReason::kLength;
      }
    }
    return answer;
  }

  void CheckAnswer(RequestId id, const Client& client) {
    SCOPED_TRACE("request " + std::to_string(id));
    ASSERT_TRUE(client.finished);
    std::vector<int32_t> tokens;
    size_t prompt_events = 0;
    for (const TokenEvent& event : client.events) {
      if (event.kind == TokenEvent::Kind::kToken) tokens.push_back(event.token);
      if (event.kind == TokenEvent::Kind::kPromptLogprobs) {
        ++prompt_events;
        EXPECT_TRUE(tokens.empty());
        CheckPromptLogprobs(client, event.prompt_logprobs);
      }
    }
    const Answer alone = Alone(client);
    const TokenEvent& end = client.events.back();
    const bool wants_prompt = client.request.sampling.prompt_logprobs && !tokens.empty();
    EXPECT_EQ(prompt_events, wants_prompt ? 1u : 0u);
    if (client.canceled || end.finish == FinishReason::kError) {
      if (client.canceled) {
        EXPECT_EQ(end.finish, FinishReason::kCanceled);
      } else {
        EXPECT_EQ(end.status.code(), absl::StatusCode::kDeadlineExceeded);
        EXPECT_GE(end.time_us, client.request.deadline_us);
      }
      ASSERT_LE(tokens.size(), alone.tokens.size());
      EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), alone.tokens.begin()));
      return;
    }
    EXPECT_EQ(tokens, alone.tokens);
    EXPECT_EQ(end.finish, alone.reason);
  }

  void CheckPromptLogprobs(const Client& client, const std::vector<TokenLogprobs>& got) {
    ASSERT_EQ(got.size(), client.prompt.size() - 1);
    for (size_t i = 0; i < got.size(); ++i) {
      const auto history = std::span(client.prompt).first(i + 1);
      const uint64_t state = model_.State(history, client.request.adapter.get());
      EXPECT_EQ(got[i].logprob, model_.Logprob(state, client.prompt[i + 1])) << "position " << i;
    }
  }

  std::mt19937_64 random_;
  SchedulerOptions options_;
  FakeModel model_;
  FakeClock clock_;
  std::vector<AdapterLease> adapters_;
  std::unique_ptr<FakeImages> images_;  // nullptr: adapters need none
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<FakeRunner> runner_;
  std::vector<std::vector<int32_t>> families_;  // beginnings that prompts share
  Batch batch_;
  std::map<RequestId, Client> clients_;
  bool with_tenants_ = false;
  int64_t admissions_ = 0;
  int64_t preemptions_ = 0;
  int64_t cached_tokens_ = 0;
  int64_t waits_for_images_ = 0;
};

TEST(SchedulerSimulation, RandomHistoriesKeepEveryPromise) {
  int64_t preemptions = 0, cached = 0, waits = 0, loads = 0, shared = 0;
  for (uint64_t seed = 1; seed <= 4000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation simulation(seed);
    simulation.Run();
    if (HasFailure()) return;
    preemptions += simulation.preemptions();
    cached += simulation.cached_tokens();
    waits += simulation.waits_for_images();
    loads += simulation.images_loaded();
    shared += simulation.loads_shared();
  }
  // The histories must reach the hard cases, or they prove nothing.
  EXPECT_GT(preemptions, 1000);
  EXPECT_GT(cached, 10'000);
  EXPECT_GT(waits, 1000);
  EXPECT_GT(loads, 10'000);
  EXPECT_GT(shared, 300);
}

}  // namespace
}  // namespace lorikeet
