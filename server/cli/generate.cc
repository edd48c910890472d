// `lorikeet generate`: one answer, streamed as text or printed as one line of JSON.
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/base/status_macros.h"
#include "lorikeet/v1/generation.grpc.pb.h"
#include "server/cli/client.h"

namespace lorikeet {
namespace {

using nlohmann::json;

constexpr char kUsage[] =
    "lorikeet generate --prompt TEXT | --chat FILE | --prompt-ids 1,2,3 [flags]\n";
constexpr int32_t kIntMax = std::numeric_limits<int32_t>::max();

struct GenerateFlags {
  ServerAddress server;
  std::optional<std::string> prompt, chat, prompt_ids;
  std::vector<std::string> stop_ids;
  int32_t max_tokens = 256;
  int32_t timeout_s = 0;
  bool json = false;
  v1::GenerateRequest request;
};

// A flag that sets a field of the request, its range being the server's to check.
template <typename T>
std::function<absl::Status(const std::string&)> Setter(std::string name,
                                                       std::function<void(T)> set) {
  return [=](const std::string& text) -> absl::Status {
    if constexpr (std::is_floating_point_v<T>) {
      T value = 0;  // NaN and infinity too
      if (!absl::SimpleAtof(text, &value)) {
        return absl::InvalidArgumentError(absl::StrCat(name, ": '", text, "' is not a number"));
      }
      set(value);
    } else {
      LK_ASSIGN_OR_RETURN(const int64_t value,
                          ParseInt(text, std::numeric_limits<int32_t>::min(),
                                   std::is_same_v<T, int32_t> ? kIntMax : INT64_MAX, name));
      set(static_cast<T>(value));
    }
    return absl::OkStatus();
  };
}

void AddSamplingFlags(OptionTable* table, v1::GenerateRequest* request) {
  v1::SamplingParams* s = request->mutable_sampling();
  const auto real = [&](const char* name, const char* help, std::function<void(float)> set) {
    table->Custom(name, "X", help, Setter<float>(name, std::move(set)));
  };
  real("temperature", "0: the most likely token (default 1)",
       [=](float x) { s->set_temperature(x); });
  real("top-p", "smallest set of tokens reaching this probability (default 1)",
       [=](float x) { s->set_top_p(x); });
  table->Custom("top-k", "N", "only the N most likely tokens (default 0: all)",
                Setter<int32_t>("top-k", [=](int32_t n) { s->set_top_k(n); }));
  real("min-p", "drop tokens less likely than X times the best (default 0)",
       [=](float x) { s->set_min_p(x); });
  table->Custom("seed", "N", "makes the answer repeatable (default: random)",
                Setter<int64_t>("seed", [=](int64_t n) { s->set_seed(n); }));
  real("repetition-penalty", "over prompt and answer (default 1)",
       [=](float x) { s->set_repetition_penalty(x); });
  real("presence-penalty", "over the answer, -2 to 2 (default 0)",
       [=](float x) { s->set_presence_penalty(x); });
  real("frequency-penalty", "over the answer, -2 to 2 (default 0)",
       [=](float x) { s->set_frequency_penalty(x); });
}

OptionTable GenerateOptions(GenerateFlags* flags) {
  OptionTable table;
  v1::GenerateRequest* request = &flags->request;
  const auto text = [&](const char* name, const char* placeholder, const char* help,
                        std::optional<std::string>* value) {
    table.Custom(name, placeholder, help, [=](const std::string& input) {
      *value = input;
      return absl::OkStatus();
    });
  };
  AddServerOption(&table, &flags->server);
  table.Text("adapter", "NAME", "adapter to use (default: the base model)",
             request->mutable_adapter());
  text("prompt", "TEXT", "plain text to continue", &flags->prompt);
  text("chat", "FILE",
       "JSON array of {\"role\", \"content\"}, or an object with it as \"messages\"", &flags->chat);
  text("prompt-ids", "1,2,3", "token ids to continue", &flags->prompt_ids);
  table.Int("max-tokens", 1, kIntMax, "tokens", "longest answer", &flags->max_tokens);
  AddSamplingFlags(&table, request);
  table.Custom("stop", "TEXT", "end before this text (may be repeated)",
               [=](const std::string& stop) {
                 request->mutable_stop()->add_strings(stop);
                 return absl::OkStatus();
               });
  table.Custom(
      "stop-id", "ID", "end after this token (may be repeated)",
      Setter<int32_t>("stop-id", [=](int32_t id) { request->mutable_stop()->add_token_ids(id); }));
  table.Custom("logprobs", "K", "log-probabilities of each token and the K best",
               Setter<int32_t>("logprobs", [=](int32_t k) { request->set_logprobs(k); }));
  table.Int("timeout", 0, 1 << 20, "s", "deadline of the call; 0: none", &flags->timeout_s);
  return table;
}

absl::Status SetChat(const std::string& path, v1::ChatPrompt* chat) {
  LK_ASSIGN_OR_RETURN(const std::string content, ReadTextFile(path));
  const json root = json::parse(content, nullptr, /*allow_exceptions=*/false);
  const auto invalid = [&](const std::string& why) {
    return absl::InvalidArgumentError(absl::StrCat("--chat ", path, ": ", why));
  };
  if (root.is_discarded()) return invalid("not JSON");
  const json messages = root.is_object() ? root.value("messages", json()) : root;
  if (!messages.is_array()) return invalid("no array of messages");
  for (size_t i = 0; i < messages.size(); ++i) {
    const json& message = messages[i];
    v1::ChatMessage* to = chat->add_messages();
    for (const char* field : {"role", "content"}) {
      if (!message.is_object() || !message.contains(field) || !message[field].is_string()) {
        return invalid(absl::StrCat("message ", i, " has no string \"", field, "\""));
      }
    }
    to->set_role(message["role"].get<std::string>());
    to->set_content(message["content"].get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status SetPrompt(const GenerateFlags& flags, v1::GenerateRequest* request) {
  if (flags.prompt.has_value() + flags.chat.has_value() + flags.prompt_ids.has_value() != 1) {
    return absl::InvalidArgumentError("give one of --prompt, --chat and --prompt-ids");
  }
  if (flags.prompt) request->set_text(*flags.prompt);
  if (flags.chat) return SetChat(*flags.chat, request->mutable_chat());
  if (flags.prompt_ids) {
    request->mutable_token_ids();
    for (const absl::string_view part : absl::StrSplit(*flags.prompt_ids, ',', absl::SkipEmpty())) {
      LK_ASSIGN_OR_RETURN(const int64_t id,
                          ParseInt({part.data(), part.size()}, 0, kIntMax, "--prompt-ids"));
      request->mutable_token_ids()->add_ids(static_cast<int32_t>(id));
    }
  }
  return absl::OkStatus();
}

// JSON has no infinity: a token of probability zero is null.
json Number(float value) { return std::isfinite(value) ? json(value) : json(nullptr); }

void AddLogprobs(const google::protobuf::RepeatedPtrField<v1::TokenLogprobs>& from, json* chosen,
                 json* top) {
  *chosen = json::array();
  *top = json::array();
  for (const v1::TokenLogprobs& token : from) {
    chosen->push_back(Number(token.logprob()));
    json best = json::array();
    for (const v1::TokenLogprob& one : token.top()) {
      best.push_back(json::array({one.token_id(), Number(one.logprob())}));
    }
    top->push_back(std::move(best));
  }
}

// One line; scripts rely on these names.
void PrintJson(const v1::GenerateResponse& whole, bool logprobs) {
  const v1::Finish& finish = whole.finish();
  nlohmann::ordered_json line;
  line["token_ids"] = std::vector<int32_t>(whole.token_ids().begin(), whole.token_ids().end());
  line["text"] = whole.text();
  line["finish_reason"] = finish.reason() == v1::FINISH_REASON_LENGTH ? "length" : "stop";
  if (finish.has_token_id()) line["stop_token_id"] = finish.token_id();
  if (finish.has_string()) line["stop_string"] = finish.string();
  json chosen, top;  // null unless asked for
  if (logprobs) AddLogprobs(whole.logprobs(), &chosen, &top);
  line["logprobs"] = chosen;
  line["top_logprobs"] = top;
  line["usage"] = {{"prompt_tokens", finish.usage().prompt_tokens()},
                   {"completion_tokens", finish.usage().completion_tokens()}};
  line["adapter_version"] = finish.adapter_version();
  if (whole.has_prompt()) {
    const v1::EchoedPrompt& prompt = whole.prompt();
    line["prompt"] = prompt.text();
    line["prompt_token_ids"] =
        std::vector<int32_t>(prompt.token_ids().begin(), prompt.token_ids().end());
    if (logprobs) AddLogprobs(prompt.logprobs(), &chosen, &top);
    line["prompt_logprobs"] = chosen;
    line["prompt_top_logprobs"] = top;
  }
  std::printf("%s\n", line.dump().c_str());
}

void PrintText(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

absl::Status Stream(const GenerateFlags& flags) {
  const auto stub = v1::GenerationService::NewStub(Connect(flags.server));
  grpc::ClientContext context;
  if (flags.timeout_s > 0) {
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(flags.timeout_s));
  }
  const auto reader = stub->Generate(&context, flags.request);
  v1::GenerateResponse message, whole;
  bool wrote = false;
  while (reader->Read(&message)) {
    if (!flags.json) {
      PrintText(message.prompt().text() + message.text());
      wrote = wrote || !message.text().empty();
    }
    std::string text = whole.text() + message.text();  // merging would replace it
    whole.MergeFrom(message);
    whole.set_text(std::move(text));
    message.Clear();
  }
  const absl::Status status = CallStatus(flags.server, reader->Finish());
  if (wrote) std::printf("\n");
  if (status.ok() && flags.json) PrintJson(whole, flags.request.has_logprobs());
  return status;
}

}  // namespace

absl::Status RunGenerate(Arguments args) {
  GenerateFlags flags;
  OptionTable table = GenerateOptions(&flags);
  bool ignore_eos = false, echo = false;
  table.Switch("ignore-eos", "go on after an end-of-sequence token", &ignore_eos);
  table.Switch("echo", "print the prompt before the answer", &echo);
  table.Switch("json", "one line of JSON at the end instead of streamed text", &flags.json);
  if (PrintedHelp(args, kUsage, table)) return absl::OkStatus();
  LK_RETURN_IF_ERROR(ParseClientFlags(args, table, 0, 0).status());
  LK_RETURN_IF_ERROR(SetPrompt(flags, &flags.request));
  flags.request.mutable_stop()->set_max_tokens(flags.max_tokens);
  flags.request.mutable_stop()->set_ignore_eos(ignore_eos);
  flags.request.set_echo(echo);
  return Stream(flags);
}

}  // namespace lorikeet
