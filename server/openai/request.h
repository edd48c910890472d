// The bodies of /v1/completions, /v1/chat/completions and /v1/embeddings, and vLLM's additions to
// them.
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

struct EmbeddingRequest {
  std::vector<GenerationInput> inputs;
  std::string model;       // as the client named it
  int32_t dimensions = 0;  // the first so many
  bool base64 = false;     // little-endian float32 instead of numbers
};

// INVALID_ARGUMENT names the field, the value and the bound, and a field that is not supported.
absl::StatusOr<OpenAiRequest> ParseCompletion(const Json& body);
// `style`: how the model writes its calls of tools.
absl::StatusOr<OpenAiRequest> ParseChat(const Json& body, ToolStyle style);

// `hidden_size`: the most dimensions.
absl::StatusOr<EmbeddingRequest> ParseEmbedding(const Json& body, int32_t hidden_size);

// A message of the shared checks, which speak of the fields of lorikeet.v1, in OpenAI's words.
// `prompt`: the field that the prompt came from.
absl::Status InOpenAiNames(const absl::Status& status, const std::string& prompt);

// The messages of a conversation in the shape that chat templates take: content as text, arguments
// of tool calls as objects.
absl::StatusOr<std::string> TemplateMessages(const Json& messages);

}  // namespace lorikeet
