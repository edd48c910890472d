// Chat messages to a prompt, by the model's own Jinja template.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/text/tokenizer.h"

struct LkChatTemplate;  // server/text/rust/lorikeet_text.h

namespace lorikeet {

struct ChatMessage {
  std::string role;
  std::string content;
};

// A JSON array of {"role", "content"}. REQUIRES: valid UTF-8 (ValidateUtf8 at the door).
std::string MessagesJson(std::span<const ChatMessage> messages);

struct ChatRequest {
  std::string messages_json;          // array of objects, OpenAI's shape
  std::string tools_json = {};        // array of tool schemas; empty: no tools
  std::string variables_json = {};    // object: further variables of the template; empty: none
  bool add_generation_prompt = true;  // end with the beginning of the assistant's answer
  int64_t now_unix_s = 0;             // what strftime_now tells, in the local time zone
};

// How a model that was trained with a template writes its calls of tools.
enum class ToolStyle : uint8_t {
  kNone,    // the template does not mention tools
  kTagged,  // Hermes, Qwen: <tool_call>{"name", "arguments"}</tool_call>, among text, any number
  kWhole,   // Llama, Mistral: {"name", "parameters"}, or an array of such, as the whole answer
};

// Immutable and thread-safe. Renders what Transformers' apply_chat_template renders: its Jinja
// settings, raise_exception, tojson, strftime_now, loop controls, Python's string methods, and null
// members of messages dropped. Not the same: tuples are lists (it shows only where one is printed),
// and `~` writes true, false and none in lower case.
class ChatTemplate {
 public:
  // INVALID_ARGUMENT: the source does not compile, with the line.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Create(const ChatTemplateSource& source,
                                                              const NamedTokens& named);

  ToolStyle tool_style() const { return tool_style_; }

  // The prompt, to be encoded with add_special = false. INVALID_ARGUMENT: JSON that does not parse,
  // or messages that the template refuses (raise_exception), in its words.
  absl::StatusOr<std::string> Render(const ChatRequest& request) const;

 private:
  struct Free {
    void operator()(LkChatTemplate* chat_template) const;
  };
  using Handle = std::unique_ptr<LkChatTemplate, Free>;

  static absl::StatusOr<Handle> Compile(std::string_view source);

  ChatTemplate() = default;

  Handle text_;
  Handle with_tools_;  // null: text_ serves requests with tools too
  ToolStyle tool_style_ = ToolStyle::kNone;
  std::string named_tokens_json_;
};

}  // namespace lorikeet
