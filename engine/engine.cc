#include "engine/engine.h"

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/image_ledger.h"
#include "engine/scheduler/scheduler.h"

namespace lorikeet {
namespace {

SchedulerOptions ForScheduler(const EngineOptions& options) {
  return {.limits = options.limits,
          .kv = options.kv,
          .pages = options.pages,
          .prefix_cache = options.prefix_cache,
          .eos_ids = options.eos_ids,
          .tenant_image_pages = options.tenant_image_pages};
}

absl::Status AtLeast(const char* name, int64_t value, int64_t bound) {
  if (value >= bound) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", value, "; it must be at least ", bound));
}

absl::Status CheckOptions(const EngineOptions& options) {
  const Limits& limits = options.limits;
  LK_RETURN_IF_ERROR(AtLeast("max_context_tokens", limits.max_context_tokens, 2));
  LK_RETURN_IF_ERROR(AtLeast("max_batch_tokens", limits.max_batch_tokens, 1));
  LK_RETURN_IF_ERROR(AtLeast("max_running_requests", limits.max_running_requests, 1));
  LK_RETURN_IF_ERROR(AtLeast("max_queued_requests", limits.max_queued_requests, 0));
  LK_RETURN_IF_ERROR(AtLeast("the KV layout's pages per block", options.kv.pages_per_block, 1));
  LK_RETURN_IF_ERROR(AtLeast("the vocabulary", options.vocab, 1));
  return AtLeast("the pool's number of pages", options.pages, options.kv.pages_per_block);
}

absl::Status CheckToken(const char* field, size_t index, int32_t id, int32_t vocab) {
  if (id >= 0 && id < vocab) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, "[", index, "] is token id ", id,
                                                 "; the vocabulary has ids 0 to ", vocab - 1));
}

// Of an adapter, in the pool.
struct ImageSizes {
  ImageSize own;
  ImageSize shared;  // of Adapter::shared

  int32_t most_pages() const { return own.most_pages() + shared.most_pages(); }
};

absl::StatusOr<ImageSizes> ImageSizesOf(const Request& request, const AdapterImages* images) {
  ImageSizes sizes;
  const Adapter* adapter = request.adapter.get();
  if (adapter == nullptr || images == nullptr) return sizes;
  LK_ASSIGN_OR_RETURN(sizes.own, images->Size(*adapter));
  if (adapter->shared == nullptr) return sizes;
  LK_ASSIGN_OR_RETURN(sizes.shared, images->Size(*adapter->shared));
  return sizes;
}

// Tokens that the pool holds beside the request's adapter.
absl::StatusOr<int32_t> TokensBeside(const Request& request, const SchedulerOptions& options,
                                     int32_t image_pages) {
  const int32_t kv_sets = request.adapter.get() ? request.adapter.get()->kv_sets() : 1;
  if (!request.adapter.tenant().empty() && image_pages > options.tenant_image_pages) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "adapter '", request.adapter_name, "' takes ", image_pages, " pages of ",
        options.kv.page_bytes(), " bytes; its tenant '", request.adapter.tenant(), "' has ",
        options.tenant_image_pages));
  }
  const int32_t tokens = ContextTokens(options, image_pages, kv_sets);
  if (tokens >= 2) return tokens;
  return absl::ResourceExhaustedError(absl::StrCat(
      "adapter '", request.adapter_name, "' takes ", image_pages, " pages of ",
      options.kv.page_bytes(), " bytes; the pool has ", options.pages));
}

// Of the adapter where it has one of its own.
int32_t VocabularyOf(const Request& request, const EngineOptions& options) {
  const Adapter* adapter = request.adapter.get();
  return adapter != nullptr && adapter->vocab > 0 ? adapter->vocab : options.vocab;
}

absl::Status CheckRequest(const Request& request, const EngineOptions& options,
                          int32_t context_tokens) {
  const int32_t vocab = VocabularyOf(request, options);
  if (request.prompt.empty()) return absl::InvalidArgumentError("the prompt is empty");
  const int64_t virtual_tokens =
      request.adapter.get() ? request.adapter.get()->virtual_tokens.count : 0;
  const int64_t prompt = static_cast<int64_t>(request.prompt.size()) + virtual_tokens;
  if (prompt >= context_tokens) {
    const bool pool = context_tokens < options.limits.max_context_tokens;
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt has ", prompt, " tokens",
        virtual_tokens > 0 ? absl::StrCat(" with the adapter's ", virtual_tokens) : "",
        "; at most ", context_tokens - 1,
        " leave room for an answer (", pool ? "the page pool holds " : "the context is ",
        context_tokens, " tokens)"));
  }
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    LK_RETURN_IF_ERROR(CheckToken("prompt", i, request.prompt[i], vocab));
  }
  LK_RETURN_IF_ERROR(AtLeast("max_new_tokens", request.max_new_tokens, 1));
  if (request.cache_salt.size() > Limits::kMaxCacheSaltBytes) {
    return absl::InvalidArgumentError(absl::StrCat("cache_salt: ", request.cache_salt.size(),
                                                   " bytes; at most ",
                                                   Limits::kMaxCacheSaltBytes, " are allowed"));
  }
  if (request.stop_token_ids.size() > Limits::kMaxStopTokenIds) {
    return absl::InvalidArgumentError(absl::StrCat(request.stop_token_ids.size(),
                                                   " stop token ids; at most ",
                                                   Limits::kMaxStopTokenIds, " are allowed"));
  }
  for (size_t i = 0; i < request.stop_token_ids.size(); ++i) {
    LK_RETURN_IF_ERROR(CheckToken("stop_token_ids", i, request.stop_token_ids[i], vocab));
  }
  for (const auto& [id, bias] : request.sampling.logit_bias) {
    LK_RETURN_IF_ERROR(CheckToken("logit_bias", 0, id, vocab));
  }
  for (const std::vector<int32_t>& word : request.sampling.bad_words) {
    for (size_t i = 0; i < word.size(); ++i) {
      LK_RETURN_IF_ERROR(CheckToken("bad_words", i, word[i], vocab));
    }
  }
  return ValidateSampling(request.sampling);
}

}  // namespace

struct Engine::Impl {
  struct Submission {
    RequestId id;
    Request request;
    ImageSizes image;
    std::shared_ptr<TokenSink> sink;
  };
  // A request whose kFinished is still to come.
  struct Open {
    std::shared_ptr<TokenSink> sink;
    uint64_t image = 0;  // Adapter::serial; 0: none
    int64_t enqueued_us = 0;
    int64_t adapter_copy_us = 0;
  };

  Impl(const EngineOptions& options, Runner* runner, const Clock* clock, StatsSink* stats)
      : options(options),
        images(runner->images()),
        scheduler_options(ForScheduler(options)),
        max_open(int64_t{options.limits.max_running_requests} + options.limits.max_queued_requests),
        runner(runner),
        clock(clock),
        stats(stats),
        ledger(options.kv.page_bytes()),
        scheduler(scheduler_options) {
    if (images != nullptr) images->SetWake([this] { WakeForImages(); });
  }
  ~Impl() {
    if (images != nullptr) images->SetWake(nullptr);
  }

  void Loop();
  bool TakeInbox();
  void Enqueue(Submission submission);
  void Step();
  void WakeForImages();
  void TakeLoaded();
  void CountRunning(bool planned);
  void Deliver();

  const EngineOptions options;
  AdapterImages* const images;  // nullptr: none are needed
  const SchedulerOptions scheduler_options;
  const int64_t max_open;
  Runner* const runner;
  const Clock* const clock;
  StatsSink* const stats;
  ImageLedger ledger;

  // The inbox and what the front asks about, under `mutex`.
  mutable std::mutex mutex;
  std::condition_variable wake;
  RequestId next_id = 1;
  std::unordered_map<RequestId, bool> open;  // -> its cancellation is in the inbox or done
  std::vector<Submission> submissions;
  std::vector<RequestId> cancels;
  bool draining = false;
  int64_t drain_until_us = std::numeric_limits<int64_t>::max();
  absl::Status device;  // written by the engine thread alone
  int32_t running = 0;
  int64_t decode_waits = 0;
  bool images_came = false;  // or are to go

  // The engine thread's own.
  Scheduler scheduler;
  bool blocked = false;  // all requests wait for images
  std::unordered_map<RequestId, Open> requests;
  std::vector<Submission> taken_submissions;
  std::vector<RequestId> taken_cancels;
  Batch batch;
  RequestEvents events;

  std::mutex join_mutex;
  std::thread thread;
};

void Engine::Impl::Loop() {
  while (TakeInbox()) Step();
}

// Sleeps while there is nothing to do, then moves the inbox into the scheduler. False: drained.
bool Engine::Impl::TakeInbox() {
  bool stop = false;
  {
    std::unique_lock lock(mutex);
    wake.wait(lock, [this] {
      return draining || images_came || !submissions.empty() || !cancels.empty() ||
             (!scheduler.empty() && !blocked);
    });
    images_came = false;
    taken_submissions.swap(submissions);
    taken_cancels.swap(cancels);
    stop = draining && clock->NowMicros() >= drain_until_us;
    if (draining && scheduler.empty() && taken_submissions.empty()) return false;
  }
  for (Submission& submission : taken_submissions) Enqueue(std::move(submission));
  for (const RequestId id : taken_cancels) scheduler.Cancel(id, clock->NowMicros(), &events);
  taken_submissions.clear();
  taken_cancels.clear();
  if (stop) {
    scheduler.FailAll(absl::UnavailableError("the server shut down before the request ended"),
                      clock->NowMicros(), &events);
  }
  return true;
}

void Engine::Impl::Enqueue(Submission submission) {
  const Adapter* adapter = submission.request.adapter.get();
  requests[submission.id] = {.sink = std::move(submission.sink),
                             .image = submission.image.own.empty() ? 0 : adapter->serial,
                             .enqueued_us = clock->NowMicros()};
  scheduler.Enqueue(submission.id, std::move(submission.request), submission.image.own,
                    submission.image.shared);
}

void Engine::Impl::Step() {
  const int64_t start_us = clock->NowMicros();
  scheduler.Expire(start_us, &events);
  if (!device.ok()) scheduler.FailAll(device, start_us, &events);
  TakeLoaded();
  const bool planned = scheduler.Plan(start_us, &batch);
  blocked = !planned;
  AdapterMoves moves = scheduler.TakeMoves();
  if (!moves.empty()) {
    ledger.Begin(moves, clock->NowMicros());
    images->Move(std::move(moves));
  }
  ledger.Settle();
  CountRunning(planned);
  if (planned) {
    absl::StatusOr<StepResult> result = runner->Run(batch);
    const int64_t end_us = clock->NowMicros();
    if (result.ok()) {
      scheduler.Commit(*std::move(result), end_us, &events);
      StepStats step = scheduler.stats();
      step.step_us = end_us - start_us;
      if (stats != nullptr) stats->OnStep(step);
    } else {
      const absl::Status failure =
          absl::UnavailableError(absl::StrCat("the device failed: ", result.status().ToString()));
      scheduler.FailAll(failure, end_us, &events);
      std::lock_guard lock(mutex);
      device = failure;
    }
  }
  Deliver();
}

void Engine::Impl::WakeForImages() {
  {
    std::lock_guard lock(mutex);
    images_came = true;
  }
  wake.notify_one();
}

void Engine::Impl::TakeLoaded() {
  if (images == nullptr) return;
  for (const AdapterLoaded& loaded : images->TakeLoaded()) {
    const int64_t now_us = clock->NowMicros();
    const int64_t begun_us = ledger.End(loaded, now_us);
    for (auto& [id, request] : requests) {
      if (request.image != loaded.serial) continue;
      request.adapter_copy_us += now_us - std::max(begun_us, request.enqueued_us);
    }
    scheduler.Loaded(loaded, now_us, &events);
  }
}

void Engine::Impl::CountRunning(bool planned) {
  std::lock_guard lock(mutex);
  running = scheduler.running();
  if (!planned && running > 0) ++decode_waits;
}

// Finished requests leave the count of open ones first: whoever sees kFinished can submit again.
void Engine::Impl::Deliver() {
  {
    std::lock_guard lock(mutex);
    running = scheduler.running();
    for (const RequestEvent& e : events) {
      if (e.event.kind == TokenEvent::Kind::kFinished) open.erase(e.id);
    }
  }
  for (RequestEvent& e : events) {
    const auto request = requests.find(e.id);
    LK_CHECK(request != requests.end());
    const bool last = e.event.kind == TokenEvent::Kind::kFinished;
    e.event.adapter_copy_us = request->second.adapter_copy_us;
    request->second.sink->Push(std::move(e.event));
    if (last) requests.erase(request);
  }
  events.clear();
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Start(const EngineOptions& options, Runner* runner,
                                                      const Clock* clock, StatsSink* stats) {
  LK_CHECK(runner != nullptr && clock != nullptr);
  LK_RETURN_IF_ERROR(CheckOptions(options));
  auto impl = std::make_unique<Impl>(options, runner, clock, stats);
  impl->thread = std::thread([raw = impl.get()] { raw->Loop(); });
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::~Engine() { Shutdown(0); }

absl::StatusOr<RequestId> Engine::Submit(Request request, std::shared_ptr<TokenSink> sink) {
  LK_ASSIGN_OR_RETURN(const ImageSizes image, ImageSizesOf(request, impl_->images));
  LK_ASSIGN_OR_RETURN(const int32_t tokens,
                      TokensBeside(request, impl_->scheduler_options, image.most_pages()));
  LK_RETURN_IF_ERROR(CheckRequest(request, impl_->options, tokens));
  const int64_t room = tokens - static_cast<int64_t>(request.prompt.size());
  LK_CHECK_MSG(sink->capacity() >= std::min<int64_t>(request.max_new_tokens, room) + 2,
               "the sink is too small for the request");
  RequestId id = 0;
  {
    std::lock_guard lock(impl_->mutex);
    if (!impl_->device.ok()) return impl_->device;
    if (impl_->draining) return absl::UnavailableError("the server is shutting down");
    if (static_cast<int64_t>(impl_->open.size()) >= impl_->max_open) {
      const Limits& limits = impl_->options.limits;
      return absl::ResourceExhaustedError(absl::StrCat(
          "the queue is full: ", impl_->open.size(), " requests are open, the bound is ",
          impl_->max_open, " (max_running_requests ", limits.max_running_requests,
          " and max_queued_requests ", limits.max_queued_requests, ")"));
    }
    id = impl_->next_id++;
    impl_->open.emplace(id, false);
    impl_->submissions.push_back({id, std::move(request), image, std::move(sink)});
  }
  impl_->wake.notify_one();
  return id;
}

void Engine::Cancel(RequestId id) {
  {
    std::lock_guard lock(impl_->mutex);
    const auto found = impl_->open.find(id);
    if (found == impl_->open.end() || found->second) return;
    found->second = true;
    impl_->cancels.push_back(id);
  }
  impl_->wake.notify_one();
}

void Engine::Shutdown(int64_t grace_us) {
  {
    std::lock_guard lock(impl_->mutex);
    impl_->draining = true;
    const int64_t now_us = impl_->clock->NowMicros();
    const int64_t until_us =
        now_us + std::min(grace_us, std::numeric_limits<int64_t>::max() - now_us);
    impl_->drain_until_us = std::min(impl_->drain_until_us, until_us);
  }
  impl_->wake.notify_one();
  std::lock_guard lock(impl_->join_mutex);
  if (impl_->thread.joinable()) impl_->thread.join();
}

absl::Status Engine::device_status() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->device;
}

Engine::Gauges Engine::gauges() const {
  std::lock_guard lock(impl_->mutex);
  return {.waiting = static_cast<int32_t>(impl_->open.size()) - impl_->running,
          .running = impl_->running,
          .decode_waits = impl_->decode_waits,
          .images = impl_->ledger.counts()};
}

int64_t Engine::ImageBytes(uint64_t serial) const { return impl_->ledger.Bytes(serial); }

void Engine::Release(uint64_t serial, std::function<void(int64_t bytes)> done) {
  if (!impl_->ledger.Release(serial, &done)) return done(0);
  impl_->WakeForImages();
}

}  // namespace lorikeet
