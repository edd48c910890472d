#include "server/openai/request.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/json.h"
#include "server/random.h"

namespace lorikeet {
namespace {

constexpr int32_t kDefaultCompletionTokens = 16;  // OpenAI's

void ReadSampling(Fields& fields, SamplingParams* sampling) {
  fields.Read("temperature", &sampling->temperature);
  fields.Read("top_p", &sampling->top_p);
  fields.Read("top_k", &sampling->top_k);
  if (sampling->top_k == -1) sampling->top_k = 0;  // vLLM's way to say off
  fields.Read("min_p", &sampling->min_p);
  fields.Read("repetition_penalty", &sampling->repetition_penalty);
  fields.Read("presence_penalty", &sampling->presence_penalty);
  fields.Read("frequency_penalty", &sampling->frequency_penalty);
  std::optional<int64_t> seed;
  fields.Read("seed", &seed);
  sampling->seed = seed ? static_cast<uint64_t>(*seed) : RandomSeed();
}

// {"17": -100}: token ids as text.
void ReadBias(Fields& fields, SamplingParams* sampling) {
  const Json* biases = fields.Take("logit_bias");
  if (biases == nullptr) return;
  if (!biases->is_object()) return fields.Note(FieldError("logit_bias", "not an object"));
  for (const auto& [key, value] : biases->items()) {
    int32_t id = 0;
    if (!absl::SimpleAtoi(key, &id) || !value.is_number()) {
      const std::string what = "not a token id with a number";
      return fields.Note(FieldError(absl::StrCat("logit_bias.", key), what));
    }
    sampling->logit_bias.emplace_back(id, value.get<float>());
  }
}

absl::StatusOr<GrammarSource> ResponseFormat(const Json& format, bool* constrained) {
  if (!format.is_object()) return FieldError("response_format", "not an object");
  Fields fields(format, "response_format.");
  std::string type;
  fields.Read("type", &type);
  const Json* schema = fields.Take("json_schema");
  LK_RETURN_IF_ERROR(fields.Finish());
  if (schema != nullptr && type != "json_schema") {
    return FieldError("response_format.json_schema", "only with type json_schema");
  }
  *constrained = type != "text";
  if (type == "text") return GrammarSource{};
  if (type == "json_object") return GrammarSource{GrammarSource::Kind::kJsonObject, {}};
  if (type != "json_schema") {
    return FieldError("response_format.type",
                      absl::StrCat("'", type, "' is none of text, json_object, json_schema"));
  }
  if (schema == nullptr || !schema->is_object() || !schema->contains("schema")) {
    return FieldError("response_format.json_schema.schema", "missing");
  }
  Fields inner(*schema, "response_format.json_schema.");
  std::string name, description;  // for models that are told of them
  bool strict = true;             // answers fit in any case
  inner.Read("name", &name);
  inner.Read("description", &description);
  inner.Read("strict", &strict);
  inner.Take("schema");
  LK_RETURN_IF_ERROR(inner.Finish());
  return GrammarSource{GrammarSource::Kind::kJsonSchema, Dump((*schema)["schema"])};
}

// OpenAI's response_format and vLLM's structured_outputs (and guided_*, its older names): one of
// them at most.
void ReadGrammar(Fields& fields, GenerationInput* input) {
  using Kind = GrammarSource::Kind;
  const auto set = [&](const std::string& name, GrammarSource source) {
    if (input->grammar) return fields.Note(FieldError(name, "the answer has a form already"));
    input->grammar = std::move(source);
    input->grammar_field = name;
  };
  if (const Json* format = fields.Take("response_format")) {
    bool constrained = false;
    absl::StatusOr<GrammarSource> source = ResponseFormat(*format, &constrained);
    fields.Note(source.status());
    if (source.ok() && constrained) set("response_format", *std::move(source));
  }
  const auto read = [&](Fields& from, const std::string& prefix) {
    const auto text = [](const Json& json) {
      return json.is_string() ? json.get<std::string>() : Dump(json);
    };
    const auto named = [&](const char* name) { return from.prefix() + prefix + name; };
    for (const auto& [name, kind] : {std::pair("json", Kind::kJsonSchema),
                                     std::pair("regex", Kind::kRegex),
                                     std::pair("grammar", Kind::kLark)}) {
      const Json* json = from.Take((prefix + name).c_str());
      if (json != nullptr) set(named(name), {kind, text(*json)});
    }
    std::optional<std::vector<std::string>> choices;
    from.Read((prefix + "choice").c_str(), &choices);
    if (!choices) return;
    if (choices->empty()) return from.Note(FieldError(named("choice"), "empty; at least one"));
    set(named("choice"), ChoiceGrammar(*choices));
  };
  read(fields, "guided_");
  const Json* structured = fields.Take("structured_outputs");
  if (structured == nullptr) return;
  if (!structured->is_object()) {
    return fields.Note(FieldError("structured_outputs", "not an object"));
  }
  Fields inner(*structured, "structured_outputs.");
  read(inner, "");
  bool object = false;
  inner.Read("json_object", &object);
  if (object) set("structured_outputs.json_object", {Kind::kJsonObject, {}});
  fields.Note(inner.Finish());
}

void ReadStops(Fields& fields, GenerationInput* input) {
  if (const Json* stop = fields.Take("stop"); stop != nullptr && stop->is_string()) {
    input->stop_strings.push_back(stop->get<std::string>());
  } else {
    fields.Read("stop", &input->stop_strings);
  }
  fields.Read("include_stop_str_in_output", &input->include_stop_string);
  fields.Read("stop_token_ids", &input->stop_token_ids);
  fields.Read("ignore_eos", &input->ignore_eos);
}

void ReadStream(Fields& fields, OutputOptions* output) {
  fields.Read("stream", &output->stream);
  const Json* options = fields.Take("stream_options");
  if (options == nullptr) return;
  if (!options->is_object()) return fields.Note(FieldError("stream_options", "not an object"));
  if (!output->stream) {
    return fields.Note(FieldError("stream_options", "only with \"stream\": true"));
  }
  Fields inner(*options, "stream_options.");
  inner.Read("include_usage", &output->include_usage);
  inner.Accept("include_obfuscation", false);
  fields.Note(inner.Finish());
}

// A weighted sum of adapters over the base model, which `model` must name.
void ReadAdapters(Fields& fields, GenerationInput* input) {
  const Json* list = fields.Take("adapters");
  if (list == nullptr) return;
  if (!list->is_array()) return fields.Note(FieldError("adapters", "not an array"));
  for (size_t i = 0; i < list->size(); ++i) {
    const std::string field = absl::StrCat("adapters[", i, "]");
    if (!(*list)[i].is_object()) return fields.Note(FieldError(field, "not an object"));
    Fields term((*list)[i], field + ".");
    WeightedAdapter& adapter = input->adapters.emplace_back();
    term.Read("id", &adapter.name);
    term.Read("weight", &adapter.weight);
    fields.Note(term.Finish());
  }
}

// What all bodies have.
void ReadModel(Fields& fields, GenerationInput* input) {
  fields.Read("model", &input->model);
  if (fields.ok() && input->model.empty()) {
    fields.Note(FieldError("model", "missing; the base model's or an adapter's name"));
  }
  ReadAdapters(fields, input);
  fields.Read("cache_salt", &input->cache_salt);
  fields.Read("skip_prefix_cache", &input->skip_prefix_cache);
  std::string user;  // whose request it is, for the client's own books
  fields.Read("user", &user);
}

// What those of generation have.
void ReadCommon(Fields& fields, GenerationInput* input, OutputOptions* output) {
  ReadModel(fields, input);
  output->model = input->model;
  input->max_tokens_field = "max_tokens";
  ReadSampling(fields, &input->sampling);
  ReadBias(fields, &input->sampling);
  fields.Read("min_tokens", &input->sampling.min_tokens);
  fields.Read("bad_words", &input->bad_words);
  ReadGrammar(fields, input);
  ReadStops(fields, input);
  ReadStream(fields, output);
  fields.Read("n", &input->choices);
  fields.Read("prompt_logprobs", &input->prompt_logprobs);
  output->prompt_logprobs = input->prompt_logprobs.has_value();
  fields.Read("return_tokens_as_token_ids", &output->tokens_as_ids);
  fields.Accept("skip_special_tokens", true);
}

void SetTopLogprobs(Fields& fields, const char* name, int32_t top, GenerationInput* input) {
  if (top < 0 || top > Limits::kMaxTopLogprobs) {
    return fields.Note(FieldError(
        name, absl::StrCat(top, " is not in [0, ", Limits::kMaxTopLogprobs, "]")));
  }
  input->sampling.top_logprobs = top;
}

using Prompt = decltype(GenerationInput::prompt);

bool IsIds(const Json& json) {
  return json.is_array() && !json.empty() && json[0].is_number_integer();
}

// One prompt: text or token ids.
absl::StatusOr<Prompt> OnePrompt(const Json& json, const std::string& name) {
  if (json.is_string()) return Prompt(json.get<std::string>());
  if (!json.is_array()) return FieldError(name, "neither text nor an array of token ids");
  std::vector<int32_t> ids;
  LK_RETURN_IF_ERROR(Fields::Convert(json, name, &ids));
  return Prompt(std::move(ids));
}

absl::StatusOr<std::vector<Prompt>> Prompts(Fields& fields, const char* name, size_t most) {
  const Json* json = fields.Take(name);
  if (json == nullptr) return FieldError(name, "missing; text or token ids");
  std::vector<Prompt> prompts;
  if (!json->is_array() || IsIds(*json) || json->empty()) {
    LK_ASSIGN_OR_RETURN(prompts.emplace_back(), OnePrompt(*json, name));
    return prompts;
  }
  if (json->size() > most) {
    return FieldError(name, absl::StrCat(json->size(), " of them; at most ", most));
  }
  for (size_t i = 0; i < json->size(); ++i) {
    LK_ASSIGN_OR_RETURN(prompts.emplace_back(),
                        OnePrompt((*json)[i], absl::StrCat(name, "[", i, "]")));
  }
  return prompts;
}

absl::StatusOr<Pooling> ParsePooling(const std::string& name) {
  if (name == "last") return Pooling::kLast;
  if (name == "mean") return Pooling::kMean;
  return FieldError("pooling", absl::StrCat("'", name, "' is none of last, mean"));
}

absl::StatusOr<std::string> ContentText(const Json& content, const std::string& field) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) return FieldError(field, "neither text nor an array of text parts");
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    const std::string part = absl::StrCat(field, "[", i, "].");
    if (!content[i].is_object()) return FieldError(part + "type", "missing; \"text\"");
    Fields fields(content[i], part);
    std::string type;
    std::optional<std::string> piece;
    fields.Read("type", &type);
    if (fields.ok() && type != "text") {
      return FieldError(part + "type", absl::StrCat("'", type, "' is not supported; only 'text'"));
    }
    fields.Read("text", &piece);
    LK_RETURN_IF_ERROR(fields.Finish());
    if (!piece) return FieldError(part + "text", "missing");
    text += *piece;
  }
  return text;
}

// One call of an earlier answer. Templates write its arguments themselves; clients send them as a
// string of JSON.
absl::Status ParseCall(Json* call, const std::string& field) {
  if (!call->is_object()) return FieldError(field, "not an object");
  Fields fields(*call, field + ".");
  std::string id;
  int32_t index = 0;
  fields.Read("id", &id);
  fields.Read("index", &index);
  fields.Accept("type", "function");
  const Json* function = fields.Take("function");
  LK_RETURN_IF_ERROR(fields.Finish());
  if (function == nullptr || !function->is_object()) return FieldError(field + ".function", "missing");
  Fields inner(*function, field + ".function.");
  std::optional<std::string> name;
  inner.Read("name", &name);
  const Json* given = inner.Take("arguments");
  LK_RETURN_IF_ERROR(inner.Finish());
  if (!name) return FieldError(field + ".function.name", "missing");
  if (given != nullptr && given->is_object()) return absl::OkStatus();
  if (given == nullptr || !given->is_string()) {
    return FieldError(field + ".function.arguments", "missing, or not a string of JSON");
  }
  absl::StatusOr<Json> arguments = ParseOrderedJson(given->get<std::string>());
  if (!arguments.ok()) {
    return FieldError(field + ".function.arguments", std::string(arguments.status().message()));
  }
  (*call)["function"]["arguments"] = *std::move(arguments);
  return absl::OkStatus();
}

absl::Status ParseCalls(Json* calls, const std::string& field) {
  if (!calls->is_array()) return FieldError(field, "not an array");
  for (size_t i = 0; i < calls->size(); ++i) {
    LK_RETURN_IF_ERROR(ParseCall(&(*calls)[i], absl::StrCat(field, "[", i, "]")));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> TemplateMessages(const Json& messages) {
  if (!messages.is_array() || messages.empty()) {
    return FieldError("messages", "not an array of at least one message");
  }
  Json out = Json::array();
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string field = absl::StrCat("messages[", i, "]");
    if (!messages[i].is_object()) return FieldError(field, "not an object");
    Json message = messages[i];
    if (!message.contains("role") || !message["role"].is_string()) {
      return FieldError(field + ".role", "missing; \"system\", \"user\", \"assistant\", ...");
    }
    for (const char* name : {"name", "tool_call_id"}) {
      const Json given = message.value(name, Json());
      if (!given.is_null() && !given.is_string()) {
        return FieldError(absl::StrCat(field, ".", name), "not a string");
      }
    }
    if (message.contains("content") && !message["content"].is_null()) {
      LK_ASSIGN_OR_RETURN(message["content"], ContentText(message["content"], field + ".content"));
    } else if (message.contains("tool_calls")) {
      message["content"] = "";
    } else {
      return FieldError(field + ".content", "missing");
    }
    if (message.contains("tool_calls") && !message["tool_calls"].is_null()) {
      LK_RETURN_IF_ERROR(ParseCalls(&message["tool_calls"], field + ".tool_calls"));
    }
    out.push_back(std::move(message));
  }
  return Dump(out);
}

absl::StatusOr<OpenAiRequest> ParseCompletion(const Json& body) {
  OpenAiRequest request;
  GenerationInput input;
  Fields fields(body);
  input.max_tokens = kDefaultCompletionTokens;
  ReadCommon(fields, &input, &request.output);
  const absl::StatusOr<std::vector<Prompt>> prompts =
      Prompts(fields, "prompt", Limits::kMaxChoices);
  fields.Note(prompts.status());
  fields.Read("max_tokens", &input.max_tokens);
  fields.Read("echo", &input.echo);
  fields.Read("best_of", &input.best_of);
  if (request.output.stream && input.best_of > 1) {
    fields.Note(FieldError("best_of", absl::StrCat(input.best_of, " cannot be streamed")));
  }
  std::optional<int32_t> logprobs;
  fields.Read("logprobs", &logprobs);
  if (logprobs) SetTopLogprobs(fields, "logprobs", *logprobs, &input);
  // OpenAI's log-probabilities of an echoed prompt come with the answer's.
  if (logprobs && input.echo && !input.prompt_logprobs) input.prompt_logprobs = *logprobs;
  request.output.echo = input.echo;
  request.output.logprobs = logprobs.has_value();
  LK_RETURN_IF_ERROR(fields.Finish());
  for (const Prompt& prompt : *prompts) {
    request.inputs.push_back(input);
    request.inputs.back().prompt = prompt;
  }
  return request;
}

absl::StatusOr<EmbeddingRequest> ParseEmbedding(const Json& body, int32_t hidden_size) {
  EmbeddingRequest request;
  GenerationInput input;
  Fields fields(body);
  ReadModel(fields, &input);
  request.model = input.model;
  input.max_tokens = 1;  // for its checks: none is made
  std::string pooling = "last", format = "float";
  fields.Read("pooling", &pooling);
  const absl::StatusOr<Pooling> parsed = ParsePooling(pooling);
  fields.Note(parsed.status());
  fields.Read("encoding_format", &format);
  request.base64 = format == "base64";
  if (!request.base64 && format != "float") {
    fields.Note(FieldError("encoding_format",
                           absl::StrCat("'", format, "' is none of float, base64")));
  }
  std::optional<int32_t> dimensions;
  fields.Read("dimensions", &dimensions);
  if (dimensions && (*dimensions < 1 || *dimensions > hidden_size)) {
    fields.Note(FieldError("dimensions",
                           absl::StrCat(*dimensions, " is not in [1, ", hidden_size, "]")));
  }
  request.dimensions = dimensions.value_or(hidden_size);
  absl::StatusOr<std::vector<Prompt>> prompts =
      Prompts(fields, "input", Limits::kMaxEmbeddingInputs);
  fields.Note(prompts.status());
  LK_RETURN_IF_ERROR(fields.Finish());
  input.pooling = *parsed;
  request.inputs.assign(prompts->size(), input);
  for (size_t i = 0; i < prompts->size(); ++i) {
    request.inputs[i].prompt = std::move((*prompts)[i]);
  }
  return request;
}

absl::Status InOpenAiNames(const absl::Status& status, const std::string& prompt) {
  const std::pair<const char*, std::string> kNames[] = {
      {"stop.strings", "stop"},
      {"stop.token_ids", "stop_token_ids"},
      {"token_ids", prompt},
      {"text", prompt},
      {"prompt", prompt},
      {"chat", "messages"},
  };
  const std::string message(status.message());
  for (const auto& [shared, own] : kNames) {
    const size_t size = std::string(shared).size();
    if (message.rfind(shared, 0) != 0 || message.size() == size) continue;
    if (message[size] != ':' && message[size] != '[' && message[size] != ' ') continue;
    return absl::Status(status.code(), own + message.substr(size));
  }
  return status;
}

absl::StatusOr<OpenAiRequest> ParseChat(const Json& body, ToolStyle style) {
  OpenAiRequest request;
  request.output.chat = true;
  GenerationInput& input = request.inputs.emplace_back();
  Fields fields(body);
  ReadCommon(fields, &input, &request.output);
  fields.Read("max_tokens", &input.max_tokens);
  std::optional<int32_t> completion_tokens;  // the name that OpenAI gave it later
  fields.Read("max_completion_tokens", &completion_tokens);
  if (completion_tokens) {
    input.max_tokens = completion_tokens;
    input.max_tokens_field = "max_completion_tokens";
  }
  int32_t top_logprobs = 0;
  fields.Read("logprobs", &request.output.logprobs);
  fields.Read("top_logprobs", &top_logprobs);
  if (request.output.logprobs) {
    SetTopLogprobs(fields, "top_logprobs", top_logprobs, &input);
  } else if (top_logprobs != 0) {
    fields.Note(FieldError("top_logprobs", "only with \"logprobs\": true"));
  }
  ChatRequest chat;
  fields.Read("add_generation_prompt", &chat.add_generation_prompt);
  if (const Json* variables = fields.Take("chat_template_kwargs")) {
    if (!variables->is_object()) {
      fields.Note(FieldError("chat_template_kwargs", "not an object"));
    }
    chat.variables_json = Dump(*variables);
  }
  request.output.tools = ReadTools(fields, style);
  chat.tools_json = request.output.tools.definitions_json;
  if (auto& forced = request.output.tools.grammar) {
    if (input.grammar) fields.Note(FieldError("tool_choice", "the answer has a form already"));
    input.grammar = std::move(forced);
    input.grammar_field = "tools";
  }
  fields.Accept("store", false);
  fields.Accept("service_tier", "auto");
  const Json* messages = fields.Take("messages");
  absl::StatusOr<std::string> text = TemplateMessages(messages ? *messages : Json());
  fields.Note(text.status());
  LK_RETURN_IF_ERROR(fields.Finish());
  chat.messages_json = *std::move(text);
  input.prompt = std::move(chat);
  return request;
}

}  // namespace lorikeet
