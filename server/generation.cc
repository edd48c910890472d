#include "server/generation.h"

#include <algorithm>
#include <mutex>
#include <thread>
#include <numeric>
#include <utility>

#include "engine/base/status_macros.h"
#include "server/adapter_texts.h"
#include "server/choice.h"
#include "server/generation_request.h"

namespace lorikeet {
namespace {

template <typename T>
void MoveAppend(std::vector<T>&& from, std::vector<T>* to) {
  to->insert(to->end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

double TotalLogprob(const GenerationDelta& whole) {
  return std::accumulate(whole.logprobs.begin(), whole.logprobs.end(), 0.0,
                         [](double sum, const TokenLogprobs& one) { return sum + one.logprob; });
}

}  // namespace

void GenerationDelta::Append(GenerationDelta next) {
  tokenizer = next.tokenizer;
  if (next.prompt) prompt = std::move(next.prompt);
  MoveAppend(std::move(next.tokens), &tokens);
  text += next.text;
  MoveAppend(std::move(next.logprobs), &logprobs);
  if (next.end) end = std::move(next.end);
  last = next.last;
}

struct GenerationCall::Prepared {
  struct Lease {
    std::mutex mutex;
    std::optional<absl::StatusOr<AdapterLease>> lease;
    bool awaited = false;  // it was not there when it was first looked for
    int64_t read_us = 0;   // it was brought by another thread, after so long
  };

  GenerationInput input;
  Request request;  // of `input`, once the adapter is there whose text it is in
  ResolvedModel model;
  ChoiceOptions options;
  int32_t count = 1;  // choices to start
  std::function<void()> wake;
  std::shared_ptr<Lease> lease;  // nullptr: base model
  bool canceled = false;
};

GenerationCall::GenerationCall(const ServingContext& context) : context_(context) {
  record_.arrival_us = context.clock->NowMicros();
}

absl::StatusOr<std::unique_ptr<GenerationCall>> GenerationCall::Start(const ServingContext& context,
                                                                      const Identity& caller,
                                                                      GenerationInput input,
                                                                      std::function<void()> wake) {
  std::unique_ptr<GenerationCall> call(new GenerationCall(context));
  absl::Status status = call->Prepare(caller, std::move(input), std::move(wake));
  if (status.ok()) status = call->SubmitIfReady();
  if (status.ok()) return call;
  call->Done(status);
  return status;
}

absl::Status GenerationCall::Prepare(const Identity& caller, GenerationInput input,
                                     std::function<void()> wake) {
  prepared_ = std::make_unique<Prepared>();
  prepared_->wake = std::move(wake);
  ChoiceOptions& options = prepared_->options;
  options.record = &record_;
  record_.tenant = caller.tenant;
  context_.request_log->Begin(input.origin, &record_);
  options.chat = std::holds_alternative<ChatRequest>(input.prompt);
  LK_ASSIGN_OR_RETURN(prepared_->model, Resolve(context_, caller, input));
  LK_RETURN_IF_ERROR(ValidateInput(input));
  wanted_ = input.choices;
  best_ = input.best_of > input.choices;
  logprobs_wanted_ = input.sampling.top_logprobs >= 0;
  options.top_logprobs = best_ ? std::max(input.sampling.top_logprobs, 0)
                               : input.sampling.top_logprobs;
  options.prompt_logprobs = input.prompt_logprobs;
  options.stop_strings = std::move(input.stop_strings);
  options.include_stop_string = input.include_stop_string;
  prepared_->count = std::max(input.choices, input.best_of);
  record_.adapter = prepared_->model.name;
  record_.sum = prepared_->model.terms.size() > 1;
  context_.metrics->OnRequestStart(record_);
  prepared_->input = std::move(input);
  if (!prepared_->model.terms.empty()) AskForAdapter();
  return absl::OkStatus();
}

// In the words of the adapter, whose lease the request has.
absl::Status GenerationCall::BuildRequest() {
  Prepared& prepared = *prepared_;
  ChoiceOptions& options = prepared.options;
  options.text = TextOf(context_.text, prepared.request.adapter.get());
  AdapterLease lease = std::move(prepared.request.adapter);
  LK_ASSIGN_OR_RETURN(prepared.request,
                      lorikeet::BuildRequest(context_, options.text, prepared.input));
  prepared.request.adapter = std::move(lease);
  prepared.request.adapter_name = prepared.model.name;
  prepared.request.tenant = record_.tenant;
  record_.prompt_tokens = static_cast<int32_t>(prepared.request.prompt.size());
  if (!prepared.input.echo && !prepared.input.prompt_logprobs) return absl::OkStatus();
  options.echo.emplace().tokens = prepared.request.prompt;
  LK_ASSIGN_OR_RETURN(options.echo->text, options.text.tokenizer->Decode(options.echo->tokens,
                                                                         /*skip_special=*/true));
  return absl::OkStatus();
}

void GenerationCall::AskForAdapter() {
  prepared_->lease = std::make_shared<Prepared::Lease>();
  context_.mixer->AcquireAsync(
      prepared_->model.terms,
      [slot = prepared_->lease, wake = prepared_->wake, clock = context_.clock,
       asked_us = context_.clock->NowMicros(),
       asker = std::this_thread::get_id()](absl::StatusOr<AdapterLease> lease) {
        bool awaited = false;
        {
          std::lock_guard lock(slot->mutex);
          slot->lease = std::move(lease);
          if (std::this_thread::get_id() != asker) {
            slot->read_us = std::max<int64_t>(clock->NowMicros() - asked_us, 1);
          }
          awaited = slot->awaited;
        }
        if (awaited) wake();
      });
}

// Leaves `prepared_` where it is while its adapter is being read.
absl::Status GenerationCall::SubmitIfReady() {
  Prepared& prepared = *prepared_;
  if (prepared.lease != nullptr) {
    std::lock_guard lock(prepared.lease->mutex);
    if (!prepared.lease->lease) {
      prepared.lease->awaited = true;
      return absl::OkStatus();
    }
    LK_ASSIGN_OR_RETURN(prepared.request.adapter, *std::move(prepared.lease->lease));
    LK_RETURN_IF_ERROR(CheckVersion(prepared.model, prepared.request.adapter.version()));
    record_.adapter_read_us = prepared.lease->read_us;
    record_.adapter_version = prepared.request.adapter.version();
  }
  LK_RETURN_IF_ERROR(BuildRequest());
  const Request& request = prepared.request;
  record_.submitted_us = context_.clock->NowMicros();
  // The first choice takes the constraint itself; the engine may have begun on it by then.
  const std::unique_ptr<TokenConstraint> fresh =
      request.constraint && prepared.count > 1 ? request.constraint->Clone() : nullptr;
  for (int32_t i = 0; i < prepared.count; ++i) {
    Request one = request;
    one.sampling.seed += i;
    if (i > 0 && fresh != nullptr) one.constraint = fresh->Clone();
    LK_ASSIGN_OR_RETURN(
        std::unique_ptr<Choice> choice,
        Choice::Start(context_, prepared.options, std::move(one), prepared.wake));
    choices_.push_back(std::move(choice));
  }
  open_ = choices_.size();
  if (best_) whole_.resize(prepared.count);
  context_.metrics->OnPrompt(record_);
  prepared_.reset();
  return absl::OkStatus();
}

GenerationDelta GenerationCall::Fail(const absl::Status& status) {
  GenerationDelta delta;
  delta.end.emplace().status = status;
  delta.last = true;
  Done(status);
  return delta;
}

void GenerationCall::Done(const absl::Status& status) {
  done_ = true;
  record_.status = status;
  record_.end_us = context_.clock->NowMicros();
  context_.metrics->OnRequestDone(record_);
  context_.request_log->End(record_);
}

GenerationCall::~GenerationCall() {
  if (done_) return;
  Cancel();  // before anybody is told that it ended
  Done(absl::CancelledError("the call was dropped"));
}

void GenerationCall::Cancel() {
  if (prepared_ && !done_) {
    prepared_->canceled = true;
    prepared_->wake();
  }
  for (const auto& choice : choices_) choice->Cancel();
}

GenerationDelta GenerationCall::Poll() {
  if (done_) return {};
  if (prepared_) {
    if (prepared_->canceled) return Fail(absl::CancelledError("the request was cancelled"));
    const absl::Status status = SubmitIfReady();
    if (!status.ok()) return Fail(status);
    if (prepared_) return {};
  }
  GenerationDelta delta = best_ ? PollBest() : PollStreaming();
  if (delta.end && !delta.end->status.ok()) delta.last = true;
  if (delta.last) Done(delta.end->status);
  return delta;
}

GenerationDelta GenerationCall::PollStreaming() {
  for (size_t i = 0; i < choices_.size(); ++i) {
    const size_t index = std::exchange(next_, (next_ + 1) % choices_.size());
    GenerationDelta delta = choices_[index]->Poll();
    if (delta.empty()) continue;
    delta.choice = static_cast<int32_t>(index);
    if (delta.end) delta.last = --open_ == 0;
    return delta;
  }
  return {};
}

GenerationDelta GenerationCall::PollBest() {
  while (open_ > 0) {
    GenerationDelta delta = PollStreaming();
    if (delta.empty() || (delta.end && !delta.end->status.ok())) return delta;
    whole_[delta.choice].Append(std::move(delta));
    if (open_ == 0) RankBest();
  }
  GenerationDelta delta = std::move(whole_[next_]);
  delta.choice = static_cast<int32_t>(next_++);
  delta.last = next_ == whole_.size();
  return delta;
}

// Leaves the likeliest, best first.
void GenerationCall::RankBest() {
  std::stable_sort(whole_.begin(), whole_.end(),
                   [](const GenerationDelta& a, const GenerationDelta& b) {
                     return TotalLogprob(a) > TotalLogprob(b);
                   });
  int32_t all_tokens = 0;
  for (const GenerationDelta& whole : whole_) all_tokens += whole.end->completion_tokens;
  whole_.resize(wanted_);
  // Every candidate was computed: their tokens are in the sum that a client is told.
  int32_t given = 0;
  for (const GenerationDelta& whole : whole_) given += whole.end->completion_tokens;
  whole_.front().end->completion_tokens += all_tokens - given;
  if (!logprobs_wanted_) {
    for (GenerationDelta& whole : whole_) whole.logprobs.clear();
  }
  next_ = 0;
}

}  // namespace lorikeet
