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

// nullopt: no such file.
absl::StatusOr<std::optional<std::string>> ReadIfThere(const fs::path& path) {
  std::error_code ignored;
  if (!fs::exists(path, ignored)) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  if (!file || !content) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " cannot be read"));
  }
  return std::move(content).str();
}

absl::StatusOr<Json> ParseObject(const std::string& text, const fs::path& path) {
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " is not a JSON object"));
  }
  return json;
}

// An empty object: no such file.
absl::StatusOr<Json> ReadObjectIfThere(const fs::path& path) {
  LK_ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadIfThere(path));
  if (!text) return Json::object();
  return ParseObject(*text, path);
}

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
absl::StatusOr<ChatTemplateSource> ReadTemplates(const fs::path& directory, const Json& config) {
  ChatTemplateSource source;
  TakeTemplates(config, &source);
  LK_ASSIGN_OR_RETURN(const Json old, ReadObjectIfThere(directory / "chat_template.json"));
  TakeTemplates(old, &source);
  LK_ASSIGN_OR_RETURN(std::optional<std::string> text,
                      ReadIfThere(directory / "chat_template.jinja"));
  if (text) source.text = *std::move(text);
  LK_ASSIGN_OR_RETURN(std::optional<std::string> with_tools,
                      ReadIfThere(directory / "additional_chat_templates" / "tool_use.jinja"));
  if (with_tools) source.with_tools = *std::move(with_tools);
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
  const fs::path json_path = directory / "tokenizer.json";
  LK_ASSIGN_OR_RETURN(const std::optional<std::string> json, ReadIfThere(json_path));
  if (!json) return absl::NotFoundError(absl::StrCat(json_path.string(), " does not exist"));
  LK_ASSIGN_OR_RETURN(const Json config, ReadObjectIfThere(directory / "tokenizer_config.json"));
  LK_ASSIGN_OR_RETURN(const Json map, ReadObjectIfThere(directory / "special_tokens_map.json"));
  LK_ASSIGN_OR_RETURN(const Json generation,
                      ReadObjectIfThere(directory / "generation_config.json"));
  LK_ASSIGN_OR_RETURN(const Json model, ReadObjectIfThere(directory / "config.json"));

  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer());
  if (const absl::Status status = tokenizer->Init(*json); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(json_path.string(), ": ", status.message()));
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
  LK_ASSIGN_OR_RETURN(tokenizer->chat_template_, ReadTemplates(directory, config));
  return tokenizer;
}

}  // namespace lorikeet
