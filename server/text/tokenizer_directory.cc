// Tokenizer::FromDirectory: the files of a Hugging Face model directory.
#include <algorithm>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "server/text/tokenizer.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// What a tokenizer is made of, as far as it is there.
constexpr const char* kFiles[] = {
    "tokenizer.json",         "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "config.json",           "chat_template.json",
    "chat_template.jinja",    "additional_chat_templates/tool_use.jinja"};

absl::StatusOr<std::string> ReadWhole(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  if (!file || !content) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " cannot be read"));
  }
  return std::move(content).str();
}

// The files of a tokenizer, for what is looked up in them.
class Files {
 public:
  Files(const TokenizerFiles& files, std::string_view where) : files_(files), where_(where) {}

  std::string Path(const char* name) const { return (fs::path(where_) / name).string(); }
  // nullptr: no such file.
  const std::string* Find(const char* name) const {
    const auto it = files_.find(name);
    return it == files_.end() ? nullptr : &it->second;
  }
  // Empty: no such file.
  absl::StatusOr<Json> Object(const char* name) const {
    const std::string* text = Find(name);
    if (text == nullptr) return Json::object();
    Json json = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
    if (json.is_object()) return json;
    return absl::InvalidArgumentError(Path(name) + " is not a JSON object");
  }

 private:
  const TokenizerFiles& files_;
  const std::string_view where_;
};

// A special token is written as a string or as an object with "content"; empty: not there.
std::string TokenText(const Json& config, const char* name) {
  const auto it = config.find(name);
  if (it == config.end()) return "";
  if (it->is_string()) return it->get<std::string>();
  if (it->is_object() && it->contains("content") && (*it)["content"].is_string()) {
    return (*it)["content"].get<std::string>();
  }
  return "";
}

// "eos_token_id" of a config: a number, a list of numbers, or not there.
void AppendEndIds(const Json& config, std::vector<int32_t>* ids) {
  const auto it = config.find("eos_token_id");
  if (it == config.end()) return;
  for (const Json& id : it->is_array() ? *it : Json::array({*it})) {
    if (id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() <= INT32_MAX) {
      ids->push_back(id.get<int32_t>());
    }
  }
}

// "chat_template" of a config: a string, or a list of {"name", "template"}.
void TakeTemplates(const Json& config, ChatTemplateSource* source) {
  const auto it = config.find("chat_template");
  if (it == config.end()) return;
  if (it->is_string()) source->text = it->get<std::string>();
  if (!it->is_array()) return;
  for (const Json& entry : *it) {
    if (!entry.is_object()) continue;
    const std::string name = TokenText(entry, "name");
    if (name == "default") source->text = TokenText(entry, "template");
    if (name == "tool_use") source->with_tools = TokenText(entry, "template");
  }
}

// Files of their own win over tokenizer_config.json, the plain Jinja file over the older JSON one.
absl::StatusOr<ChatTemplateSource> ReadTemplates(const Files& files, const Json& config) {
  ChatTemplateSource source;
  TakeTemplates(config, &source);
  LK_ASSIGN_OR_RETURN(const Json old, files.Object("chat_template.json"));
  TakeTemplates(old, &source);
  if (const std::string* text = files.Find("chat_template.jinja")) source.text = *text;
  if (const std::string* text = files.Find("additional_chat_templates/tool_use.jinja")) {
    source.with_tools = *text;
  }
  return source;
}

}  // namespace

std::optional<NamedToken> Tokenizer::Named(std::string_view text) const {
  if (text.empty()) return std::nullopt;
  const std::optional<int32_t> id = TokenToId(text);
  if (!id) return std::nullopt;
  return NamedToken{*id, std::string(text)};
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromDirectory(const fs::path& directory) {
  TokenizerFiles files;
  for (const char* name : kFiles) {
    std::error_code ignored;
    if (!fs::exists(directory / name, ignored)) continue;
    LK_ASSIGN_OR_RETURN(files[name], ReadWhole(directory / name));
  }
  return FromFiles(files, directory.string());
}

absl::StatusOr<ChatTemplateSource> Tokenizer::TemplatesOf(const TokenizerFiles& contents,
                                                          std::string_view where) {
  const Files files(contents, where);
  LK_ASSIGN_OR_RETURN(const Json config, files.Object("tokenizer_config.json"));
  return ReadTemplates(files, config);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromFiles(const TokenizerFiles& contents,
                                                                std::string_view where) {
  const Files files(contents, where);
  const std::string* json = files.Find("tokenizer.json");
  if (json == nullptr) {
    return absl::NotFoundError(files.Path("tokenizer.json") + " does not exist");
  }
  LK_ASSIGN_OR_RETURN(const Json config, files.Object("tokenizer_config.json"));
  LK_ASSIGN_OR_RETURN(const Json map, files.Object("special_tokens_map.json"));
  LK_ASSIGN_OR_RETURN(const Json generation, files.Object("generation_config.json"));
  LK_ASSIGN_OR_RETURN(const Json model, files.Object("config.json"));

  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer());
  if (const absl::Status status = tokenizer->Init(*json); !status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(files.Path("tokenizer.json"), ": ", status.message()));
  }
  const auto named = [&](const char* name) {
    const std::string text = TokenText(config, name);
    return tokenizer->Named(text.empty() ? TokenText(map, name) : text);
  };
  tokenizer->named_ = {named("bos_token"), named("eos_token"), named("unk_token"),
                       named("pad_token")};

  std::vector<int32_t>& ends = tokenizer->end_ids_;
  AppendEndIds(generation, &ends);
  if (ends.empty()) AppendEndIds(model, &ends);
  if (tokenizer->named_.eos) ends.push_back(tokenizer->named_.eos->id);
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  LK_ASSIGN_OR_RETURN(tokenizer->chat_template_, ReadTemplates(files, config));
  return tokenizer;
}

}  // namespace lorikeet
