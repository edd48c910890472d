#include "server/openai/tools.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/json.h"

namespace lorikeet {
namespace {

constexpr size_t kMaxTools = 128;
constexpr size_t kMaxNameBytes = 64;
constexpr std::string_view kOpen = "<tool_call>";
constexpr std::string_view kClose = "</tool_call>";
constexpr char kSpace[] = " \t\r\n";

struct Tool {
  std::string name;
  Json parameters;
  bool strict = false;
};

absl::StatusOr<Tool> ReadTool(const Json& json, const std::string& field) {
  if (!json.is_object()) return FieldError(field, "not an object");
  Fields fields(json, field + ".");
  std::string type, description;
  fields.Read("type", &type);
  if (fields.ok() && type != "function") {
    return FieldError(field + ".type",
                      absl::StrCat("'", type, "' is not supported; only 'function'"));
  }
  const Json* function = fields.Take("function");
  LK_RETURN_IF_ERROR(fields.Finish());
  const std::string inside = field + ".function";
  if (function == nullptr || !function->is_object()) return FieldError(inside, "missing");
  Fields inner(*function, inside + ".");
  Tool tool;
  inner.Read("name", &tool.name);
  inner.Read("description", &description);
  inner.Read("strict", &tool.strict);
  const Json* parameters = inner.Take("parameters");
  LK_RETURN_IF_ERROR(inner.Finish());
  if (tool.name.empty() || tool.name.size() > kMaxNameBytes) {
    return FieldError(inside + ".name", absl::StrCat("'", tool.name, "' is not 1 to ",
                                                     kMaxNameBytes, " bytes long"));
  }
  if (parameters != nullptr && !parameters->is_object()) {
    return FieldError(inside + ".parameters", "not an object");
  }
  tool.parameters = parameters != nullptr ? *parameters : Json{{"type", "object"}};
  return tool;
}

absl::StatusOr<std::vector<Tool>> ReadDefinitions(const Json& json) {
  if (!json.is_array() || json.size() > kMaxTools) {
    return FieldError("tools", absl::StrCat("not an array of at most ", kMaxTools, " tools"));
  }
  std::vector<Tool> tools;
  for (size_t i = 0; i < json.size(); ++i) {
    const std::string field = absl::StrCat("tools[", i, "]");
    LK_ASSIGN_OR_RETURN(Tool tool, ReadTool(json[i], field));
    for (const Tool& other : tools) {
      if (other.name == tool.name) {
        return FieldError(field + ".function.name",
                          absl::StrCat("'", tool.name, "' is there twice"));
      }
    }
    tools.push_back(std::move(tool));
  }
  return tools;
}

// "none", "auto", "required", or the name of the one to call.
absl::StatusOr<std::string> ReadChoice(const Json* json, bool any_tools, bool* named) {
  if (json == nullptr) return std::string(any_tools ? "auto" : "none");
  if (json->is_string()) {
    const std::string word = json->get<std::string>();
    if (word == "none" || word == "auto" || word == "required") return word;
    return FieldError("tool_choice",
                      absl::StrCat("'", word, "' is none of none, auto and required"));
  }
  if (!json->is_object()) return FieldError("tool_choice", "neither a word nor an object");
  LK_ASSIGN_OR_RETURN(const Tool tool, ReadTool(*json, "tool_choice"));
  *named = true;
  return tool.name;
}

// References in parameters are to the root of their schema, which they no longer are.
absl::Status Hoist(Json* parameters, Json* root) {
  for (const char* member : {"$defs", "definitions"}) {
    if (!parameters->contains(member)) continue;
    for (const auto& [name, schema] : (*parameters)[member].items()) {
      Json& there = (*root)[member][name];
      if (!there.is_null() && there != schema) {
        return FieldError("tools", absl::StrCat("two tools define ", member, " '", name,
                                                "' differently, and calls must fit them"));
      }
      there = schema;
    }
    parameters->erase(member);
  }
  return absl::OkStatus();
}

// Calls of the tools, each an alternative. Their definitions go to `root`, of the schema around them.
absl::StatusOr<Json> Kinds(const std::vector<Tool>& tools, const char* arguments, Json* root) {
  Json kinds = Json::array();
  for (const Tool& tool : tools) {
    Json parameters = tool.parameters;
    LK_RETURN_IF_ERROR(Hoist(&parameters, root));
    kinds.push_back(
        {{"type", "object"},
         {"properties", {{"name", {{"const", tool.name}}}, {arguments, std::move(parameters)}}},
         {"required", {"name", arguments}},
         {"additionalProperties", false}});
  }
  return kinds;
}

absl::StatusOr<GrammarSource> CallsOf(const std::vector<Tool>& tools, bool one_call) {
  Json root = {{"type", "array"}, {"minItems", 1}};
  if (one_call) root["maxItems"] = 1;
  LK_ASSIGN_OR_RETURN(Json kinds, Kinds(tools, "arguments", &root));
  root["items"] = {{"anyOf", std::move(kinds)}};
  return GrammarSource{GrammarSource::Kind::kJsonSchema, Dump(root)};
}

// Text with calls as the template's style writes them, arguments of strict tools as their schemas
// say. In kWhole's calls templates say "arguments" or "parameters".
absl::StatusOr<GrammarSource> TextOrCalls(std::vector<Tool> tools, ToolStyle style) {
  for (Tool& tool : tools) {
    if (!tool.strict) tool.parameters = {{"type", "object"}};
  }
  Json root = Json::object();
  LK_ASSIGN_OR_RETURN(Json kinds, Kinds(tools, "arguments", &root));
  if (style == ToolStyle::kTagged) {
    const std::string opened(kOpen), closed(kClose);
    root["anyOf"] = std::move(kinds);
    return GrammarSource{GrammarSource::Kind::kLark,
                         absl::StrCat("start: call* rest\n"
                                      "call: open SPACE? %json ", Dump(root), " SPACE? \"", closed,
                                      "\"\n"
                                      "open[lazy]: /(.|\\n)*", opened, "/\n"
                                      "rest: /(.|\\n)*/\n"
                                      "SPACE: /[ \\t\\r\\n]+/\n")};
  }
  LK_ASSIGN_OR_RETURN(const Json others, Kinds(tools, "parameters", &root));
  kinds.insert(kinds.end(), others.begin(), others.end());
  root["anyOf"] = kinds;
  root["anyOf"].push_back({{"type", "array"}, {"minItems", 1}, {"items", {{"anyOf", kinds}}}});
  return GrammarSource{GrammarSource::Kind::kLark,
                       absl::StrCat("start: SPACE? (text | %json ", Dump(root), ")\n"
                                    "text: /([^ \\t\\r\\n\\[{](.|\\n)*)?/\n"
                                    "SPACE: /[ \\t\\r\\n]+/\n")};
}

// The size of the longest end of `text` that `tag` or white space before it may begin with.
size_t HeldBack(std::string_view text, std::string_view tag) {
  size_t tail = std::min(text.size(), tag.size() - 1);
  while (tail > 0 && !tag.starts_with(text.substr(text.size() - tail))) --tail;
  const size_t last = text.substr(0, text.size() - tail).find_last_not_of(kSpace);
  return text.size() - (last == std::string_view::npos ? 0 : last + 1);
}

absl::Status Force(const std::vector<Tool>& tools, const std::string& choice, bool named,
                   ToolOptions* options) {
  std::vector<Tool> callable = tools;
  if (named) {
    std::erase_if(callable, [&](const Tool& tool) { return tool.name != choice; });
    options->one_call = true;
  }
  if (callable.empty()) {
    return FieldError("tool_choice", named ? absl::StrCat("'", choice, "' is none of the tools")
                                           : "a call is required, and there are no tools");
  }
  options->style = ToolStyle::kWhole;
  LK_ASSIGN_OR_RETURN(options->grammar, CallsOf(callable, options->one_call));
  return absl::OkStatus();
}

}  // namespace

ToolOptions ReadTools(Fields& fields, ToolStyle style) {
  ToolOptions options;
  const Json* definitions = fields.Take("tools");
  const Json* wanted = fields.Take("tool_choice");
  bool parallel = true, named = false;
  fields.Read("parallel_tool_calls", &parallel);
  const auto tools = ReadDefinitions(definitions != nullptr ? *definitions : Json::array());
  fields.Note(tools.status());
  if (!tools.ok()) return options;
  const auto choice = ReadChoice(wanted, !tools->empty(), &named);
  fields.Note(choice.status());
  if (!choice.ok() || *choice == "none") return options;
  options.one_call = !parallel;
  const bool forced = named || *choice == "required";
  if (forced) fields.Note(Force(*tools, *choice, named, &options));
  if (tools->empty()) return options;
  if (style == ToolStyle::kNone) {
    fields.Note(FieldError("tools", "the model's chat template has no place for them"));
  }
  for (const Tool& tool : *tools) options.names.push_back(tool.name);
  if (!forced && std::ranges::any_of(*tools, &Tool::strict)) {
    auto grammar = TextOrCalls(*tools, style);
    fields.Note(grammar.status());
    if (grammar.ok()) options.grammar = *std::move(grammar);
  }
  options.definitions_json = Dump(*definitions);
  if (!forced) options.style = style;
  return options;
}

ToolCallFinder::Found ToolCallFinder::Append(std::string_view text) {
  Found found;
  held_ += text;
  if (options_->style == ToolStyle::kTagged) {
    TakeTagged(&found);
  } else {
    TakeWhole(&found);
  }
  return found;
}

ToolCallFinder::Found ToolCallFinder::Finish() {
  Found found;
  if (options_->style != ToolStyle::kWhole || text_only_ || !TakeCalls(held_, &found)) {
    found.text = held_;
  }
  // White space behind a call is no text.
  if (calls_ > 0 && found.text.find_first_not_of(kSpace) == std::string::npos) found.text.clear();
  held_.clear();
  return found;
}

void ToolCallFinder::TakeTagged(Found* found) {
  while (true) {
    const size_t open = held_.find(kOpen);
    if (open == std::string::npos) break;
    const size_t inside = open + kOpen.size(), close = held_.find(kClose, inside);
    if (close == std::string::npos) {
      const size_t last = held_.substr(0, open).find_last_not_of(kSpace);
      const size_t sure = last == std::string::npos ? 0 : last + 1;
      found->text += held_.substr(0, sure);
      held_.erase(0, sure);
      return;
    }
    const std::string before = held_.substr(0, open);
    const std::string body = held_.substr(inside, close - inside);
    if (TakeCalls(body, found)) {
      found->text += before.substr(0, before.find_last_not_of(kSpace) + 1);
    } else {
      found->text += held_.substr(0, close + kClose.size());
    }
    held_.erase(0, close + kClose.size());
  }
  const size_t sure = held_.size() - HeldBack(held_, kOpen);
  found->text += held_.substr(0, sure);
  held_.erase(0, sure);
}

// An answer that begins with a bracket is a call once it is whole.
void ToolCallFinder::TakeWhole(Found* found) {
  const size_t first = held_.find_first_not_of(kSpace);
  if (first == std::string::npos) return;
  text_only_ = text_only_ || (held_[first] != '{' && held_[first] != '[');
  if (text_only_) found->text = std::exchange(held_, {});
}

// False, and nothing is taken, unless it is one call or several.
bool ToolCallFinder::TakeCalls(std::string_view json, Found* found) {
  const absl::StatusOr<Json> parsed = ParseOrderedJson(json);
  if (!parsed.ok()) return false;
  const Json several = parsed->is_array() ? *parsed : Json::array({*parsed});
  std::vector<ToolCall> calls;
  for (const Json& call : several) {
    if (!call.is_object() || !call.contains("name") || !call["name"].is_string()) return false;
    const char* field = call.contains("arguments") ? "arguments" : "parameters";
    if (!call.contains(field)) return false;
    const Json& arguments = call[field];
    calls.push_back({call["name"].get<std::string>(), arguments.is_string()
                                                          ? arguments.get<std::string>()
                                                          : Dump(arguments)});
    if (std::ranges::count(options_->names, calls.back().name) == 0) return false;
  }
  for (ToolCall& call : calls) {
    if (options_->one_call && calls_ > 0) break;
    found->calls.push_back(std::move(call));
    ++calls_;
  }
  return !calls.empty();
}

}  // namespace lorikeet
