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
#include "engine/api/device_tier.h"
#include "engine/api/limits.h"
#include "engine/api/request.h"
#include "engine/api/step_stats.h"
#include "engine/api/token_event.h"
#include "engine/base/clock.h"
#include "engine/image_ledger.h"
#include "engine/memory/kv_layout.h"
#include "engine/runner/runner.h"

namespace lorikeet {

// A request's outgoing events. The engine pushes and then calls `wake`, on the engine thread: it
// must neither block nor call Shutdown. One front thread at a time pops. Every event has its own
// slot from the start, so a push never blocks or allocates and nothing can be overrun.
class TokenSink {
 public:
  // `max_events`: at least 2 more than the tokens that can come, which are max_new_tokens or what
  // the context leaves after the prompt. Slots cost memory only once they are used.
  TokenSink(int32_t max_events, std::function<void()> wake);
  ~TokenSink();
  TokenSink(const TokenSink&) = delete;
  TokenSink& operator=(const TokenSink&) = delete;

  bool Pop(TokenEvent* event);  // false: nothing there now

  void Push(TokenEvent event);  // engine thread
  int32_t capacity() const;

 private:
  struct Slots;
  std::unique_ptr<Slots> slots_;
  std::function<void()> wake_;
};

struct EngineOptions {
  Limits limits;                 // max_context_tokens resolved: > 0
  KvLayout kv;
  int32_t pages = 0;             // in the pool
  bool prefix_cache = true;      // requests begin behind what earlier ones computed
  int32_t vocab = 0;
  std::vector<int32_t> eos_ids;
  // For the images of each tenant's adapters (AdapterLease::tenant).
  int32_t tenant_image_pages = std::numeric_limits<int32_t>::max();
};

class Engine final : public DeviceTier {
 public:
  // `runner`, `clock` and `stats` (may be nullptr) outlive the engine. Starts the thread.
  // INVALID_ARGUMENT names an option out of range.
  static absl::StatusOr<std::unique_ptr<Engine>> Start(const EngineOptions& options,
                                                       Runner* runner, const Clock* clock,
                                                       StatsSink* stats);
  ~Engine() override;  // Shutdown(0) if still running

  // Any thread. INVALID_ARGUMENT: empty prompt, token id out of range, prompt too long for the
  // context or the pool beside its adapter, bad sampling values; RESOURCE_EXHAUSTED:
  // max_running_requests + max_queued_requests are open already; UNAVAILABLE: draining or the device
  // failed. Each names value and bound. After OK the sink gets exactly one kFinished, last.
  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<TokenSink> sink);

  // Any thread; unknown or finished ids are ignored. The sink gets kFinished/kCanceled, unless the
  // request ended first.
  void Cancel(RequestId id);

  // Refuses new requests, lets open ones finish for at most `grace_us`, ends the rest with
  // UNAVAILABLE and joins the thread. Any thread but the engine's. Idempotent; of several calls
  // the shortest grace counts.
  void Shutdown(int64_t grace_us);

  // Any thread. UNAVAILABLE with the cause once the device has failed: no request can be served.
  absl::Status device_status() const;

  struct Gauges {
    int32_t waiting = 0;  // submitted and preempted requests that hold no pages
    int32_t running = 0;
    // Steps that did not run, though a request was generating, because images were on their way.
    int64_t decode_waits = 0;
    ImageCounts images;
  };
  Gauges gauges() const;  // any thread

  int64_t ImageBytes(uint64_t serial) const override;
  void Release(uint64_t serial, std::function<void(int64_t bytes)> done) override;

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lorikeet
