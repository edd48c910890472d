#include "server/choice.h"

#include <utility>

#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

void Shorten(int32_t top, TokenLogprobs* logprobs) {
  if (logprobs->top.size() > static_cast<size_t>(top)) logprobs->top.resize(top);
}

}  // namespace

Choice::Choice(const ServingContext& context, const ChoiceOptions& options, const Request& request,
               StopMatcher stops, std::shared_ptr<TokenSink> sink)
    : context_(context),
      record_(options.record),
      text_(options.text),
      top_logprobs_(options.top_logprobs),
      prompt_top_logprobs_(options.prompt_logprobs.value_or(0)),
      echo_(options.echo),
      adapter_version_(request.adapter.version()),
      prompt_tokens_(static_cast<int32_t>(request.prompt.size())),
      embedding_(request.embedding),
      sink_(std::move(sink)),
      // An answer to a conversation is a text of its own; everything else continues the prompt.
      detokenizer_(*text_.tokenizer, /*skip_special=*/true,
                   options.chat ? Detokenizer::Start::kText : Detokenizer::Start::kContinuation),
      stops_(std::move(stops)) {}

absl::StatusOr<std::unique_ptr<Choice>> Choice::Start(const ServingContext& context,
                                                      const ChoiceOptions& options, Request request,
                                                      std::function<void()> wake) {
  LK_ASSIGN_OR_RETURN(StopMatcher stops,
                      StopMatcher::Create(options.stop_strings, options.include_stop_string));
  // max_new_tokens, the prompt's log-probabilities and the end.
  auto sink = std::make_shared<TokenSink>(request.max_new_tokens + 2, std::move(wake));
  std::unique_ptr<Choice> choice(new Choice(context, options, request, std::move(stops), sink));
  choice->ended_ = true;  // nothing to cancel unless Submit takes it
  LK_ASSIGN_OR_RETURN(choice->id_, context.engine->Submit(std::move(request), std::move(sink)));
  choice->ended_ = false;
  return choice;
}

Choice::~Choice() { Cancel(); }

void Choice::Cancel() {
  if (!ended_) context_.engine->Cancel(id_);
}

GenerationDelta Choice::Poll() {
  GenerationDelta delta;
  delta.tokenizer = text_.tokenizer;
  TokenEvent event;
  while (!ended_ && sink_->Pop(&event)) {
    NoteAdmission(event);
    switch (event.kind) {
      case TokenEvent::Kind::kPromptLogprobs:
        if (!echo_) break;
        for (TokenLogprobs& of_one : event.prompt_logprobs) Shorten(prompt_top_logprobs_, &of_one);
        echo_->logprobs = std::move(event.prompt_logprobs);
        break;
      case TokenEvent::Kind::kToken:
        OnToken(event, &delta);
        break;
      case TokenEvent::Kind::kFinished:
        OnFinished(event, &delta);
        break;
    }
  }
  // The prompt's log-probabilities come before the first token, so by now they are there.
  if (echo_ && !delta.empty()) delta.prompt = std::exchange(echo_, std::nullopt);
  return delta;
}

// The first choice to be admitted stands for the request.
void Choice::NoteAdmission(const TokenEvent& event) {
  cached_tokens_ = event.cached_tokens;
  adapter_copy_us_ = event.adapter_copy_us;
  if (record_->admitted_us > 0 || event.admitted_us == 0) return;
  record_->admitted_us = event.admitted_us;
  record_->adapter_copy_us = event.adapter_copy_us;
  record_->cached_tokens = event.cached_tokens;
}

void Choice::OnToken(TokenEvent& event, GenerationDelta* delta) {
  if (completion_tokens_ > 0) context_.metrics->OnNextToken(event.time_us - last_token_us_);
  if (record_->first_token_us == 0) {
    record_->first_token_us = event.time_us;
    context_.metrics->OnFirstToken(*record_);
  }
  ++completion_tokens_;
  ++record_->completion_tokens;
  last_token_us_ = event.time_us;
  last_token_ = event.token;
  delta->tokens.push_back(event.token);
  if (top_logprobs_ >= 0) {
    Shorten(top_logprobs_, &event.logprobs);
    delta->logprobs.push_back(std::move(event.logprobs));
  }
  std::string text;
  detokenizer_.Append(event.token, &text);
  if (stops_.Push(text, &delta->text)) {
    context_.engine->Cancel(id_);
    GenerationEnd end;
    end.stop_string = *stops_.matched();
    End(std::move(end), delta);
  }
}

void Choice::OnFinished(const TokenEvent& event, GenerationDelta* delta) {
  std::string rest;
  detokenizer_.Finish(&rest);
  const bool stopped = stops_.Push(rest, &delta->text);
  stops_.Finish(&delta->text);
  GenerationEnd end;
  if (stopped) end.stop_string = *stops_.matched();
  switch (event.finish) {
    case FinishReason::kLength:
      end.length = !stopped;
      break;
    case FinishReason::kEos:
    case FinishReason::kStop:
      if (stopped) break;
      end.stop_token = last_token_;
      end.eos = event.finish == FinishReason::kEos;
      break;
    case FinishReason::kFormed:
      break;
    case FinishReason::kEmbedded:
      end.embedding = embedding_;
      break;
    case FinishReason::kCanceled:
      end.status = absl::CancelledError("the request was cancelled");
      break;
    case FinishReason::kError:
    case FinishReason::kNone:
      end.status = event.status;
      if (end.status.ok()) end.status = absl::InternalError("the request ended without a reason");
      break;
  }
  End(std::move(end), delta);
}

void Choice::End(GenerationEnd end, GenerationDelta* delta) {
  end.prompt_tokens = prompt_tokens_;
  end.cached_tokens = cached_tokens_;
  end.completion_tokens = completion_tokens_;
  end.adapter_version = adapter_version_;
  end.adapter_read_us = record_->adapter_read_us;
  end.adapter_copy_us = adapter_copy_us_;
  ended_ = true;
  delta->end = std::move(end);
}

}  // namespace lorikeet
