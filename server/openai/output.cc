#include "server/openai/output.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/random.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

// Short, and still one's own: the beginning of a version, or of each in a weighted sum.
std::string Fingerprint(const std::string& version) {
  constexpr size_t kDigits = 16;
  std::vector<std::string> terms = absl::StrSplit(version, '+');
  for (std::string& term : terms) {
    const size_t end = std::min(term.find('*'), term.size());
    if (end > kDigits) term.erase(kDigits, end - kDigits);
  }
  return absl::StrJoin(terms, "+");
}

int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// Appends what stands between the quotes of a JSON string; `text`: valid UTF-8.
void AppendQuoted(const std::string& text, std::string* out) {
  const auto as_it_is = [](unsigned char c) { return c >= 0x20 && c != '"' && c != '\\'; };
  if (std::ranges::all_of(text, as_it_is)) {
    out->append(text);
  } else {
    const std::string quoted = Dump(text);
    out->append(quoted, 1, quoted.size() - 2);
  }
}

// As valid UTF-8.
std::string Readable(const std::string& bytes) {
  std::string text;
  Utf8Repairer repairer;
  repairer.Append(bytes, &text);
  repairer.Finish(&text);
  return text;
}

Json Bytes(const std::string& piece) {
  Json bytes = Json::array();
  for (const unsigned char byte : piece) bytes.push_back(byte);
  return bytes;
}

// `first`: how many calls the choice has had before.
Json ToolCalls(const std::vector<ToolCall>& calls, int first, bool chunk) {
  Json list = Json::array();
  for (const ToolCall& call : calls) {
    Json entry = Json::object();
    if (chunk) entry["index"] = first + static_cast<int>(list.size());
    entry["id"] = "call_" + RandomHex(24);
    entry["type"] = "function";
    entry["function"] = {{"name", call.name}, {"arguments", call.arguments}};
    list.push_back(std::move(entry));
  }
  return list;
}

// vLLM's: the stop string or token id, null for the end of sequence.
Json StopReason(const GenerationDelta& delta) {
  if (delta.end && delta.end->stop_string) return *delta.end->stop_string;
  if (delta.end && delta.end->stop_token && !delta.end->eos) return *delta.end->stop_token;
  return nullptr;
}

}  // namespace

void AppendEvent(const std::string& json, std::string* out) {
  absl::StrAppend(out, "data: ", json, "\n\n");
}

OutputWriter::OutputWriter(OutputOptions options, int32_t choices)
    : options_(std::move(options)),
      id_(absl::StrCat(options_.chat ? "chatcmpl-" : "cmpl-", options_.request_id)),
      created_(UnixSeconds()),
      text_offset_(choices, 0),
      begun_(choices, false),
      text_events_(choices) {
  if (!options_.tools.names.empty()) finders_.assign(choices, ToolCallFinder(&options_.tools));
}

// What is sure by now; at the end, all that is left.
ToolCallFinder::Found OutputWriter::TextAndCalls(int32_t index, const GenerationDelta& delta) {
  if (finders_.empty()) return {.text = delta.text};
  ToolCallFinder::Found found = finders_[index].Append(delta.text);
  if (!delta.end) return found;
  ToolCallFinder::Found rest = finders_[index].Finish();
  found.text += rest.text;
  std::ranges::move(rest.calls, std::back_inserter(found.calls));
  return found;
}

Json OutputWriter::FinishWord(int32_t index, const GenerationDelta& delta) const {
  if (!delta.end) return nullptr;
  if (delta.end->length) return "length";
  return !finders_.empty() && finders_[index].calls() > 0 ? "tool_calls" : "stop";
}

void OutputWriter::Count(const GenerationEnd& end, bool first_of_prompt) {
  if (first_of_prompt) prompt_tokens_ += end.prompt_tokens;
  if (first_of_prompt) cached_tokens_ += end.cached_tokens;
  completion_tokens_ += end.completion_tokens;
  fingerprint_ = Fingerprint(end.adapter_version);
  std::ranges::fill(text_events_, TextEvent());  // which say it
}

std::string OutputWriter::TokenText(int32_t id) const {
  if (options_.tokens_as_ids) return absl::StrCat("token_id:", id);
  if (id < 0 || id >= tokenizer_->vocab_size()) return {};
  return Readable(std::string(tokenizer_->pieces().piece(id)));
}

Json OutputWriter::ChatLogprobs(const GenerationDelta& delta) const {
  const auto entry = [this](int32_t id, float logprob) {
    const bool known = id >= 0 && id < tokenizer_->vocab_size();
    const std::string piece = known ? std::string(tokenizer_->pieces().piece(id)) : std::string();
    return Json{{"token", TokenText(id)}, {"logprob", logprob}, {"bytes", Bytes(piece)}};
  };
  Json content = Json::array();
  for (size_t i = 0; i < delta.tokens.size(); ++i) {
    Json token = entry(delta.tokens[i], delta.logprobs[i].logprob);
    Json top = Json::array();
    for (const auto& [id, logprob] : delta.logprobs[i].top) top.push_back(entry(id, logprob));
    token["top_logprobs"] = std::move(top);
    content.push_back(std::move(token));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

// With `echo` the prompt's tokens come first, the very first without a probability.
Json OutputWriter::CompletionLogprobs(int32_t index, const GenerationDelta& delta) {
  Json tokens = Json::array(), values = Json::array(), tops = Json::array(),
       offsets = Json::array();
  const auto add = [&](int32_t id, const TokenLogprobs* logprobs) {
    const std::string text = TokenText(id);
    tokens.push_back(text);
    offsets.push_back(text_offset_[index]);
    text_offset_[index] += text.size();
    values.push_back(logprobs ? Json(logprobs->logprob) : Json());
    Json top;
    if (logprobs) {
      top = Json::object();
      for (const auto& [other, logprob] : logprobs->top) top[TokenText(other)] = logprob;
    }
    tops.push_back(std::move(top));
  };
  if (delta.prompt && options_.echo) {
    const PromptEcho& prompt = *delta.prompt;
    for (size_t i = 0; i < prompt.tokens.size(); ++i) {
      const bool known = i > 0 && i <= prompt.logprobs.size();
      add(prompt.tokens[i], known ? &prompt.logprobs[i - 1] : nullptr);
    }
  }
  for (size_t i = 0; i < delta.tokens.size(); ++i) add(delta.tokens[i], &delta.logprobs[i]);
  return {{"text_offset", std::move(offsets)},
          {"token_logprobs", std::move(values)},
          {"tokens", std::move(tokens)},
          {"top_logprobs", std::move(tops)}};
}

Json OutputWriter::Logprobs(int32_t index, const GenerationDelta& delta) {
  if (!options_.logprobs) return nullptr;
  return options_.chat ? ChatLogprobs(delta) : CompletionLogprobs(index, delta);
}

// vLLM's: for each token of the prompt but the first, {id: {logprob, decoded_token}} of the token
// and of those asked for beside it.
Json OutputWriter::PromptLogprobs(const PromptEcho& prompt) const {
  Json list = Json::array({nullptr});
  for (size_t i = 0; i < prompt.logprobs.size(); ++i) {
    Json entry = Json::object();
    const auto add = [&](int32_t id, float logprob) {
      entry[absl::StrCat(id)] = {{"logprob", logprob}, {"decoded_token", TokenText(id)}};
    };
    add(prompt.tokens[i + 1], prompt.logprobs[i].logprob);
    for (const auto& [id, logprob] : prompt.logprobs[i].top) add(id, logprob);
    list.push_back(std::move(entry));
  }
  return list;
}

Json OutputWriter::Whole(int32_t index, const GenerationDelta& delta) {
  tokenizer_ = delta.tokenizer;
  Json choice = {{"index", index}};
  if (options_.chat) {
    const ToolCallFinder::Found found = TextAndCalls(index, delta);
    const bool calls_alone = found.text.empty() && !found.calls.empty();
    choice["message"] = {{"role", "assistant"},
                         {"content", calls_alone ? Json() : Json(found.text)},
                         {"refusal", nullptr}};
    if (!found.calls.empty()) {
      choice["message"]["tool_calls"] = ToolCalls(found.calls, 0, /*chunk=*/false);
    }
  } else {
    choice["text"] = options_.echo ? delta.prompt->text + delta.text : delta.text;
  }
  choice["logprobs"] = Logprobs(index, delta);
  choice["finish_reason"] = FinishWord(index, delta);
  choice["stop_reason"] = StopReason(delta);
  if (options_.prompt_logprobs) choice["prompt_logprobs"] = PromptLogprobs(*delta.prompt);
  return choice;
}

Json OutputWriter::Envelope(bool chunk) const {
  const char* object = "text_completion";
  if (options_.chat) object = chunk ? "chat.completion.chunk" : "chat.completion";
  Json envelope = {
      {"id", id_}, {"object", object}, {"created", created_}, {"model", options_.model}};
  envelope["system_fingerprint"] = fingerprint_.empty() ? Json() : Json(fingerprint_);
  return envelope;
}

Json OutputWriter::Usage() const {
  return {{"prompt_tokens", prompt_tokens_},
          {"completion_tokens", completion_tokens_},
          {"total_tokens", prompt_tokens_ + completion_tokens_},
          {"prompt_tokens_details", {{"cached_tokens", cached_tokens_}}}};
}

Json OutputWriter::Response(Json choices) const {
  Json response = Envelope(/*chunk=*/false);
  response["choices"] = std::move(choices);
  response["usage"] = Usage();
  return response;
}

void OutputWriter::AppendChunk(int32_t index, Json choice, std::string* out) const {
  choice["index"] = index;
  Json chunk = Envelope(/*chunk=*/true);
  chunk["choices"] = Json::array({std::move(choice)});
  if (options_.include_usage) chunk["usage"] = nullptr;
  AppendEvent(Dump(chunk), out);
}

bool OutputWriter::IsText(int32_t index, const GenerationDelta& delta) const {
  return !delta.text.empty() && !delta.end && !delta.prompt && finders_.empty() &&
         !options_.logprobs && (begun_[index] || !options_.chat);
}

const OutputWriter::TextEvent& OutputWriter::TextEventOf(int32_t index) {
  TextEvent& cut = text_events_[index];
  if (!cut.before.empty()) return cut;
  Json choice;
  if (options_.chat) {
    choice["delta"] = {{"content", ""}};
  } else {
    choice["text"] = "";
  }
  for (const char* name : {"logprobs", "finish_reason", "stop_reason"}) choice[name] = nullptr;
  std::string event;
  AppendChunk(index, std::move(choice), &event);
  // Nowhere else: quotes inside of a string are escaped.
  const std::string_view hole = options_.chat ? R"("content":"")" : R"("text":"")";
  const size_t end_quote = event.find(hole) + hole.size() - 1;
  cut = {event.substr(0, end_quote), event.substr(end_quote)};
  return cut;
}

void OutputWriter::AppendEvents(int32_t index, const GenerationDelta& delta, std::string* out) {
  if (IsText(index, delta)) {  // nearly always: not made anew each time
    const TextEvent& event = TextEventOf(index);
    out->append(event.before);
    AppendQuoted(delta.text, out);
    out->append(event.after);
    return;
  }
  tokenizer_ = delta.tokenizer;
  if (options_.chat && !begun_[index]) {
    begun_[index] = true;
    AppendChunk(index,
                {{"delta", {{"role", "assistant"}, {"content", ""}}},
                 {"logprobs", nullptr},
                 {"finish_reason", nullptr}},
                out);
  }
  const int calls_before = finders_.empty() ? 0 : finders_[index].calls();
  const ToolCallFinder::Found found = TextAndCalls(index, delta);
  const bool prompt = delta.prompt && (options_.echo || options_.prompt_logprobs);
  const bool tokens = !found.text.empty() || (options_.logprobs && !delta.tokens.empty());
  if (!tokens && !prompt && !delta.end && found.calls.empty()) return;
  Json choice;
  if (options_.chat) {
    choice["delta"] = Json::object();
    if (tokens) choice["delta"]["content"] = found.text;
    if (!found.calls.empty()) {
      choice["delta"]["tool_calls"] = ToolCalls(found.calls, calls_before, /*chunk=*/true);
    }
  } else {
    const bool echo = options_.echo && delta.prompt;
    choice["text"] = echo ? delta.prompt->text + found.text : found.text;
  }
  choice["logprobs"] = tokens || prompt ? Logprobs(index, delta) : Json();
  choice["finish_reason"] = FinishWord(index, delta);
  choice["stop_reason"] = StopReason(delta);
  if (options_.prompt_logprobs && delta.prompt) {
    choice["prompt_logprobs"] = PromptLogprobs(*delta.prompt);
  }
  AppendChunk(index, std::move(choice), out);
}

void OutputWriter::AppendEnd(std::string* out) const {
  if (options_.include_usage) {
    Json chunk = Envelope(/*chunk=*/true);
    chunk["choices"] = Json::array();
    chunk["usage"] = Usage();
    AppendEvent(Dump(chunk), out);
  }
  AppendEvent("[DONE]", out);
}

}  // namespace lorikeet
