// Decides what each step computes. Moves integers only: no threads, no device and no clock of its
// own, so that any history can be simulated.
//
// A step. Decode rows come first: every running sequence that lacks only its last token gets its
// one row, so a long prompt cannot delay tokens that are streaming. What is left of
// max_batch_tokens goes to prompts in chunks, in order of admission, then to newly admitted
// requests.
//
// Admission is round-robin over adapters (the base model counts as one) and first come, first
// served within an adapter. A request takes pages for its whole prompt at once, and while others
// run it leaves one block for each of them, so it is not preempted right away. A request whose turn
// it is but that does not fit yet is waited for, never skipped.
//   Bound on waiting: a request with k others of its adapter ahead of it, while at most A adapters
//   have requests waiting, is admitted after at most k + (k + 1)(A - 1) other requests.
//
// Adapters. Where the device needs an image of an adapter, it comes out of the same pool. Images are
// fetched in the order of admission, ahead of it and beside the steps; whose image is on its way is
// passed over until it is there, and keeps its turn. Whose image finds no room is waited for. An
// image stays when its requests end, until its pages are needed. What several adapters have in common
// (Adapter::shared) is an image of its own: fetched with the first of theirs, kept while any of theirs is there.
//
// A tenant's images have a bound of their own. Beyond it the tenant's idle ones make room, and where all are in
// use its requests wait, in their turn, while others pass them. Only a request that was preempted finds its
// image again whatever its tenant has.
//
// Preemption. When a running sequence needs a page and none is free, the one admitted last gives
// its pages back and waits, ahead of all new requests; its tokens are kept and recomputed as
// if they were prompt. So the running sequences are always older than the preempted ones, and the
// oldest always advances: with everybody else preempted and no image but its own the pool holds a
// whole context.
//
// Prefixes. Whole blocks of prompts and answers stay after their request, and a request begins
// behind what earlier ones computed of its tokens under the same KV identity; a preempted request
// finds its own blocks again, if nobody needed the pages. What nobody uses goes before anyone is
// preempted. Blocks are shared from the moment their step is planned, since a step writes all keys
// and values of a layer before it reads any.
//
// Results belong to the step that Plan recorded, not to the sequences' present state: a backend
// whose results come one step late needs a second recorded step, not another scheduler.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "engine/api/adapter_images.h"
#include "engine/api/limits.h"
#include "engine/api/request.h"
#include "engine/api/step_stats.h"
#include "engine/api/token_event.h"
#include "engine/memory/kv_layout.h"
#include "engine/memory/page_pool.h"
#include "engine/memory/page_shares.h"
#include "engine/memory/prefix_cache.h"
#include "engine/scheduler/batch.h"

namespace lorikeet {

struct SchedulerOptions {
  Limits limits;  // max_context_tokens resolved: > 0
  KvLayout kv;
  int32_t pages = 0;  // in the pool; at least two tokens' worth
  bool prefix_cache = true;
  std::vector<int32_t> eos_ids;
  // Of each tenant's images (AdapterLease::tenant), with what they have in common. No adapter's are more.
  int32_t tenant_image_pages = std::numeric_limits<int32_t>::max();
};

// Prompt and output together: the smaller of max_context_tokens and what the pool holds in `kv_sets`
// sets of keys and values beside an image of `image_pages`.
int32_t ContextTokens(const SchedulerOptions& options, int32_t image_pages = 0, int32_t kv_sets = 1);

struct RequestEvent {
  RequestId id = 0;
  TokenEvent event;
};
using RequestEvents = std::vector<RequestEvent>;

// One thread. Times are microseconds of the caller's clock; events are appended in order.
// REQUIRES: between Plan and its Commit, nothing but FailAll.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();

  // `image`: what the request's adapter takes of the pool; empty: it needs none. `shared`: what that has in common with
  // others.
  // REQUIRES: a new id; a prompt of 1 to ContextTokens() - 1 tokens beside its adapter's image;
  // max_new_tokens >= 1.
  void Enqueue(RequestId id, Request request, ImageSize image = {}, ImageSize shared = {});
  // Ends the request with kCanceled. Unknown ids are ignored.
  void Cancel(RequestId id, int64_t now_us, RequestEvents* events);
  // Ends every request whose deadline has passed with DEADLINE_EXCEEDED.
  void Expire(int64_t now_us, RequestEvents* events);
  // Ends every request with `status`, a planned step's included.
  void FailAll(const absl::Status& status, int64_t now_us, RequestEvents* events);

  // Fills `batch` with the next step and returns true, or false when there is no request or all wait
  // for images. Either way the moves it found are to be started before anything else.
  // `batch` points into the scheduler's sequences until Commit.
  bool Plan(int64_t now_us, Batch* batch);
  // `result` is of the planned step.
  void Commit(StepResult result, int64_t now_us, RequestEvents* events);

  AdapterMoves TakeMoves();
  // A load of TakeMoves has ended. If it failed, so do the adapter's requests.
  void Loaded(const AdapterLoaded& loaded, int64_t now_us, RequestEvents* events);

  bool empty() const { return sequences_.empty(); }
  int32_t waiting() const { return waiting_ + static_cast<int32_t>(preempted_.size()); }
  int32_t running() const { return static_cast<int32_t>(running_.size()); }
  int32_t pages_used() const {  // by requests
    return pool_.used() - cache_.cold_pages() - pages_images();
  }
  int32_t pages_images() const { return pages_images_ + shares_.pages(); }
  const StepStats& stats() const { return stats_; }  // of the last Plan and Commit; no step_us

 private:
  enum class RowUse : uint8_t {
    kNone,
    kSample,
    kPromptLogprob,  // of the token after it
    kEmbed,          // its hidden state is pooled
  };
  struct Sequence;
  struct Group;  // of one adapter, while it has requests or an image

  // Whose images have a bound.
  struct Tenant {
    int64_t slots = 0;  // of its images, there or on their way, and once of what they have in common
    int64_t looked_at = 0;           // in PrefixCache::now(), whether any of its groups in line needs an image
    const Group* no_room = nullptr;  // its first in line whose image must wait for another's to go
    bool passed = false;             // that one, while the line is gone through
  };

  // Unwanted images before those that requests wait for, of either the one used longest ago first. What others
  // have in common is wanted and used when they are, and comes behind them.
  struct ColderFirst {
    bool operator()(const Group* a, const Group* b) const;
  };

  // What a step's results mean.
  struct Step {
    struct Logits {
      Sequence* sequence;
      RowUse use;
    };
    bool planned = false;
    std::vector<Sequence*> sequences;  // [S] in the batch's order
    std::vector<Logits> logits;        // [logit rows]
  };

  bool ReserveOrPreempt(Sequence* sequence);
  void PreemptYoungest();
  bool PlanDecodes();
  void PlanPrefill(Sequence* sequence);
  bool Admit(int64_t now_us);
  int64_t RunningBlocks() const;
  bool TakePages(Sequence* sequence);
  int64_t Available(bool wanted) const;
  template <typename Fn>
  void Change(Group* group, const Fn& change);
  void NoteIdle(Group* group, bool idle);
  void Keep(Group* group, int32_t by);
  void NoteUse(Group* shared, int32_t busy, int64_t last_use);
  Group* Coldest(bool wanted) const;
  bool MakeRoom(int64_t count, bool wanted);
  bool MakeTenantRoom(const Group& group, bool wanted);
  bool MustWaitForTenant(Group* group);
  void CountTenant(Group* group, int sign);
  void FreeImage(Group* group);
  void DropImage(Group* group);
  void DropUnloaded();
  void StartLoads();
  void StartLoad(Group* group, AdapterLease adapter);
  void AdoptPrefix(Sequence* sequence);
  void ShareBlocks(Sequence* sequence, int32_t tokens, bool replace);
  void Open(Group* group);   // one request more
  void Close(Group* group);  // one less
  void EnterRunning(Sequence* sequence);
  void LeaveRunning(Sequence* sequence);
  Sequence* NextWaiting();
  void PopWaiting(Sequence* sequence);

  void BuildBatch(Batch* batch);
  void FindForbidden(Sequence* sequence) const;
  void AppendPages(const Sequence& sequence, int32_t tokens, Batch* batch) const;
  void AppendRows(Sequence* sequence, Batch* batch);
  void CountStep(const Batch& batch);

  void AcceptToken(Sequence* sequence, SampledToken sampled, int64_t now_us, RequestEvents* events);
  const std::vector<int32_t>& EosOf(const Request& request) const {
    return request.eos_ids ? *request.eos_ids : options_.eos_ids;
  }
  FinishReason ReasonToFinish(const Sequence& sequence, int32_t token) const;
  static TokenEvent EventOf(const Sequence& sequence, TokenEvent::Kind kind, int64_t now_us);
  void Finish(Sequence* sequence, FinishReason reason, absl::Status status, int64_t now_us,
              RequestEvents* events);
  void Remove(Sequence* sequence);
  Group* GroupOf(const AdapterLease& lease, ImageSize size);
  void ForgetIdle(Group* group);

  const SchedulerOptions options_;
  const int32_t context_tokens_;
  const int32_t max_running_;
  PagePool pool_;
  PageShares shares_;  // what small images leave over
  PrefixCache cache_;

  std::unordered_map<RequestId, std::unique_ptr<Sequence>> sequences_;
  std::unordered_map<uint64_t, std::unique_ptr<Group>> groups_;  // by serial; 0: the base's
  std::deque<Group*> turns_;         // groups with waiting requests; the front's turn is next
  std::deque<Sequence*> preempted_;  // oldest first
  std::vector<Sequence*> running_;   // oldest first
  int32_t waiting_ = 0;              // in the groups' queues
  int64_t next_group_order_ = 1;     // 0 is the base's
  int64_t next_admission_ = 0;
  int64_t earliest_deadline_us_;  // no deadline is earlier

  AdapterMoves moves_;
  int32_t loading_ = 0;       // images on their way
  int32_t pages_images_ = 0;  // of images, there or on their way; those of their own
  std::set<Group*, ColderFirst> idle_;
  int64_t idle_pages_[2] = {};  // of their own, of images that no request waits for, and of others
  const Group* no_room_ = nullptr;  // whose image finds none now
  std::unordered_map<std::string, Tenant> tenants_;  // by name
  std::vector<Tenant*> full_;  // of them, with `no_room`

  int32_t budget_ = 0;  // rows left while planning
  Step step_;
  StepStats stats_;
};

}  // namespace lorikeet
