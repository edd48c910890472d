#include "server/generation_request.h"

#include <algorithm>
#include <chrono>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

constexpr size_t kLeastVersionDigits = 8;

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

// A text that is too long whatever its tokens are is refused before it takes seconds to find them.
absl::Status CheckFits(const ServingContext& context, const ModelText& model, std::string_view text,
                       const char* field) {
  const int64_t most = int64_t{model.tokenizer->pieces().longest} * (context.max_context_tokens - 1);
  if (most == 0 || static_cast<int64_t>(text.size()) <= most) return absl::OkStatus();
  return Invalid(absl::StrCat(field, ": ", text.size(), " bytes; at most ", most, " can be the ",
                              context.max_context_tokens - 1,
                              " tokens that leave room for an answer"));
}

absl::StatusOr<std::vector<int32_t>> EncodePrompt(const ServingContext& context,
                                                  const ModelText& model, GenerationInput& input) {
  if (auto* ids = std::get_if<std::vector<int32_t>>(&input.prompt)) {
    if (ids->empty()) return Invalid("token_ids: empty; at least one token");
    LK_RETURN_IF_ERROR(ValidateTokenIds(*ids, "token_ids", model.vocab_size));
    return std::move(*ids);
  }
  if (auto* chat = std::get_if<ChatRequest>(&input.prompt)) {
    LK_ASSIGN_OR_RETURN(const std::string text, RenderChat(context, model, *chat));
    LK_RETURN_IF_ERROR(CheckFits(context, model, text, "chat"));
    return model.tokenizer->Encode(text, /*add_special=*/false);
  }
  const std::string& text = std::get<std::string>(input.prompt);
  if (text.empty()) return Invalid("text: empty; at least one character");
  LK_RETURN_IF_ERROR(ValidateUtf8(text, "text"));
  LK_RETURN_IF_ERROR(CheckFits(context, model, text, "text"));
  LK_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                      model.tokenizer->Encode(text, /*add_special=*/true));
  if (ids.empty()) return Invalid("text: has no tokens; at least one");
  return ids;
}

// The engine lists as many alternatives for prompt and answer; the front drops what is too much.
absl::Status SetLogprobs(const GenerationInput& input, SamplingParams* sampling) {
  if (input.best_of > input.choices) sampling->top_logprobs = std::max(sampling->top_logprobs, 0);
  if (!input.prompt_logprobs) return absl::OkStatus();
  const int32_t wanted = *input.prompt_logprobs;
  if (wanted < 0 || wanted > Limits::kMaxTopLogprobs) {
    return Invalid(absl::StrCat("prompt_logprobs: ", wanted, " is not in [0, ",
                                Limits::kMaxTopLogprobs, "]"));
  }
  sampling->prompt_logprobs = true;
  sampling->top_logprobs = std::max(sampling->top_logprobs, wanted);
  return absl::OkStatus();
}

absl::Status ValidateChoices(const GenerationInput& input) {
  if (input.choices < 1 || input.choices > Limits::kMaxChoices) {
    return Invalid(
        absl::StrCat("n: ", input.choices, " is not in [1, ", Limits::kMaxChoices, "]"));
  }
  if (input.best_of == 0) return absl::OkStatus();
  if (input.best_of < input.choices || input.best_of > Limits::kMaxChoices) {
    return Invalid(absl::StrCat("best_of: ", input.best_of, " is not in [n, ",
                                Limits::kMaxChoices, "]; n is ", input.choices));
  }
  return absl::OkStatus();
}

// A word has other tokens at the beginning of an answer than behind a space.
absl::Status AddBadWords(const ModelText& text, const std::vector<std::string>& words,
                         SamplingParams* sampling) {
  if (words.size() > Limits::kMaxBadWords) {
    return Invalid(absl::StrCat("bad_words: ", words.size(), " words; at most ",
                                Limits::kMaxBadWords));
  }
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i].empty() || words[i].size() > Limits::kMaxBadWordBytes) {
      return Invalid(absl::StrCat("bad_words[", i, "]: ", words[i].size(), " bytes; 1 to ",
                                  Limits::kMaxBadWordBytes));
    }
    LK_RETURN_IF_ERROR(ValidateUtf8(words[i], absl::StrCat("bad_words[", i, "]")));
    for (const std::string& form : {words[i], " " + words[i]}) {
      LK_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                          text.tokenizer->Encode(form, /*add_special=*/false));
      if (!ids.empty()) sampling->bad_words.push_back(std::move(ids));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateBias(const SamplingParams& sampling, int32_t vocab_size) {
  for (const auto& [id, bias] : sampling.logit_bias) {
    if (id < 0 || id >= vocab_size) {
      return Invalid(absl::StrCat("logit_bias: token ", id, " is not in [0, ", vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TokenConstraint>> CompileGrammar(const ServingContext& context,
                                                                const ModelText& text,
                                                                const GenerationInput& input) {
  if (text.grammars == nullptr) {
    return Invalid(absl::StrCat(input.grammar_field, ": the model '", context.model_name,
                                "' has no end-of-sequence token to end an answer with"));
  }
  auto constraint = text.grammars->Compile(*input.grammar);
  if (constraint.ok()) return constraint;
  return Invalid(absl::StrCat(input.grammar_field, ": ", constraint.status().message()));
}

// The adapter's part of "base:adapter"; `name` if it has no such form.
std::string_view WithoutBase(std::string_view name, const std::string& base) {
  const bool prefixed = name.size() > base.size() && name.starts_with(base) &&
                        name[base.size()] == ':';
  return prefixed ? name.substr(base.size() + 1) : name;
}

absl::StatusOr<std::string> Find(const ServingContext& context, const Identity& caller,
                                 std::string_view adapter) {
  if (!caller.Sees(adapter)) return AdapterNotLoaded(adapter);
  return context.adapters->Find(adapter);
}

ResolvedModel OneAdapter(std::string_view name) {
  return {.terms = {{std::string(name)}}, .name = std::string(name)};
}

}  // namespace

absl::Status ValidateTokenIds(const std::vector<int32_t>& ids, const char* what,
                              int32_t vocab_size) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return Invalid(absl::StrCat(what, "[", i, "]: ", ids[i], " is not in [0, ", vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> RenderChat(const ServingContext& context, const ModelText& model,
                                       ChatRequest& request) {
  if (model.chat_template == nullptr) {
    return Invalid(absl::StrCat("chat: the model '", context.model_name,
                                "' has no chat template; send text or token_ids"));
  }
  request.now_unix_s = std::chrono::duration_cast<std::chrono::seconds>(
                           std::chrono::system_clock::now().time_since_epoch())
                           .count();
  return model.chat_template->Render(request);
}

absl::Status CheckVersion(const ResolvedModel& model, std::string_view version) {
  if (version.starts_with(model.version)) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("adapter '", model.name, "' has version ",
                                          std::string(version), ", not '", model.version, "'"));
}

absl::StatusOr<ResolvedModel> ResolveModel(const ServingContext& context, const Identity& caller,
                                           std::string_view model) {
  LK_RETURN_IF_ERROR(ValidateUtf8(model, "model"));
  if (model.empty() || model == context.model_name) return ResolvedModel{};
  const absl::Status whole = Find(context, caller, model).status();
  if (whole.ok()) return OneAdapter(model);
  const std::string_view name = WithoutBase(model, context.model_name);
  if (name.size() < model.size() && Find(context, caller, name).ok()) {
    return OneAdapter(name);
  }
  const size_t at = name.rfind('@');
  const std::string_view before = name.substr(0, at);  // all of it without an '@'
  ResolvedModel asked = OneAdapter(before);
  if (at != std::string_view::npos) asked.version = name.substr(at + 1);
  absl::StatusOr<std::string> found = Find(context, caller, before);
  if (!found.ok() && caller.Sees(before) && context.adapters->MayAppear(before)) return asked;
  if (at == std::string_view::npos) return whole;
  LK_ASSIGN_OR_RETURN(const std::string version, std::move(found));
  if (asked.version.size() < kLeastVersionDigits) {  // which might be meant for another
    return absl::NotFoundError(absl::StrCat("version '", asked.version, "' of adapter '", asked.name,
                                            "' has ", asked.version.size(), " digits; at least ",
                                            kLeastVersionDigits));
  }
  LK_RETURN_IF_ERROR(CheckVersion(asked, version));
  return asked;
}

absl::StatusOr<ResolvedModel> Resolve(const ServingContext& context, const Identity& caller,
                                      const GenerationInput& input) {
  if (input.adapters.empty()) return ResolveModel(context, caller, input.model);
  if (!input.model.empty() && input.model != context.model_name) {
    return Invalid("adapter and adapters are both set");
  }
  ResolvedModel model{.terms = input.adapters};
  for (const WeightedAdapter& term : input.adapters) {
    LK_RETURN_IF_ERROR(ValidateUtf8(term.name, "adapters.id"));
    LK_RETURN_IF_ERROR(Find(context, caller, term.name).status());
    absl::StrAppend(&model.name, model.name.empty() ? "" : "+", term.name);
  }
  return model;
}

absl::Status ValidateInput(const GenerationInput& input) {
  LK_RETURN_IF_ERROR(ValidateChoices(input));
  LK_RETURN_IF_ERROR(ValidateStops(input));
  if (input.max_tokens && *input.max_tokens < 1) {
    return Invalid(absl::StrCat(input.max_tokens_field, ": ", *input.max_tokens, "; at least 1"));
  }
  if (input.max_tokens && input.sampling.min_tokens > *input.max_tokens) {
    return Invalid(absl::StrCat("min_tokens: ", input.sampling.min_tokens,
                                "; at most ", input.max_tokens_field, ", which is ",
                                *input.max_tokens));
  }
  return absl::OkStatus();
}

absl::StatusOr<Request> BuildRequest(const ServingContext& context, const ModelText& text,
                                     GenerationInput& input) {
  Request request;
  request.sampling = input.sampling;
  LK_RETURN_IF_ERROR(SetLogprobs(input, &request.sampling));
  LK_RETURN_IF_ERROR(AddBadWords(text, input.bad_words, &request.sampling));
  LK_RETURN_IF_ERROR(ValidateSampling(request.sampling));
  LK_RETURN_IF_ERROR(ValidateBias(request.sampling, text.vocab_size));
  LK_RETURN_IF_ERROR(ValidateTokenIds(input.stop_token_ids, "stop.token_ids", text.vocab_size));
  LK_ASSIGN_OR_RETURN(request.prompt, EncodePrompt(context, text, input));
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
  if (text.eos_ids != nullptr) request.eos_ids = *text.eos_ids;
  if (input.grammar) {
    LK_ASSIGN_OR_RETURN(request.constraint, CompileGrammar(context, text, input));
  }
  if (input.pooling) request.embedding = std::make_shared<Embedding>(*input.pooling);
  request.cache_salt = input.cache_salt;
  request.skip_prefix_cache = input.skip_prefix_cache;
  request.deadline_us = input.deadline_us;
  return request;
}

}  // namespace lorikeet
