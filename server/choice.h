// One answer under way: one engine request, its events turned into text.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "server/generation.h"
#include "server/request_record.h"
#include "server/text/detokenizer.h"
#include "server/text/stop_matcher.h"

namespace lorikeet {

// What the choices of a call have in common.
struct ChoiceOptions {
  RequestRecord* record = nullptr;         // of all choices, which is told what happens
  ModelText text;
  bool chat = false;                       // the answer is a text of its own
  int32_t top_logprobs = -1;               // of the answer's tokens; -1: none
  std::optional<int32_t> prompt_logprobs;  // the same of the prompt's
  std::optional<PromptEcho> echo;
  std::vector<std::string> stop_strings;
  bool include_stop_string = false;
};

// One thread at a time.
class Choice {
 public:
  // Submits `request`.
  static absl::StatusOr<std::unique_ptr<Choice>> Start(const ServingContext& context,
                                                       const ChoiceOptions& options,
                                                       Request request, std::function<void()> wake);
  ~Choice();  // cancels

  GenerationDelta Poll();
  void Cancel();
  bool ended() const { return ended_; }

 private:
  Choice(const ServingContext& context, const ChoiceOptions& options, const Request& request,
         StopMatcher stops, std::shared_ptr<TokenSink> sink);

  void NoteAdmission(const TokenEvent& event);
  void OnToken(TokenEvent& event, GenerationDelta* delta);
  void OnFinished(const TokenEvent& event, GenerationDelta* delta);
  void End(GenerationEnd end, GenerationDelta* delta);

  const ServingContext& context_;
  RequestRecord* const record_;
  const ModelText text_;
  const int32_t top_logprobs_;
  const int32_t prompt_top_logprobs_;
  std::optional<PromptEcho> echo_;  // until it is sent
  const std::string adapter_version_;
  const int32_t prompt_tokens_;
  const std::shared_ptr<const Embedding> embedding_;

  std::shared_ptr<TokenSink> sink_;
  RequestId id_ = 0;
  Detokenizer detokenizer_;
  StopMatcher stops_;
  int32_t cached_tokens_ = 0;
  int64_t adapter_copy_us_ = 0;
  int32_t completion_tokens_ = 0;
  int32_t last_token_ = -1;
  int64_t last_token_us_ = 0;
  bool ended_ = false;
};

}  // namespace lorikeet
