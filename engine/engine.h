// The engine: one thread that plans, runs and commits steps; everything that happens to a request
// reaches it through one inbox.
//
//   front threads: Submit / Cancel -> inbox
//   engine thread: drain inbox -> plan -> run -> commit (push TokenEvents, free pages and leases)
//   front threads: TokenSink::Pop after its wake callback
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/api/limits.h"
#include "engine/api/request.h"
#include "engine/api/step_stats.h"
#include "engine/api/token_event.h"
#include "engine/base/clock.h"
#include "engine/memory/kv_layout.h"
#include "engine/runner/runner.h"

namespace lorikeet {

// A request's outgoing events. The engine pushes and calls `wake` (on the engine thread: it must
// not block); one front thread at a time pops. Sized for the request's token limit, so a push
// never blocks or allocates.
class TokenSink {
 public:
  // `max_events`: at least max_new_tokens + 2.
  TokenSink(int32_t max_events, std::function<void()> wake);
  ~TokenSink();

  bool Pop(TokenEvent* event);  // false: nothing there now

  void Push(TokenEvent event);  // engine thread

 private:
  struct Ring;
  std::unique_ptr<Ring> ring_;
  std::function<void()> wake_;
};

struct EngineOptions {
  Limits limits;                 // max_context_tokens resolved: > 0
  KvLayout kv;
  int32_t pages = 0;             // in the pool
  int32_t vocab = 0;
  std::vector<int32_t> eos_ids;
};

class Engine {
 public:
  // `runner`, `clock` and `stats` (may be nullptr) outlive the engine. Starts the thread.
  static absl::StatusOr<std::unique_ptr<Engine>> Start(const EngineOptions& options,
                                                       Runner* runner, const Clock* clock,
                                                       StatsSink* stats);
  ~Engine();  // Shutdown(0) if still running

  // Any thread. INVALID_ARGUMENT: empty prompt, token id out of range, prompt too long for the
  // context or the pool, bad sampling values; RESOURCE_EXHAUSTED: the queue is full;
  // UNAVAILABLE: draining or the device failed. Each names value and bound. After OK the sink gets
  // exactly one kFinished.
  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<TokenSink> sink);

  // Any thread; unknown or finished ids are ignored. The sink gets kFinished/kCanceled.
  void Cancel(RequestId id);

  // Refuses new requests, lets running ones finish for at most `grace_us`, cancels the rest and
  // joins the thread. Idempotent.
  void Shutdown(int64_t grace_us);

  struct Gauges {
    int32_t waiting = 0;
    int32_t running = 0;
  };
  Gauges gauges() const;  // any thread

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lorikeet
