#include "server/text/chat_template.h"

#include <utility>

#include "engine/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "server/text/rust/lorikeet_text.h"
#include "server/text/rust_bytes.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

LkVariable Variable(std::string_view name, std::string_view json) {
  return {rust::Data(name), name.size(), rust::Data(json), json.size()};
}

std::string_view Or(std::string_view text, std::string_view if_empty) {
  return text.empty() ? if_empty : text;
}

ToolStyle ToolStyleOf(const std::string& source) {
  if (source.find("tools") == std::string::npos) return ToolStyle::kNone;
  const bool tagged = source.find("<tool_call>") != std::string::npos;
  return tagged ? ToolStyle::kTagged : ToolStyle::kWhole;
}

}  // namespace

std::string MessagesJson(std::span<const ChatMessage> messages) {
  Json array = Json::array();
  for (const ChatMessage& message : messages) {
    array.push_back({{"role", message.role}, {"content", message.content}});
  }
  return array.dump(-1, ' ', false, Json::error_handler_t::replace);
}

void ChatTemplate::Free::operator()(LkChatTemplate* chat_template) const {
  lk_chat_template_free(chat_template);
}

absl::StatusOr<ChatTemplate::Handle> ChatTemplate::Compile(std::string_view source) {
  LkChatTemplate* compiled = nullptr;
  LkBytes error;
  if (!lk_chat_template_create(rust::Data(source), source.size(), &compiled, &error)) {
    return absl::InvalidArgumentError(rust::TakeString(error));
  }
  return Handle(compiled);
}

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Create(const ChatTemplateSource& source,
                                                                   const NamedTokens& named) {
  if (source.text.empty()) return absl::InvalidArgumentError("the model has no chat template");
  std::unique_ptr<ChatTemplate> chat(new ChatTemplate());
  LK_ASSIGN_OR_RETURN(chat->text_, Compile(source.text));
  if (!source.with_tools.empty()) {
    LK_ASSIGN_OR_RETURN(chat->with_tools_, Compile(source.with_tools));
  }
  chat->tool_style_ = ToolStyleOf(source.with_tools.empty() ? source.text : source.with_tools);
  Json tokens = Json::object();
  const auto add = [&](const char* name, const std::optional<NamedToken>& token) {
    if (token) tokens[name] = token->text;
  };
  add("bos_token", named.bos);
  add("eos_token", named.eos);
  add("unk_token", named.unk);
  add("pad_token", named.pad);
  chat->named_tokens_json_ = tokens.dump(-1, ' ', false, Json::error_handler_t::replace);
  return chat;
}

absl::StatusOr<std::string> ChatTemplate::Render(const ChatRequest& request) const {
  const std::string_view tools = Or(request.tools_json, "null");
  const std::string_view variables = Or(request.variables_json, "{}");
  const LkVariable all[] = {
      Variable("", named_tokens_json_),
      Variable("", variables),
      Variable("messages", request.messages_json),
      Variable("tools", tools),
      Variable("documents", "null"),
      Variable("add_generation_prompt", request.add_generation_prompt ? "true" : "false"),
  };
  const bool own_for_tools = with_tools_ != nullptr && tools != "null";
  LkBytes text;
  LkBytes error;
  if (!lk_chat_template_render((own_for_tools ? with_tools_ : text_).get(), all, std::size(all),
                               request.now_unix_s, &text, &error)) {
    return absl::InvalidArgumentError(rust::TakeString(error));
  }
  return rust::TakeString(text);
}

}  // namespace lorikeet
