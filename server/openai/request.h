// The bodies of /v1/completions and /v1/chat/completions, and vLLM's additions to them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/generation.h"
#include "server/openai/fields.h"
#include "server/openai/tools.h"

namespace lorikeet {

// How the answer is to be written.
struct OutputOptions {
  bool chat = false;
  bool stream = false;
  bool include_usage = false;        // in a stream
  bool echo = false;                 // of a completion: the text begins with the prompt's
  bool logprobs = false;
  bool prompt_logprobs = false;
  bool tokens_as_ids = false;        // in log-probabilities: "token_id:17"
  std::string model;                 // as the client named it
  std::string request_id;            // RequestOrigin's
  ToolOptions tools;                 // of a chat
};

struct OpenAiRequest {
  std::vector<GenerationInput> inputs;  // one a prompt
  OutputOptions output;
};

// INVALID_ARGUMENT names the field, the value and the bound, and a field that is not supported.
absl::StatusOr<OpenAiRequest> ParseCompletion(const Json& body);
// `style`: how the model writes its calls of tools.
absl::StatusOr<OpenAiRequest> ParseChat(const Json& body, ToolStyle style);

// The messages of a conversation in the shape that chat templates take: content as text, arguments
// of tool calls as objects.
absl::StatusOr<std::string> TemplateMessages(const Json& messages);

}  // namespace lorikeet
