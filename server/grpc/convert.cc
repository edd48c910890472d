#include "server/grpc/convert.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/random.h"

namespace lorikeet {
namespace {

SamplingParams ToSampling(const v1::SamplingParams& proto) {
  SamplingParams params;
  if (proto.has_temperature()) params.temperature = proto.temperature();
  if (proto.has_top_p()) params.top_p = proto.top_p();
  params.top_k = proto.top_k();
  params.min_p = proto.min_p();
  params.seed = proto.has_seed() ? proto.seed() : RandomSeed();
  if (proto.has_repetition_penalty()) params.repetition_penalty = proto.repetition_penalty();
  params.presence_penalty = proto.presence_penalty();
  params.frequency_penalty = proto.frequency_penalty();
  params.logit_bias.assign(proto.logit_bias().begin(), proto.logit_bias().end());
  return params;
}

std::vector<int32_t> ToIds(const v1::TokenIds& tokens) {
  return std::vector<int32_t>(tokens.ids().begin(), tokens.ids().end());
}

// What both kinds of request say of adapters and of the prefix cache.
template <typename Request>
void SetShared(const Request& request, GenerationInput* input) {
  input->model = request.adapter();
  for (const v1::WeightedAdapter& term : request.adapters()) {
    input->adapters.push_back({term.id(), term.weight()});
  }
  input->cache_salt = request.cache_salt();
  input->skip_prefix_cache = request.skip_prefix_cache();
}

absl::Status SetPrompt(v1::GenerateRequest& request, GenerationInput* input) {
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      input->prompt = std::move(*request.mutable_text());
      return absl::OkStatus();
    case v1::GenerateRequest::kTokenIds:
      input->prompt = ToIds(request.token_ids());
      return absl::OkStatus();
    case v1::GenerateRequest::kChat: {
      std::vector<ChatMessage> messages;
      for (v1::ChatMessage& message : *request.mutable_chat()->mutable_messages()) {
        messages.push_back(
            {std::move(*message.mutable_role()), std::move(*message.mutable_content())});
      }
      if (messages.empty()) {
        return absl::InvalidArgumentError("chat.messages: empty; at least one message");
      }
      input->prompt = ChatRequest{.messages_json = MessagesJson(messages)};
      return absl::OkStatus();
    }
    case v1::GenerateRequest::PROMPT_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("prompt: not set; send text, chat or token_ids");
}

absl::Status SetForm(const v1::Form& form, std::optional<GrammarSource>* grammar) {
  using Kind = GrammarSource::Kind;
  switch (form.form_case()) {
    case v1::Form::kJsonSchema:
      *grammar = {Kind::kJsonSchema, form.json_schema()};
      break;
    case v1::Form::kJsonObject:
      if (form.json_object()) *grammar = {Kind::kJsonObject, {}};
      break;
    case v1::Form::kRegex:
      *grammar = {Kind::kRegex, form.regex()};
      break;
    case v1::Form::kLark:
      *grammar = {Kind::kLark, form.lark()};
      break;
    case v1::Form::kChoices: {
      const auto& texts = form.choices().texts();
      if (texts.empty()) return absl::InvalidArgumentError("form.choices: empty; at least one");
      *grammar = ChoiceGrammar(std::vector<std::string>(texts.begin(), texts.end()));
      break;
    }
    case v1::Form::FORM_NOT_SET:
      break;
  }
  return absl::OkStatus();
}

void SetLogprobs(const TokenLogprobs& from, v1::TokenLogprobs* to) {
  to->set_logprob(from.logprob);
  for (const auto& [id, logprob] : from.top) {
    v1::TokenLogprob* top = to->add_top();
    top->set_token_id(id);
    top->set_logprob(logprob);
  }
}

absl::StatusOr<Pooling> ToPooling(v1::Pooling pooling) {
  switch (pooling) {
    case v1::POOLING_UNSPECIFIED:
    case v1::POOLING_LAST:
      return Pooling::kLast;
    case v1::POOLING_MEAN:
      return Pooling::kMean;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("pooling: ", static_cast<int>(pooling), " is not in [0, 2]"));
  }
}

void SetFinish(const GenerationEnd& end, v1::Finish* finish) {
  finish->set_reason(end.length ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_STOP);
  if (end.stop_token) finish->set_token_id(*end.stop_token);
  if (end.stop_string) finish->set_string(*end.stop_string);
  SetUsage(end, finish->mutable_usage());
  finish->set_adapter_version(end.adapter_version);
}

}  // namespace

void SetUsage(const GenerationEnd& end, v1::Usage* usage) {
  usage->set_prompt_tokens(end.prompt_tokens);
  usage->set_cached_tokens(end.cached_tokens);
  usage->set_adapter_read_us(end.adapter_read_us);
  usage->set_adapter_copy_us(end.adapter_copy_us);
  usage->set_completion_tokens(end.completion_tokens);
}

absl::StatusOr<GenerationInput> ToInput(const v1::EmbedRequest& request, int32_t hidden_size) {
  GenerationInput input;
  switch (request.prompt_case()) {
    case v1::EmbedRequest::kText:
      input.prompt = request.text();
      break;
    case v1::EmbedRequest::kTokenIds:
      input.prompt = ToIds(request.token_ids());
      break;
    case v1::EmbedRequest::PROMPT_NOT_SET:
      return absl::InvalidArgumentError("prompt: not set; send text or token_ids");
  }
  if (request.dimensions() < 0 || request.dimensions() > hidden_size) {
    return absl::InvalidArgumentError(absl::StrCat("dimensions: ", request.dimensions(),
                                                   " is not in [0, ", hidden_size, "]"));
  }
  LK_ASSIGN_OR_RETURN(input.pooling, ToPooling(request.pooling()));
  SetShared(request, &input);
  input.max_tokens = 1;  // for its checks: none is made
  return input;
}

absl::StatusOr<GenerationInput> ToInput(v1::GenerateRequest request) {
  GenerationInput input;
  LK_RETURN_IF_ERROR(SetPrompt(request, &input));
  SetShared(request, &input);
  input.sampling = ToSampling(request.sampling());
  if (request.has_logprobs()) {
    if (request.logprobs() < 0 || request.logprobs() > Limits::kMaxTopLogprobs) {
      return absl::InvalidArgumentError(absl::StrCat(
          "logprobs: ", request.logprobs(), " is not in [0, ", Limits::kMaxTopLogprobs, "]"));
    }
    input.sampling.top_logprobs = request.logprobs();
  }
  const v1::StopConditions& stop = request.stop();
  if (stop.has_max_tokens()) input.max_tokens = stop.max_tokens();
  input.stop_strings.assign(stop.strings().begin(), stop.strings().end());
  input.stop_token_ids.assign(stop.token_ids().begin(), stop.token_ids().end());
  input.ignore_eos = stop.ignore_eos();
  input.echo = request.echo();
  input.sampling.min_tokens = stop.min_tokens();
  input.include_stop_string = stop.include_string();
  const auto& words = request.sampling().bad_words();
  input.bad_words.assign(words.begin(), words.end());
  if (request.n() != 0) input.choices = request.n();
  input.best_of = request.best_of();
  LK_RETURN_IF_ERROR(SetForm(request.form(), &input.grammar));
  if (input.echo && request.has_logprobs()) input.prompt_logprobs = request.logprobs();
  return input;
}

void AppendDelta(const GenerationDelta& delta, v1::GenerateResponse* response) {
  if (delta.prompt) {
    v1::EchoedPrompt* prompt = response->mutable_prompt();
    prompt->mutable_token_ids()->Add(delta.prompt->tokens.begin(), delta.prompt->tokens.end());
    prompt->set_text(delta.prompt->text);
    for (const TokenLogprobs& logprobs : delta.prompt->logprobs) {
      SetLogprobs(logprobs, prompt->add_logprobs());
    }
  }
  response->mutable_token_ids()->Add(delta.tokens.begin(), delta.tokens.end());
  response->mutable_text()->append(delta.text);
  for (const TokenLogprobs& logprobs : delta.logprobs) {
    SetLogprobs(logprobs, response->add_logprobs());
  }
  if (delta.end) SetFinish(*delta.end, response->mutable_finish());
  response->set_choice(delta.choice);
}

}  // namespace lorikeet
