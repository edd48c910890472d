#include "engine/scheduler/scheduler.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/scheduler/sequence.h"

namespace lorikeet {
namespace {

// Empty strings are the base model's and of no tenant or salt. Their lengths keep them apart.
KvIdentity IdentityOf(const Request& request) {
  const Adapter* adapter = request.adapter.get();
  if (request.skip_prefix_cache || (adapter != nullptr && !adapter->cacheable)) return nullptr;
  return std::make_shared<const std::string>(absl::StrCat(
      request.tenant.size(), ":", request.tenant, request.cache_salt.size(), ":",
      request.cache_salt, adapter ? adapter->version : ""));
}

}  // namespace

int32_t ContextTokens(const SchedulerOptions& options, int32_t image_pages, int32_t kv_sets) {
  const int32_t pages = std::max(0, options.pages - image_pages);
  const int64_t blocks = pages / (options.kv.pages_per_block * kv_sets);
  const int64_t pool_tokens = blocks * KvLayout::kPageTokens;
  return static_cast<int32_t>(std::min<int64_t>(options.limits.max_context_tokens, pool_tokens));
}

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options),
      context_tokens_(ContextTokens(options)),
      // A row for each running sequence must fit in a step.
      max_running_(std::min(options.limits.max_running_requests, options.limits.max_batch_tokens)),
      pool_(options.pages),
      shares_(&pool_),
      cache_(&pool_),
      earliest_deadline_us_(std::numeric_limits<int64_t>::max()) {
  LK_CHECK(context_tokens_ >= 2);
  LK_CHECK(max_running_ >= 1);
  running_.reserve(max_running_);
  step_.sequences.reserve(max_running_);
}

Scheduler::~Scheduler() = default;

// Activated adapters begin at the last of their invocations in the prompt; without one, never.
int32_t Scheduler::Sequence::AdapterFrom(const Request& request) {
  const Adapter* adapter = request.adapter.get();
  if (adapter == nullptr || adapter->invocation_tokens.empty()) return 0;
  const auto at = std::find_end(request.prompt.begin(), request.prompt.end(),
                                adapter->invocation_tokens.begin(),
                                adapter->invocation_tokens.end());
  if (at == request.prompt.end()) return std::numeric_limits<int32_t>::max();
  return VirtualTokensOf(request) + static_cast<int32_t>(at - request.prompt.begin());
}

std::vector<int32_t> Scheduler::Sequence::TokensOf(std::vector<int32_t> prompt,
                                                   int32_t virtual_tokens) {
  if (virtual_tokens == 0) return prompt;
  std::vector<int32_t> tokens;
  for (int32_t k = 0; k < virtual_tokens; ++k) tokens.push_back(-1 - k);
  tokens.insert(tokens.end(), prompt.begin(), prompt.end());
  return tokens;
}

void Scheduler::Enqueue(RequestId id, Request request, ImageSize image, ImageSize shared) {
  LK_CHECK(!step_.planned);
  const int32_t prompt =
      static_cast<int32_t>(request.prompt.size()) + Sequence::VirtualTokensOf(request);
  LK_CHECK(prompt >= 1 && prompt < context_tokens_ && request.max_new_tokens >= 1);
  Group* group = GroupOf(request.adapter, image);
  if (!shared.empty()) group->shared = GroupOf(AdapterLease(request.adapter.get()->shared), shared);
  earliest_deadline_us_ = std::min(earliest_deadline_us_, request.deadline_us);
  auto [slot, inserted] = sequences_.emplace(
      id, std::make_unique<Sequence>(id, std::move(request), group, &cache_, &options_.kv));
  LK_CHECK_MSG(inserted, "request id used twice");
  Sequence* sequence = slot->second.get();
  sequence->image_was_there = group->there();
  if (options_.prefix_cache) sequence->kv_identity = IdentityOf(sequence->request);
  Open(group);
  ++waiting_;
  if (group->waiting.empty()) turns_.push_back(group);
  group->waiting.push_back(sequence);
}

Scheduler::Group* Scheduler::GroupOf(const AdapterLease& lease, ImageSize size) {
  const Adapter* adapter = lease.get();
  const uint64_t serial = adapter ? adapter->serial : 0;
  std::unique_ptr<Group>& group = groups_[serial];
  if (!group) {
    group = std::make_unique<Group>();
    group->serial = serial;
    group->order = adapter ? next_group_order_++ : 0;
    group->adapter = adapter;
    group->home = lease.home();
    group->size = size;
    if (!size.empty()) group->image = ImageState::kAbsent;
    if (!size.empty() && !lease.tenant().empty()) group->tenant = &tenants_[lease.tenant()];
  }
  return group.get();
}

void Scheduler::Cancel(RequestId id, int64_t now_us, RequestEvents* events) {
  LK_CHECK(!step_.planned);
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  Sequence* sequence = found->second.get();
  Finish(sequence, FinishReason::kCanceled, absl::OkStatus(), now_us, events);
  Remove(sequence);
}

void Scheduler::Expire(int64_t now_us, RequestEvents* events) {
  LK_CHECK(!step_.planned);
  if (now_us < earliest_deadline_us_) return;
  earliest_deadline_us_ = std::numeric_limits<int64_t>::max();
  std::vector<Sequence*> expired;
  for (const auto& [id, sequence] : sequences_) {
    if (sequence->request.deadline_us <= now_us) {
      expired.push_back(sequence.get());
    } else {
      earliest_deadline_us_ = std::min(earliest_deadline_us_, sequence->request.deadline_us);
    }
  }
  for (Sequence* sequence : expired) {
    Finish(sequence, FinishReason::kError,
           absl::DeadlineExceededError(absl::StrCat("the deadline passed after ",
                                                    sequence->generated(), " of at most ",
                                                    sequence->request.max_new_tokens, " tokens")),
           now_us, events);
    Remove(sequence);
  }
}

void Scheduler::FailAll(const absl::Status& status, int64_t now_us, RequestEvents* events) {
  step_.planned = false;
  while (!sequences_.empty()) {
    Sequence* sequence = sequences_.begin()->second.get();
    Finish(sequence, FinishReason::kError, status, now_us, events);
    Remove(sequence);
  }
  cache_.Clear();  // the planned step's blocks may never have been computed
  earliest_deadline_us_ = std::numeric_limits<int64_t>::max();
}

void Scheduler::Commit(StepResult result, int64_t now_us, RequestEvents* events) {
  LK_CHECK(step_.planned);
  LK_CHECK(result.sampled.size() == step_.logits.size());
  step_.planned = false;
  for (Sequence* sequence : step_.sequences) {
    sequence->computed += sequence->planned;
    sequence->planned = 0;
    ShareBlocks(sequence, sequence->computed, /*replace=*/true);
  }
  stats_.tokens_sampled = 0;
  for (size_t i = 0; i < step_.logits.size(); ++i) {
    const auto [sequence, use] = step_.logits[i];
    if (sequence->state == SequenceState::kFinished) continue;  // with an earlier row
    SampledToken& sampled = result.sampled[i];
    if (sampled.token == SampledToken::kNoToken) {
      Finish(sequence, FinishReason::kError,
             absl::InternalError(absl::StrCat(
                 "no token can come next: the logits are no distribution (NaN or infinite), or "
                 "everything is excluded, after ",
                 sequence->generated(), " tokens, adapter '", sequence->request.adapter_name, "'")),
             now_us, events);
    } else if (use == RowUse::kPromptLogprob) {
      sequence->prompt_logprobs.push_back(std::move(sampled.logprobs));
      ++sequence->prompt_rows_done;
    } else if (use == RowUse::kEmbed) {
      ++sequence->prompt_rows_done;
      if (sequence->uncomputed() == 0) {
        Finish(sequence, FinishReason::kEmbedded, absl::OkStatus(), now_us, events);
      }
    } else {
      AcceptToken(sequence, std::move(sampled), now_us, events);
    }
  }
  for (Sequence* sequence : step_.sequences) {
    if (sequence->state == SequenceState::kFinished) Remove(sequence);
  }
  stats_.pages_used = pages_used();
  stats_.pages_cached = cache_.cold_pages();
  stats_.running = running();
  stats_.waiting = waiting();
}

void Scheduler::AcceptToken(Sequence* sequence, SampledToken sampled, int64_t now_us,
                            RequestEvents* events) {
  if (sequence->request.sampling.prompt_logprobs && sequence->generated() == 0) {
    TokenEvent event = EventOf(*sequence, TokenEvent::Kind::kPromptLogprobs, now_us);
    event.prompt_logprobs = std::move(sequence->prompt_logprobs);
    events->push_back({sequence->id, std::move(event)});
  }
  sequence->tokens.push_back(sampled.token);
  ++stats_.tokens_sampled;
  TokenEvent event = EventOf(*sequence, TokenEvent::Kind::kToken, now_us);
  event.token = sampled.token;
  event.logprobs = std::move(sampled.logprobs);
  events->push_back({sequence->id, std::move(event)});
  FinishReason reason = ReasonToFinish(*sequence, sampled.token);
  TokenConstraint* constraint = sequence->request.constraint.get();
  if (constraint != nullptr && reason == FinishReason::kNone) {
    const absl::Status status = constraint->Accept(sampled.token);
    if (!status.ok()) return Finish(sequence, FinishReason::kError, status, now_us, events);
    if (constraint->finished()) reason = FinishReason::kFormed;
  }
  if (reason != FinishReason::kNone) {
    Finish(sequence, reason, absl::OkStatus(), now_us, events);
  }
}

FinishReason Scheduler::ReasonToFinish(const Sequence& sequence, int32_t token) const {
  const auto has = [token](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  if (!sequence.request.ignore_eos && has(EosOf(sequence.request))) return FinishReason::kEos;
  if (has(sequence.request.stop_token_ids)) return FinishReason::kStop;
  if (sequence.generated() >= sequence.request.max_new_tokens ||
      sequence.length() >= ContextTokens(options_, sequence.group->all_pages(), sequence.pages.sets())) {
    return FinishReason::kLength;
  }
  return FinishReason::kNone;
}

TokenEvent Scheduler::EventOf(const Sequence& sequence, TokenEvent::Kind kind, int64_t now_us) {
  TokenEvent event;
  event.kind = kind;
  event.cached_tokens = sequence.cached_tokens;
  event.time_us = now_us;
  event.admitted_us = sequence.admitted_us;
  return event;
}

void Scheduler::Finish(Sequence* sequence, FinishReason reason, absl::Status status, int64_t now_us,
                       RequestEvents* events) {
  TokenEvent event = EventOf(*sequence, TokenEvent::Kind::kFinished, now_us);
  event.finish = reason;
  event.status = std::move(status);
  events->push_back({sequence->id, std::move(event)});

  switch (sequence->state) {
    case SequenceState::kWaiting: {
      Group* group = sequence->group;
      std::erase(group->waiting, sequence);
      if (group->waiting.empty()) std::erase(turns_, group);
      --waiting_;
      break;
    }
    case SequenceState::kPreempted:
      std::erase(preempted_, sequence);
      break;
    case SequenceState::kRunning:
      LeaveRunning(sequence);
      break;
    case SequenceState::kFinished:
      LK_CHECK_MSG(false, "a request finished twice");
  }
  sequence->state = SequenceState::kFinished;
}

void Scheduler::Remove(Sequence* sequence) {
  Group* group = sequence->group;
  sequences_.erase(sequence->id);
  Close(group);
}

}  // namespace lorikeet
