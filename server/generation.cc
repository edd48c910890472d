#include "server/generation.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

absl::Status Invalid(const std::string& message) { return absl::InvalidArgumentError(message); }

absl::Status ValidateStops(const GenerationInput& input) {
  if (input.stop_strings.size() > Limits::kMaxStopStrings) {
    return Invalid(absl::StrCat("stop.strings: ", input.stop_strings.size(), " strings; at most ",
                                Limits::kMaxStopStrings));
  }
  for (size_t i = 0; i < input.stop_strings.size(); ++i) {
    const std::string& stop = input.stop_strings[i];
    if (stop.empty() || stop.size() > Limits::kMaxStopStringBytes) {
      return Invalid(absl::StrCat("stop.strings[", i, "]: ", stop.size(), " bytes; 1 to ",
                                  Limits::kMaxStopStringBytes));
    }
  }
  if (input.stop_token_ids.size() > Limits::kMaxStopTokenIds) {
    return Invalid(absl::StrCat("stop.token_ids: ", input.stop_token_ids.size(), " ids; at most ",
                                Limits::kMaxStopTokenIds));
  }
  return absl::OkStatus();
}

absl::Status ValidateIds(const std::vector<int32_t>& ids, const char* what, int32_t vocab_size) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return Invalid(absl::StrCat(what, "[", i, "]: ", ids[i], " is not in [0, ", vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(const ServingContext& context,
                                                const std::vector<ChatMessage>& messages) {
  if (messages.empty()) return Invalid("chat.messages: empty; at least one message");
  if (context.chat_template == nullptr) {
    return Invalid(absl::StrCat("chat: the model '", context.model_name,
                                "' has no chat template; send text or token_ids"));
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string field = absl::StrCat("chat.messages[", i, "]");
    LK_RETURN_IF_ERROR(ValidateUtf8(messages[i].role, field + ".role"));
    LK_RETURN_IF_ERROR(ValidateUtf8(messages[i].content, field + ".content"));
  }
  ChatRequest request;
  request.messages_json = MessagesJson(messages);
  request.now_unix_s = std::chrono::duration_cast<std::chrono::seconds>(
                           std::chrono::system_clock::now().time_since_epoch())
                           .count();
  LK_ASSIGN_OR_RETURN(const std::string text, context.chat_template->Render(request));
  return context.tokenizer->Encode(text, /*add_special=*/false);
}

absl::StatusOr<std::vector<int32_t>> EncodePrompt(const ServingContext& context,
                                                  GenerationInput& input) {
  if (auto* ids = std::get_if<std::vector<int32_t>>(&input.prompt)) {
    if (ids->empty()) return Invalid("token_ids: empty; at least one token");
    LK_RETURN_IF_ERROR(ValidateIds(*ids, "token_ids", context.vocab_size));
    return std::move(*ids);
  }
  if (const auto* messages = std::get_if<std::vector<ChatMessage>>(&input.prompt)) {
    return EncodeChat(context, *messages);
  }
  const std::string& text = std::get<std::string>(input.prompt);
  if (text.empty()) return Invalid("text: empty; at least one character");
  LK_RETURN_IF_ERROR(ValidateUtf8(text, "text"));
  LK_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                      context.tokenizer->Encode(text, /*add_special=*/true));
  if (ids.empty()) return Invalid("text: has no tokens; at least one");
  return ids;
}

absl::StatusOr<Request> BuildRequest(const ServingContext& context, GenerationInput& input) {
  Request request;
  request.sampling = input.sampling;
  request.sampling.prompt_logprobs = input.echo && input.sampling.top_logprobs >= 0;
  LK_RETURN_IF_ERROR(ValidateSampling(request.sampling));
  LK_RETURN_IF_ERROR(ValidateStops(input));
  LK_RETURN_IF_ERROR(ValidateIds(input.stop_token_ids, "stop.token_ids", context.vocab_size));
  if (input.max_tokens && *input.max_tokens < 1) {
    return Invalid(absl::StrCat("stop.max_tokens: ", *input.max_tokens, "; at least 1"));
  }
  LK_RETURN_IF_ERROR(ValidateUtf8(input.adapter, "adapter"));
  if (!input.adapter.empty() && input.adapter != context.model_name) {
    request.adapter_name = input.adapter;
  }
  LK_ASSIGN_OR_RETURN(request.prompt, EncodePrompt(context, input));
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  const int64_t room = context.max_context_tokens - prompt_tokens;
  if (room < 1) {
    return Invalid(absl::StrCat("prompt: ", prompt_tokens, " tokens; at most ",
                                context.max_context_tokens - 1, " leave room for an answer"));
  }
  request.max_new_tokens =
      static_cast<int32_t>(std::min<int64_t>(room, input.max_tokens.value_or(room)));
  request.stop_token_ids = input.stop_token_ids;
  request.ignore_eos = input.ignore_eos;
  request.cache_salt = input.cache_salt;
  request.skip_prefix_cache = input.skip_prefix_cache;
  request.deadline_us = input.deadline_us;
  return request;
}

}  // namespace

GenerationCall::GenerationCall(const ServingContext& context, int64_t arrival_us,
                               const GenerationInput& input, Request request, StopMatcher stops,
                               std::function<void()> wake)
    : context_(context),
      arrival_us_(arrival_us),
      logprobs_(request.sampling.top_logprobs >= 0),
      prompt_tokens_(static_cast<int32_t>(request.prompt.size())),
      wake_(std::move(wake)),
      // max_new_tokens, the prompt's log-probabilities and the end.
      sink_(std::make_shared<TokenSink>(request.max_new_tokens + 2, wake_)),
      // An answer to a conversation is a text of its own; everything else continues the prompt.
      detokenizer_(*context.tokenizer, /*skip_special=*/true,
                   std::holds_alternative<std::vector<ChatMessage>>(input.prompt)
                       ? Detokenizer::Start::kText
                       : Detokenizer::Start::kContinuation),
      stops_(std::move(stops)) {
  if (input.echo) echo_.emplace().tokens = request.prompt;
  request_ = std::move(request);
}

absl::StatusOr<std::unique_ptr<GenerationCall>> GenerationCall::Start(const ServingContext& context,
                                                                      GenerationInput input,
                                                                      std::function<void()> wake) {
  const int64_t arrival_us = context.clock->NowMicros();
  auto start = [&]() -> absl::StatusOr<std::unique_ptr<GenerationCall>> {
    LK_ASSIGN_OR_RETURN(Request request, BuildRequest(context, input));
    LK_ASSIGN_OR_RETURN(StopMatcher stops,
                        StopMatcher::Create(input.stop_strings, /*include_stop=*/false));
    std::unique_ptr<GenerationCall> call(new GenerationCall(
        context, arrival_us, input, std::move(request), std::move(stops), std::move(wake)));
    call->ended_ = true;  // nothing to cancel unless it is submitted or waits
    if (call->echo_) {
      LK_ASSIGN_OR_RETURN(call->echo_->text,
                          context.tokenizer->Decode(call->echo_->tokens, /*skip_special=*/true));
    }
    if (!call->request_->adapter_name.empty()) call->AskForAdapter();
    LK_RETURN_IF_ERROR(call->SubmitIfReady());
    call->ended_ = false;
    context.metrics->OnPrompt(call->prompt_tokens_);
    return call;
  };
  auto call = start();
  if (!call.ok()) context.metrics->OnRequestDone(call.status());
  return call;
}

void GenerationCall::AskForAdapter() {
  lease_ = std::make_shared<Lease>();
  context_.adapters->AcquireAsync(
      request_->adapter_name, [slot = lease_, wake = wake_, clock = context_.clock](
                                  absl::StatusOr<AdapterLease> lease) {
        bool awaited = false;
        {
          std::lock_guard lock(slot->mutex);
          slot->lease = std::move(lease);
          slot->arrived_us = clock->NowMicros();
          awaited = slot->awaited;
        }
        if (awaited) wake();
      });
}

// Leaves `request_` where it is while its adapter is being read.
absl::Status GenerationCall::SubmitIfReady() {
  if (lease_ != nullptr) {
    std::lock_guard lock(lease_->mutex);
    if (!lease_->lease) {
      lease_->awaited = true;
      return absl::OkStatus();
    }
    LK_ASSIGN_OR_RETURN(request_->adapter, *std::move(lease_->lease));
    if (lease_->awaited) adapter_read_us_ = lease_->arrived_us - arrival_us_;
    adapter_version_ = request_->adapter.version();
  }
  lease_ = nullptr;
  Request request = *std::exchange(request_, std::nullopt);
  LK_ASSIGN_OR_RETURN(id_, context_.engine->Submit(std::move(request), sink_));
  return absl::OkStatus();
}

GenerationCall::~GenerationCall() {
  if (ended_) return;
  if (!request_) context_.engine->Cancel(id_);
  context_.metrics->OnRequestDone(absl::CancelledError("the call was dropped"));
}

void GenerationCall::Cancel() {
  if (ended_) return;
  if (request_) {
    canceled_ = true;
    wake_();
  } else {
    context_.engine->Cancel(id_);
  }
}

GenerationDelta GenerationCall::Poll() {
  GenerationDelta delta;
  if (request_ && !ended_) {
    GenerationEnd end;
    end.status =
        canceled_ ? absl::CancelledError("the request was cancelled") : SubmitIfReady();
    if (!end.status.ok()) End(std::move(end), &delta);
  }
  TokenEvent event;
  while (!ended_ && sink_->Pop(&event)) {
    cached_tokens_ = event.cached_tokens;
    switch (event.kind) {
      case TokenEvent::Kind::kPromptLogprobs:
        if (echo_) echo_->logprobs = std::move(event.prompt_logprobs);
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

void GenerationCall::OnToken(TokenEvent& event, GenerationDelta* delta) {
  if (completion_tokens_ == 0) {
    context_.metrics->OnFirstToken(event.time_us - arrival_us_);
  } else {
    context_.metrics->OnNextToken(event.time_us - last_token_us_);
  }
  ++completion_tokens_;
  last_token_us_ = event.time_us;
  last_token_ = event.token;
  delta->tokens.push_back(event.token);
  if (logprobs_) delta->logprobs.push_back(std::move(event.logprobs));
  std::string text;
  detokenizer_.Append(event.token, &text);
  if (stops_.Push(text, &delta->text)) {
    context_.engine->Cancel(id_);
    GenerationEnd end;
    end.stop_string = *stops_.matched();
    End(std::move(end), delta);
  }
}

void GenerationCall::OnFinished(const TokenEvent& event, GenerationDelta* delta) {
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
      if (!stopped) end.stop_token = last_token_;
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

void GenerationCall::End(GenerationEnd end, GenerationDelta* delta) {
  end.prompt_tokens = prompt_tokens_;
  end.cached_tokens = cached_tokens_;
  end.completion_tokens = completion_tokens_;
  end.adapter_version = adapter_version_;
  end.adapter_read_us = adapter_read_us_;
  context_.metrics->OnRequestDone(end.status);
  ended_ = true;
  delta->end = std::move(end);
}

}  // namespace lorikeet
