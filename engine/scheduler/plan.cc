// Scheduler::Plan: who gets rows in the next step, and the step as arrays.
#include <algorithm>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "engine/base/check.h"
#include "engine/scheduler/scheduler.h"
#include "engine/scheduler/sequence.h"

namespace lorikeet {

bool Scheduler::Plan(int64_t now_us, Batch* batch) {
  LK_CHECK(!step_.planned);
  if (stats_.rows > 0) stats_ = StepStats();  // a plan without a step counts towards the next
  DropUnloaded();
  if (empty()) return false;
  budget_ = options_.limits.max_batch_tokens;
  cache_.Tick();
  if (PlanDecodes()) {
    for (Sequence* sequence : running_) {
      if (sequence->planned == 0) PlanPrefill(sequence);
    }
    StartLoads();
    while (budget_ > 0 && Admit(now_us)) PlanPrefill(running_.back());
  }
  stats_.images_loading = loading_;
  BuildBatch(batch);
  LK_CHECK_MSG(batch->rows() > 0 || loading_ > 0, "requests are open but none can run");
  if (batch->rows() == 0) return false;
  CountStep(*batch);
  step_.planned = true;
  return true;
}

// False: the only request running waits for pages that images on their way hold.
bool Scheduler::PlanDecodes() {
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* sequence = running_[i];
    if (!sequence->decoding()) continue;
    if (!ReserveOrPreempt(sequence)) return sequence->state != SequenceState::kRunning;
    sequence->planned = 1;
    --budget_;
  }
  return true;
}

// Pages for all of the sequence's tokens, taken from images, prefixes and younger sequences if need
// be. False if it was preempted itself, or is alone and must wait.
bool Scheduler::ReserveOrPreempt(Sequence* sequence) {
  const int64_t missing = sequence->pages.PagesFor(sequence->length()) - sequence->pages.count();
  while (!MakeRoom(missing, true)) {
    if (running_.size() == 1 && loading_ > 0) return false;
    PreemptYoungest();
    if (sequence->state != SequenceState::kRunning) return false;
  }
  LK_CHECK(sequence->pages.Reserve(sequence->length()));
  return true;
}

void Scheduler::PreemptYoungest() {
  Sequence* victim = running_.back();
  LK_CHECK_MSG(running_.size() > 1, "the pool cannot hold one whole context");
  LK_CHECK(victim->planned == 0);
  LeaveRunning(victim);
  victim->pages.Release();
  victim->computed = 0;
  victim->state = SequenceState::kPreempted;
  preempted_.push_front(victim);
  ++stats_.preempted;
}

// Pages for the whole prompt were taken at admission.
void Scheduler::PlanPrefill(Sequence* sequence) {
  sequence->planned = std::min(sequence->uncomputed(), budget_);
  budget_ -= sequence->planned;
  ShareBlocks(sequence, sequence->computed + sequence->planned, /*replace=*/false);
}

void Scheduler::ShareBlocks(Sequence* sequence, int32_t tokens, bool replace) {
  if (sequence->kv_identity == nullptr) return;
  sequence->pages.Share(std::span(sequence->tokens).first(tokens), sequence->kv_identity, replace);
}

// Starts the next preempted or waiting sequence. False if there is none or it must wait.
bool Scheduler::Admit(int64_t now_us) {
  if (running() >= max_running_) return false;
  Sequence* sequence = NextWaiting();
  if (sequence == nullptr || !TakePages(sequence)) return false;
  PopWaiting(sequence);
  if (sequence->admission < 0) {
    sequence->admission = next_admission_++;
    sequence->admitted_us = now_us;
    sequence->cached_tokens = sequence->computed;
    if (!sequence->group->size.empty()) {
      ++(sequence->image_was_there ? stats_.image_hits : stats_.image_misses);
    }
    stats_.cached_tokens += sequence->computed;
    stats_.admitted_tokens += sequence->prompt_tokens;
    sequence->tokens.reserve(std::min<int64_t>(
        context_tokens_, int64_t{sequence->prompt_tokens} + sequence->request.max_new_tokens));
    if (sequence->request.sampling.prompt_logprobs) {
      sequence->prompt_logprobs.reserve(sequence->prompt_tokens - 1);
    }
  }
  sequence->state = SequenceState::kRunning;
  LK_CHECK(running_.empty() || running_.back()->admission < sequence->admission);
  EnterRunning(sequence);
  return true;
}

// Pages of one block for everybody who runs.
int64_t Scheduler::RunningBlocks() const {
  int64_t pages = 0;
  for (const Sequence* sequence : running_) pages += sequence->pages.PagesFor(1);
  return pages;
}

// Pages for all its tokens, if there is also one block more for it and for everybody who runs
// already. Nothing is held if not.
bool Scheduler::TakePages(Sequence* sequence) {
  const int64_t block = sequence->pages.PagesFor(1);
  const int64_t headroom = running_.empty() ? 0 : RunningBlocks() + block;
  Keep(sequence->group, 1);
  const absl::Cleanup unkeep = [&] { Keep(sequence->group, -1); };
  if (headroom + block > Available(true)) return false;  // one block at least is its own
  AdoptPrefix(sequence);
  const int64_t missing = sequence->pages.PagesFor(sequence->length()) - sequence->pages.count();
  if (missing + headroom <= Available(true)) {
    LK_CHECK(MakeRoom(missing, true));
    LK_CHECK(sequence->pages.Reserve(sequence->length()));
    return true;
  }
  sequence->pages.Release();
  sequence->computed = 0;
  return false;
}

// The last token's row is always computed, and so are rows whose results are still due.
void Scheduler::AdoptPrefix(Sequence* sequence) {
  if (sequence->kv_identity == nullptr) return;
  int32_t most = sequence->length() - 1;
  if (sequence->wants_prompt_rows() &&
      sequence->prompt_rows_done < sequence->prompt_tokens - 1) {
    most = std::min(most, sequence->prompt_rows_done);
  }
  sequence->computed =
      sequence->pages.Adopt(std::span(sequence->tokens).first(most), sequence->kv_identity);
}

// The first in line whose image is there. Who stands behind one that found no room must not take
// what becomes free; behind one that its tenant's bound holds up, who is of that tenant.
Scheduler::Sequence* Scheduler::NextWaiting() {
  if (!preempted_.empty()) {
    Sequence* first = preempted_.front();
    return first->group->there() ? first : nullptr;
  }
  for (Tenant* tenant : full_) tenant->passed = false;
  for (Group* group : turns_) {
    Tenant* tenant = group->tenant;
    if (tenant != nullptr && tenant->no_room != nullptr) {
      tenant->passed = tenant->passed || tenant->no_room == group;
      if (tenant->passed) continue;
    }
    if (group->there()) return group->waiting.front();
    if (group == no_room_) return nullptr;
  }
  return nullptr;
}

void Scheduler::PopWaiting(Sequence* sequence) {
  if (sequence->state == SequenceState::kPreempted) {
    preempted_.pop_front();
    return;
  }
  Group* group = sequence->group;
  std::erase(turns_, group);
  group->waiting.pop_front();
  --waiting_;
  if (!group->waiting.empty()) turns_.push_back(group);
}

void Scheduler::BuildBatch(Batch* batch) {
  step_.sequences.clear();
  step_.logits.clear();
  for (Sequence* sequence : running_) {
    if (sequence->planned > 0) step_.sequences.push_back(sequence);
  }
  std::sort(step_.sequences.begin(), step_.sequences.end(),
            [](const Sequence* a, const Sequence* b) {
              if (a->group != b->group) return a->group->order < b->group->order;
              return a->admission < b->admission;
            });
  batch->requests.clear();
  batch->tokens.clear();
  batch->positions.clear();
  batch->sequence_begin.assign(1, 0);
  batch->page_begin.assign(1, 0);
  batch->pages.clear();
  batch->base_page_begin.assign(1, 0);
  batch->base_pages.clear();
  batch->segments.clear();
  batch->logit_rows.clear();
  for (Sequence* sequence : step_.sequences) AppendRows(sequence, batch);
}

// What ends the answer, while it is too short, and what would complete a bad word.
void Scheduler::FindForbidden(Sequence* sequence) const {
  const Request& request = sequence->request;
  std::vector<int32_t>& forbidden = sequence->forbidden;
  forbidden.clear();
  if (sequence->generated() < request.sampling.min_tokens) {
    if (!request.ignore_eos) forbidden = EosOf(request);
    forbidden.insert(forbidden.end(), request.stop_token_ids.begin(),
                     request.stop_token_ids.end());
  }
  const auto answer = std::span(sequence->tokens).subspan(sequence->prompt_tokens);
  for (const std::vector<int32_t>& word : request.sampling.bad_words) {
    const size_t before = word.size() - 1;
    if (answer.size() >= before &&
        std::equal(word.begin(), word.end() - 1, answer.end() - before)) {
      forbidden.push_back(word.back());
    }
  }
}

Scheduler::RowUse Scheduler::Sequence::UseOf(int32_t position) const {
  const bool last = position + 1 == length();
  const bool due = wants_prompt_rows() && position >= virtual_tokens + prompt_rows_done &&
                   position + 1 < prompt_tokens;
  if (!last && !due) return RowUse::kNone;
  if (request.embedding) return RowUse::kEmbed;
  return last ? RowUse::kSample : RowUse::kPromptLogprob;
}

// Blocks are the adapter's and the base's in turn where there are both.
void Scheduler::AppendPages(const Sequence& sequence, int32_t tokens, Batch* batch) const {
  const size_t block = options_.kv.pages_per_block;
  const size_t sets = sequence.pages.sets();
  const auto pages = sequence.pages.First(tokens);
  for (size_t first = 0; first < pages.size(); first += sets * block) {
    const auto own = pages.subspan(first, block);
    const auto of_base = pages.subspan(first + block, (sets - 1) * block);
    batch->pages.insert(batch->pages.end(), own.begin(), own.end());
    batch->base_pages.insert(batch->base_pages.end(), of_base.begin(), of_base.end());
  }
  batch->page_begin.push_back(static_cast<int32_t>(batch->pages.size()));
  batch->base_page_begin.push_back(static_cast<int32_t>(batch->base_pages.size()));
}

void Scheduler::AppendRows(Sequence* sequence, Batch* batch) {
  const int32_t first_row = batch->rows();
  const int32_t index = batch->sequences();
  const int32_t end = sequence->computed + sequence->planned;
  const int32_t virtual_tokens = sequence->virtual_tokens;
  batch->requests.push_back(sequence->id);
  for (int32_t position = sequence->computed; position < end; ++position) {
    batch->tokens.push_back(sequence->tokens[position]);
    batch->positions.push_back(position);
    const RowUse use = sequence->UseOf(position);
    if (use == RowUse::kNone) continue;
    LogitRow row;
    row.row = first_row + position - sequence->computed;
    row.sequence = index;
    if (use == RowUse::kPromptLogprob) row.target = sequence->tokens[position + 1];
    if (use == RowUse::kEmbed) row.embedding = sequence->request.embedding.get();
    const Adapter* adapter = sequence->request.adapter.get();
    row.vocab = adapter != nullptr ? adapter->vocab : 0;
    row.sampling = &sequence->request.sampling;
    row.history =
        std::span(sequence->tokens).subspan(virtual_tokens, position + 1 - virtual_tokens);
    row.prompt_tokens = sequence->prompt_tokens - virtual_tokens;
    if (use == RowUse::kSample) {
      FindForbidden(sequence);
      row.forbidden = sequence->forbidden;
      row.constraint = sequence->request.constraint.get();
    }
    batch->logit_rows.push_back(row);
    step_.logits.push_back({sequence, use});
  }
  AppendPages(*sequence, end, batch);
  batch->sequence_begin.push_back(batch->rows());

  const Adapter* adapter = sequence->group->adapter;
  if (adapter == nullptr || sequence->adapter_from >= end) return;
  const int32_t begin = first_row + std::max(0, sequence->adapter_from - sequence->computed);
  if (batch->segments.empty() || batch->segments.back().adapter != adapter ||
      batch->segments.back().row_end != begin) {
    batch->segments.push_back({begin, begin, adapter});
  }
  batch->segments.back().row_end = batch->rows();
}

void Scheduler::CountStep(const Batch& batch) {
  stats_.rows = batch.rows();
  stats_.base_rows = batch.rows();
  int32_t slots = 0;
  const auto count = [&](const Group& group) {
    stats_.pages_images_used += group.size.pages;
    slots += group.size.slots;
    stats_.context_bytes += group.size.empty() ? group.adapter->bytes : group.size.bytes(options_.kv.page_bytes());
  };
  const Adapter* last = nullptr;
  for (const AdapterSegment& segment : batch.segments) {
    stats_.base_rows -= segment.row_end - segment.row_begin;
    if (segment.adapter == last) continue;
    last = segment.adapter;
    ++stats_.distinct_adapters;
    const Group& group = *groups_.at(last->serial);
    count(group);
    if (group.shared != nullptr && !std::exchange(group.shared->counted, true)) count(*group.shared);
  }
  stats_.pages_images_used += (slots + ImageSize::kSlots - 1) / ImageSize::kSlots;
  for (const AdapterSegment& segment : batch.segments) {
    Group* shared = groups_.at(segment.adapter->serial)->shared;
    if (shared != nullptr) shared->counted = false;
  }
  for (const Sequence* sequence : step_.sequences) {
    const bool decode = sequence->decoding() && sequence->generated() > 0;
    if (!decode) stats_.prefill_rows += sequence->planned;
    stats_.context_bytes += sequence->pages.PagesFor(sequence->computed + sequence->planned) *
                            options_.kv.page_bytes();
  }
  stats_.sequences = batch.sequences();
  stats_.waiting = waiting();
  stats_.running = running();
  stats_.pages_used = pages_used();
  stats_.pages_cached = cache_.cold_pages();
  stats_.pages_images = pages_images();
  stats_.pages_total = pool_.total();
}

}  // namespace lorikeet
