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

// The engine's request of an input.
struct GenerationCall::Built {
  Request request;
  ModelText text;
  std::optional<PromptEcho> echo;
};

// Made on the thread that brings the adapter, as finding the tokens of a long prompt takes a while.
// That thread alone has `input` until `built` is there.
struct GenerationCall::Building {
  GenerationInput input;
  ResolvedModel model;
  std::string tenant;

  std::mutex mutex;
  std::optional<absl::StatusOr<Built>> built;
  bool awaited = false;  // it was not there when it was first looked for
  int64_t read_us = 0;   // the adapter was brought by another thread, after so long
  std::string version;   // the adapter's, once it is there
};

struct GenerationCall::Prepared {
  ChoiceOptions options;
  int32_t count = 1;  // choices to start
  std::function<void()> wake;
  std::shared_ptr<Building> building;
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
  LK_ASSIGN_OR_RETURN(ResolvedModel model, Resolve(context_, caller, input));
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
  record_.adapter = model.name;
  record_.sum = model.terms.size() > 1;
  context_.metrics->OnRequestStart(record_);
  prepared_->building = std::make_shared<Building>();
  Building& building = *prepared_->building;
  building.input = std::move(input);
  building.model = std::move(model);
  building.tenant = caller.tenant;
  if (building.model.terms.empty()) {
    building.built = Build(context_, building, AdapterLease());
  } else {
    AskForAdapter();
  }
  return absl::OkStatus();
}

// In the words of the adapter; an empty lease is the base model's.
absl::StatusOr<GenerationCall::Built> GenerationCall::Build(const ServingContext& context,
                                                            Building& building,
                                                            AdapterLease lease) {
  GenerationInput& input = building.input;
  Built built{.text = TextOf(context.text, lease.get())};
  LK_ASSIGN_OR_RETURN(built.request, BuildRequest(context, built.text, input));
  built.request.adapter = std::move(lease);
  built.request.adapter_name = building.model.name;
  built.request.tenant = building.tenant;
  if (!input.echo && !input.prompt_logprobs) return built;
  PromptEcho& echo = built.echo.emplace();
  echo.tokens = built.request.prompt;
  LK_ASSIGN_OR_RETURN(echo.text,
                      built.text.tokenizer->Decode(echo.tokens, /*skip_special=*/true));
  return built;
}

absl::StatusOr<GenerationCall::Built> GenerationCall::BuildLeased(
    const ServingContext& context, Building& building, absl::StatusOr<AdapterLease> lease) {
  LK_RETURN_IF_ERROR(lease.status());
  LK_RETURN_IF_ERROR(CheckVersion(building.model, lease->version()));
  building.version = lease->version();
  return Build(context, building, *std::move(lease));
}

void GenerationCall::AskForAdapter() {
  context_.mixer->AcquireAsync(
      prepared_->building->model.terms,
      [weak = std::weak_ptr(prepared_->building), wake = prepared_->wake, &context = context_,
       asked_us = context_.clock->NowMicros(),
       asker = std::this_thread::get_id()](absl::StatusOr<AdapterLease> lease) {
        const std::shared_ptr<Building> building = weak.lock();
        if (building == nullptr) return;  // the call was dropped
        if (std::this_thread::get_id() != asker) {
          building->read_us = std::max<int64_t>(context.clock->NowMicros() - asked_us, 1);
        }
        absl::StatusOr<Built> built = BuildLeased(context, *building, std::move(lease));
        bool awaited = false;
        {
          std::lock_guard lock(building->mutex);
          building->built = std::move(built);
          awaited = building->awaited;
        }
        if (awaited) wake();
      });
}

// Leaves `prepared_` where it is while the request is being built.
absl::Status GenerationCall::SubmitIfReady() {
  Prepared& prepared = *prepared_;
  Building& building = *prepared.building;
  {
    std::lock_guard lock(building.mutex);
    building.awaited = !building.built;
    if (building.awaited) return absl::OkStatus();
  }
  record_.adapter_read_us = building.read_us;
  record_.adapter_version = building.version;
  LK_ASSIGN_OR_RETURN(Built built, *std::move(building.built));
  const Request& request = built.request;
  record_.prompt_tokens = static_cast<int32_t>(request.prompt.size());
  prepared.options.text = std::move(built.text);
  prepared.options.echo = std::move(built.echo);
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
