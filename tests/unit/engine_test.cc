// The engine's thread, inbox and sinks, over a fake model whose answers are known.
#include "engine/engine.h"

#include <array>
#include <atomic>
#include <condition_variable>
#include <future>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/sim/fake_runner.h"

namespace lorikeet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int64_t kHour = int64_t{3600} * 1000 * 1000;
constexpr int32_t kVocab = 64;

// The reader of one sink; any thread. It may die before its request ends.
class Reader {
 public:
  explicit Reader(int32_t max_events)
      : sink_(std::make_shared<TokenSink>(max_events, [bell = bell_] {
          std::lock_guard lock(bell->mutex);
          bell->rung.notify_one();
        })) {}

  std::shared_ptr<TokenSink> sink() { return sink_; }

  TokenEvent Next() {
    std::unique_lock lock(bell_->mutex);
    TokenEvent event;
    bell_->rung.wait(lock, [&] { return sink_->Pop(&event); });
    return event;
  }

  // Reads to the end; the tokens on the way are kept.
  TokenEvent Finish() {
    while (true) {
      TokenEvent event = Next();
      if (event.kind == TokenEvent::Kind::kFinished) return event;
      if (event.kind == TokenEvent::Kind::kToken) tokens.push_back(event.token);
    }
  }

  std::vector<int32_t> tokens;

 private:
  struct Bell {
    std::mutex mutex;
    std::condition_variable rung;
  };
  std::shared_ptr<Bell> bell_ = std::make_shared<Bell>();
  std::shared_ptr<TokenSink> sink_;
};

// Holds the runner in its first step until opened, so that a test knows what is in flight.
class Gate {
 public:
  void Open() {
    std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void Pass() {
    std::unique_lock lock(mutex_);
    arrived_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  void AwaitArrival() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return arrived_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  bool arrived_ = false;
};

class StatsRecorder final : public StatsSink {
 public:
  void OnStep(const StepStats& stats) override {
    std::lock_guard lock(mutex_);
    steps_.push_back(stats);
  }
  std::vector<StepStats> steps() {
    std::lock_guard lock(mutex_);
    return steps_;
  }

 private:
  std::mutex mutex_;
  std::vector<StepStats> steps_;
};

Request MakeRequest(std::vector<int32_t> prompt, int32_t max_new, uint64_t seed = 1) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_new_tokens = max_new;
  request.sampling.seed = seed;
  return request;
}

// What the fake model answers to `request` alone, without stop ids.
std::vector<int32_t> Alone(const Request& request) {
  const FakeModel model{kVocab};
  std::vector<int32_t> history = request.prompt, answer;
  while (static_cast<int32_t>(answer.size()) < request.max_new_tokens) {
    const uint64_t state = model.State(history, request.adapter.get());
    answer.push_back(model.Token(state, request.sampling.seed));
    history.push_back(answer.back());
  }
  return answer;
}

class EngineTest : public ::testing::Test {
 protected:
  EngineTest() {
    options_.limits.max_context_tokens = 200;
    options_.limits.max_batch_tokens = 32;
    options_.limits.max_running_requests = 8;
    options_.limits.max_queued_requests = 100;
    options_.kv = KvLayout::Make(2, 1, 64, DType::kF32);
    options_.pages = 40;
    options_.vocab = kVocab;
  }

  void Start() {
    runner_ = std::make_unique<FakeRunner>(FakeModel{kVocab}, options_.kv, options_.pages,
                                           images_.get());
    runner_->on_run = on_run_;
    auto engine = Engine::Start(options_, runner_.get(), &clock_, &stats_);
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }

  void HoldFirstStep() {
    on_run_ = [this](const Batch&, StepResult*) {
      gate_.Pass();
      return absl::OkStatus();
    };
  }

  absl::StatusOr<RequestId> Submit(const Request& request, Reader* reader) {
    return engine_->Submit(request, reader->sink());
  }

  // REQUIRES: the queue is full, so that nothing is accepted on the way.
  void AwaitDraining() {
    Reader reader(3);
    absl::StatusCode code;
    do {
      code = Submit(MakeRequest({1}, 1), &reader).status().code();
      std::this_thread::yield();
    } while (code == absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(code, absl::StatusCode::kUnavailable);
  }

  EngineOptions options_;
  std::unique_ptr<FakeImages> images_;  // nullptr: adapters need none
  FakeClock clock_;
  StatsRecorder stats_;
  Gate gate_;
  std::function<absl::Status(const Batch&, StepResult*)> on_run_;
  std::unique_ptr<FakeRunner> runner_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(EngineTest, ManyThreadsGetTheAnswersTheyWouldGetAlone) {
  options_.pages = 14;  // two contexts and a bit: preemption on the way
  Start();
  std::vector<AdapterLease> adapters = {{}};
  for (int i = 1; i < 5; ++i) {
    auto adapter = std::make_shared<Adapter>();
    adapter->version = "v" + std::to_string(i);
    adapters.emplace_back(adapter);
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 25; ++i) {
        Request request = MakeRequest({}, 1 + random() % 60, random());
        for (int n = 1 + random() % 60; n > 0; --n) request.prompt.push_back(random() % kVocab);
        request.adapter = adapters[random() % adapters.size()];
        Reader reader(request.max_new_tokens + 2);
        const auto id = Submit(request, &reader);
        ASSERT_TRUE(id.ok()) << id.status();
        EXPECT_EQ(reader.Finish().finish, FinishReason::kLength);
        EXPECT_EQ(reader.tokens, Alone(request)) << "thread " << t << ", request " << i;
        TokenEvent event;
        EXPECT_FALSE(reader.sink()->Pop(&event)) << "an event after kFinished";
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(engine_->gauges().waiting + engine_->gauges().running, 0);
}

TEST_F(EngineTest, StepsAreCountedWithTheirDistinctAdapters) {
  HoldFirstStep();
  Start();
  Reader first(3);
  ASSERT_TRUE(Submit(MakeRequest({1}, 1), &first).ok());
  gate_.AwaitArrival();
  std::vector<std::unique_ptr<Reader>> readers;
  for (int i = 0; i < 5; ++i) {  // the base and four adapters, all there for the second step
    auto adapter = std::make_shared<Adapter>();
    adapter->version = std::to_string(i);
    Request request = MakeRequest({1, 2, 3}, 2);
    if (i > 0) request.adapter = AdapterLease(adapter);
    readers.push_back(std::make_unique<Reader>(4));
    ASSERT_TRUE(Submit(request, readers.back().get()).ok());
  }
  EXPECT_EQ(engine_->gauges().running, 1);
  EXPECT_EQ(engine_->gauges().waiting, 5);
  gate_.Open();
  for (auto& reader : readers) reader->Finish();
  const std::vector<StepStats> steps = stats_.steps();
  ASSERT_EQ(steps.size(), 3u);
  EXPECT_EQ(steps[1].distinct_adapters, 4);
  EXPECT_EQ(steps[1].rows, 15);
  EXPECT_EQ(steps[1].prefill_rows, 15);
  EXPECT_EQ(steps[1].base_rows, 3);
  EXPECT_EQ(steps[2].rows, 5);
  EXPECT_EQ(steps[2].prefill_rows, 0);
  EXPECT_EQ(steps[2].tokens_sampled, 5);
  EXPECT_EQ(steps[2].pages_used, 0);
}

TEST_F(EngineTest, BadRequestsAreRefusedWithValueAndBound) {
  options_.pages = 3;  // 48 tokens, less than the context
  Start();
  const auto refused = [&](const Request& request, const char* value, const char* bound) {
    Reader reader(300);
    const auto id = Submit(request, &reader);
    EXPECT_EQ(id.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(id.status().message()), AllOf(HasSubstr(value), HasSubstr(bound)));
  };
  refused(MakeRequest({}, 5), "prompt", "empty");
  refused(MakeRequest({1, 64}, 5), "prompt[1] is token id 64", "0 to 63");
  refused(MakeRequest({-1}, 5), "-1", "0 to 63");
  refused(MakeRequest(std::vector<int32_t>(48, 1), 5), "48 tokens", "at most 47");
  refused(MakeRequest({1}, 0), "max_new_tokens is 0", "at least 1");
  Request stops = MakeRequest({1}, 5);
  stops.stop_token_ids = {3, 99};
  refused(stops, "stop_token_ids[1]", "63");
  stops.stop_token_ids.assign(65, 3);
  refused(stops, "65", "64");
  Request sampling = MakeRequest({1}, 5);
  sampling.sampling.temperature = -1;
  refused(sampling, "temperature is -1", "at least 0");
  Reader reader(7);
  EXPECT_TRUE(Submit(MakeRequest(std::vector<int32_t>(47, 1), 5), &reader).ok());
  EXPECT_EQ(reader.Finish().finish, FinishReason::kLength);
  EXPECT_EQ(reader.tokens.size(), 1u);
}

TEST_F(EngineTest, BadOptionsAreRefused) {
  EngineOptions options = options_;
  options.limits.max_batch_tokens = 0;
  FakeRunner runner(FakeModel{kVocab}, options.kv, 1);
  const auto engine = Engine::Start(options, &runner, &clock_, nullptr);
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(engine.status().message()), HasSubstr("max_batch_tokens is 0"));
  options = options_;
  options.pages = 0;
  EXPECT_FALSE(Engine::Start(options, &runner, &clock_, nullptr).ok());
}

TEST_F(EngineTest, AFullQueueSaysSoAndTakesRequestsAgainWhenOneEnds) {
  options_.limits.max_running_requests = 2;
  options_.limits.max_queued_requests = 1;
  HoldFirstStep();
  Start();
  Reader a(3), b(3), c(3), d(3);
  ASSERT_TRUE(Submit(MakeRequest({1}, 1), &a).ok());
  gate_.AwaitArrival();
  ASSERT_TRUE(Submit(MakeRequest({1}, 1), &b).ok());
  ASSERT_TRUE(Submit(MakeRequest({1}, 1), &c).ok());
  const absl::Status full = Submit(MakeRequest({1}, 1), &d).status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), AllOf(HasSubstr("3 requests"), HasSubstr("is 3")));
  gate_.Open();
  a.Finish();
  EXPECT_TRUE(Submit(MakeRequest({1}, 1), &d).ok()) << "one ended";
  for (Reader* reader : {&b, &c, &d}) {
    EXPECT_EQ(reader->Finish().finish, FinishReason::kLength);
  }
}

TEST_F(EngineTest, CancelEndsRunningAndWaitingRequestsOnce) {
  options_.limits.max_running_requests = 1;
  HoldFirstStep();
  Start();
  Reader running(150), waiting(150), other(12);
  const auto first = Submit(MakeRequest({1}, 148), &running);
  gate_.AwaitArrival();
  const auto second = Submit(MakeRequest({2}, 148), &waiting);
  ASSERT_TRUE(Submit(MakeRequest({3}, 10), &other).ok());
  for (const RequestId id : {*second, *first, *first, RequestId{999}}) engine_->Cancel(id);
  gate_.Open();
  EXPECT_EQ(running.Finish().finish, FinishReason::kCanceled);
  EXPECT_EQ(running.tokens.size(), 1u) << "the step in flight ends, no other begins";
  EXPECT_EQ(waiting.Finish().finish, FinishReason::kCanceled);
  EXPECT_EQ(other.Finish().finish, FinishReason::kLength);
  engine_->Cancel(*first);
}

TEST_F(EngineTest, ADeadlineEndsARequestBetweenSteps) {
  on_run_ = [this](const Batch&, StepResult*) {
    clock_.Advance(10);
    return absl::OkStatus();
  };
  Start();
  Request request = MakeRequest({1}, 100);
  request.deadline_us = 35;
  Reader reader(102);
  ASSERT_TRUE(Submit(request, &reader).ok());
  const TokenEvent end = reader.Finish();
  EXPECT_EQ(end.finish, FinishReason::kError);
  EXPECT_EQ(end.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(reader.tokens.size(), 4u) << "steps end at 10, 20, 30 and 40";
  EXPECT_EQ(end.time_us, 40);
}

TEST_F(EngineTest, AFailedDeviceEndsEverythingAndIsRemembered) {
  int32_t steps = 0;
  on_run_ = [&](const Batch&, StepResult*) {
    gate_.Pass();
    return ++steps == 3 ? absl::InternalError("bus error 7") : absl::OkStatus();
  };
  options_.limits.max_running_requests = 1;
  Start();
  Reader running(102), waiting(102), late(102);
  ASSERT_TRUE(Submit(MakeRequest({1}, 100), &running).ok());
  ASSERT_TRUE(Submit(MakeRequest({1}, 100), &waiting).ok());
  gate_.Open();
  for (Reader* reader : {&running, &waiting}) {
    const TokenEvent end = reader->Finish();
    EXPECT_EQ(end.finish, FinishReason::kError);
    EXPECT_EQ(end.status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(end.status.message()), HasSubstr("bus error 7"));
  }
  EXPECT_EQ(running.tokens.size(), 2u);
  const absl::Status refused = Submit(MakeRequest({1}, 100), &late).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("bus error 7"));
  EXPECT_EQ(engine_->device_status(), refused);
}

TEST_F(EngineTest, ShutdownLetsOpenRequestsFinishWithinTheGrace) {
  options_.limits.max_running_requests = 2;
  options_.limits.max_queued_requests = 0;
  HoldFirstStep();
  Start();
  Reader a(52), b(52), late(3);
  ASSERT_TRUE(Submit(MakeRequest({1}, 50), &a).ok());
  gate_.AwaitArrival();
  ASSERT_TRUE(Submit(MakeRequest({2}, 50), &b).ok());
  std::thread shutdown([this] { engine_->Shutdown(kHour); });
  AwaitDraining();
  gate_.Open();
  EXPECT_EQ(a.Finish().finish, FinishReason::kLength);
  EXPECT_EQ(b.Finish().finish, FinishReason::kLength);
  EXPECT_EQ(b.tokens.size(), 50u);
  shutdown.join();
  EXPECT_EQ(Submit(MakeRequest({1}, 1), &late).status().code(), absl::StatusCode::kUnavailable);
  engine_->Shutdown(0);
}

TEST_F(EngineTest, ShutdownEndsWhatOutlivesTheGrace) {
  on_run_ = [this](const Batch&, StepResult*) {
    gate_.Pass();
    clock_.Advance(10);
    return absl::OkStatus();
  };
  options_.limits.max_running_requests = 1;
  options_.limits.max_queued_requests = 1;
  Start();
  Reader running(152), waiting(152);
  ASSERT_TRUE(Submit(MakeRequest({1}, 150), &running).ok());
  ASSERT_TRUE(Submit(MakeRequest({1}, 150), &waiting).ok());
  gate_.AwaitArrival();
  std::thread shutdown([this] { engine_->Shutdown(500); });
  AwaitDraining();
  gate_.Open();
  for (Reader* reader : {&running, &waiting}) {
    const TokenEvent end = reader->Finish();
    EXPECT_EQ(end.finish, FinishReason::kError);
    EXPECT_EQ(end.status.code(), absl::StatusCode::kUnavailable);
    EXPECT_GE(end.time_us, 500);
  }
  EXPECT_EQ(running.tokens.size(), 50u);
  shutdown.join();
}

// As may be where the bound has become smaller since the adapter was loaded.
TEST_F(EngineTest, AnImageBeyondItsTenantsBoundIsRefusedAndNotWaitedFor) {
  images_ = std::make_unique<FakeImages>(options_.pages);
  options_.tenant_image_pages = 4;
  Start();
  for (const auto& [tenant, pages] : {std::pair("x", 5), std::pair("x", 4), std::pair("", 5)}) {
    auto adapter = std::make_shared<Adapter>();
    adapter->bytes = pages;
    Request request = MakeRequest({1, 2, 3}, 4);
    request.adapter = AdapterLease(adapter, adapter, tenant);
    request.adapter_name = "the-one";
    Reader reader(6);
    const absl::Status status = Submit(request, &reader).status();
    if (pages == 4 || request.adapter.tenant().empty()) {
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(reader.Finish().finish, FinishReason::kLength);
      continue;
    }
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("'the-one' takes 5 pages"), HasSubstr("'x' has 4")));
  }
}

TEST_F(EngineTest, AnImageIsReportedAndFreedThoughNothingElseIsToDo) {
  images_ = std::make_unique<FakeImages>(options_.pages);
  images_->steps_to_load = [this] {
    clock_.Advance(500);
    return 3;
  };
  Start();
  auto home = std::make_shared<Adapter>();
  home->bytes = 5;
  const uint64_t serial = home->serial;
  EXPECT_EQ(engine_->ImageBytes(serial), 0);
  Request request = MakeRequest({1, 2, 3}, 4);
  for (const bool first : {true, false}) {
    request.adapter = AdapterLease(std::shared_ptr<const Adapter>(home.get(), [](auto*) {}), home);
    Reader reader(6);
    ASSERT_TRUE(Submit(request, &reader).ok());
    EXPECT_EQ(reader.Finish().adapter_copy_us, first ? 500 : 0);
  }
  request.adapter = AdapterLease();
  const int64_t bytes = 5 * options_.kv.page_bytes();
  EXPECT_EQ(engine_->ImageBytes(serial), bytes);
  EXPECT_EQ(engine_->gauges().images.images, 1);
  EXPECT_EQ(engine_->gauges().images.image_bytes, bytes);
  EXPECT_EQ(engine_->gauges().images.loads, 1);
  EXPECT_EQ(engine_->gauges().decode_waits, 0);

  home.reset();
  std::promise<int64_t> freed;
  engine_->Release(serial, [&](int64_t freed_bytes) { freed.set_value(freed_bytes); });
  EXPECT_EQ(freed.get_future().get(), bytes);
  EXPECT_EQ(engine_->ImageBytes(serial), 0);
  EXPECT_EQ(engine_->gauges().images.image_bytes, 0);
  EXPECT_EQ(engine_->gauges().images.drops, 1);
  int64_t again = -1;
  engine_->Release(serial, [&](int64_t freed_bytes) { again = freed_bytes; });
  EXPECT_EQ(again, 0) << "at once";
}

// Clients that come, cancel and hang up at any time: everything ends once, nothing stays pinned.
TEST_F(EngineTest, RandomClientsLeaveNothingBehind) {
  options_.pages = 15;
  Start();
  auto adapter = std::make_shared<const Adapter>();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(100 + t);
      for (int i = 0; i < 60; ++i) {
        Request request = MakeRequest({1, 2, 3}, 10 + random() % 100, random());
        if (random() % 2) request.adapter = AdapterLease(adapter);
        Reader reader(request.max_new_tokens + 2);
        const auto id = Submit(request, &reader);
        ASSERT_TRUE(id.ok()) << id.status();
        for (int n = random() % 8; n > 0; --n) reader.tokens.push_back(reader.Next().token);
        if (random() % 4) engine_->Cancel(*id);
        if (random() % 3 == 0) continue;  // hangs up, with or without cancelling
        reader.Finish();
        std::vector<int32_t> alone = Alone(request);
        ASSERT_LE(reader.tokens.size(), alone.size());
        alone.resize(reader.tokens.size());
        EXPECT_EQ(reader.tokens, alone);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  engine_->Shutdown(kHour);
  EXPECT_EQ(engine_->gauges().running + engine_->gauges().waiting, 0);
  EXPECT_EQ(adapter.use_count(), 1);
}

TEST(TokenSinkTest, EventsCrossThreadsInOrderAndLeftoversDie) {
  constexpr int32_t kEvents = 20000;
  std::atomic<int32_t> wakes{0};
  auto sink = std::make_shared<TokenSink>(kEvents, [&] { ++wakes; });
  std::thread pusher([&] {
    for (int32_t i = 0; i < kEvents; ++i) {
      TokenEvent event;
      event.token = i;
      event.logprobs.top.emplace_back(i, 0.5f);
      sink->Push(std::move(event));
    }
  });
  for (int32_t next = 0; next < kEvents - 100;) {
    TokenEvent event;
    if (!sink->Pop(&event)) continue;
    ASSERT_EQ(event.token, next);
    ASSERT_EQ(event.logprobs.top.at(0).first, next);
    ++next;
  }
  pusher.join();
  EXPECT_EQ(wakes, kEvents);
  sink.reset();  // the address sanitizer sees what is not freed
}

TEST(TokenSinkDeathTest, OneEventTooManyStopsTheProgram) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  TokenSink sink(1, nullptr);
  sink.Push({});
  EXPECT_DEATH(sink.Push({}), "more events");
}

TEST(ValidateSampling, NamesFieldValueAndBound) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(ValidateSampling({}).ok());
  EXPECT_TRUE(ValidateSampling({.temperature = 0,
                                .top_p = 1e-6f,
                                .top_k = 1,
                                .min_p = 1,
                                .repetition_penalty = 0.1f,
                                .presence_penalty = -2,
                                .frequency_penalty = 2,
                                .top_logprobs = 20})
                  .ok());
  const auto refused = [](SamplingParams params, const char* field) {
    const absl::Status status = ValidateSampling(params);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(field), HasSubstr("must be")));
  };
  for (const float bad : {kNaN, kInfinity, -kInfinity, -0.5f}) {
    refused({.temperature = bad}, "temperature");
    refused({.repetition_penalty = bad}, "repetition_penalty");
  }
  for (const float bad : {kNaN, 0.0f, -0.1f, 1.1f}) refused({.top_p = bad}, "top_p");
  for (const float bad : {kNaN, -0.1f, 1.1f}) refused({.min_p = bad}, "min_p");
  for (const float bad : {kNaN, -2.1f, 2.1f}) {
    refused({.presence_penalty = bad}, "presence_penalty");
    refused({.frequency_penalty = bad}, "frequency_penalty");
  }
  refused({.repetition_penalty = 0}, "repetition_penalty");
  refused({.top_k = -1}, "top_k");
  refused({.top_logprobs = -2}, "top_logprobs");
  refused({.top_logprobs = 21}, "top_logprobs");
}

}  // namespace
}  // namespace lorikeet
