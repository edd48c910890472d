// What was generated, in the words of OpenAI's API.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/generation.h"
#include "server/openai/fields.h"
#include "server/openai/request.h"
#include "server/text/tokenizer.h"

namespace lorikeet {

// Writes the objects of one response. One thread at a time.
class OutputWriter {
 public:
  // `choices`: of the whole response.
  OutputWriter(OutputOptions options, int32_t choices);
  OutputWriter(const OutputWriter&) = delete;

  // Adds what a choice ended with to the usage.
  void Count(const GenerationEnd& end, bool first_of_prompt);

  // A choice as a whole; `index`: in the response.
  Json Whole(int32_t index, const GenerationDelta& delta);
  // The response around its choices.
  Json Response(Json choices) const;

  // Server-sent events of what is new of a choice, appended to `out`.
  void AppendEvents(int32_t index, const GenerationDelta& delta, std::string* out);
  // The last ones.
  void AppendEnd(std::string* out) const;

 private:
  // An event that holds nothing but text, cut where the text goes.
  struct TextEvent {
    std::string before, after;
  };

  // Whether nothing but the text of the delta is to be told.
  bool IsText(int32_t index, const GenerationDelta& delta) const;
  const TextEvent& TextEventOf(int32_t index);
  ToolCallFinder::Found TextAndCalls(int32_t index, const GenerationDelta& delta);
  Json FinishWord(int32_t index, const GenerationDelta& delta) const;
  Json Envelope(bool chunk) const;
  Json Usage() const;
  Json Logprobs(int32_t index, const GenerationDelta& delta);
  Json ChatLogprobs(const GenerationDelta& delta) const;
  Json CompletionLogprobs(int32_t index, const GenerationDelta& delta);
  Json PromptLogprobs(const PromptEcho& prompt) const;
  std::string TokenText(int32_t id) const;
  void AppendChunk(int32_t index, Json choice, std::string* out) const;

  const OutputOptions options_;
  const Tokenizer* tokenizer_ = nullptr;  // of the delta that is being written
  const std::string id_;
  const int64_t created_;
  std::string fingerprint_;         // of the weights that answer
  std::vector<size_t> text_offset_;  // [choices] for completions' log-probabilities
  std::vector<bool> begun_;          // [choices] the role was sent
  std::vector<TextEvent> text_events_;   // [choices] empty until one is needed
  std::vector<ToolCallFinder> finders_;  // [choices] if there are tools to call
  int64_t prompt_tokens_ = 0;
  int64_t cached_tokens_ = 0;
  int64_t completion_tokens_ = 0;
};

// "data: {...}\n\n".
void AppendEvent(const std::string& json, std::string* out);

}  // namespace lorikeet
