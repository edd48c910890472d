// From a front's request to the engine and from token events to text: everything gRPC and HTTP have
// in common. A front fills a GenerationInput, starts a GenerationCall and turns the deltas it polls
// into its own messages.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/api/adapter_store.h"
#include "engine/api/request.h"
#include "engine/api/token_event.h"
#include "engine/base/clock.h"
#include "engine/engine.h"
#include "server/metrics.h"
#include "server/text/chat_template.h"
#include "server/text/detokenizer.h"
#include "server/text/stop_matcher.h"
#include "server/text/tokenizer.h"

namespace lorikeet {

// What a front serves with. Everything pointed to outlives every call.
struct ServingContext {
  Engine* engine = nullptr;
  AdapterStore* adapters = nullptr;
  const Tokenizer* tokenizer = nullptr;
  const ChatTemplate* chat_template = nullptr;  // nullptr: the model has none
  const Clock* clock = nullptr;                 // the engine's
  Metrics* metrics = nullptr;
  std::string model_name;
  int32_t vocab_size = 0;
  int32_t max_context_tokens = 0;
};

struct GenerationInput {
  // Plain text, a conversation, or token ids.
  std::variant<std::string, std::vector<ChatMessage>, std::vector<int32_t>> prompt;
  std::string adapter;                // empty or the model's name: the base model
  SamplingParams sampling;            // prompt_logprobs is set from `echo`
  std::optional<int32_t> max_tokens;  // absent: what the context has room for
  std::vector<std::string> stop_strings;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  bool echo = false;
  std::string cache_salt;  // Request::cache_salt
  bool skip_prefix_cache = false;
  int64_t deadline_us = std::numeric_limits<int64_t>::max();  // on the context's clock
};

struct PromptEcho {
  std::vector<int32_t> tokens;
  std::string text;
  std::vector<TokenLogprobs> logprobs;  // of tokens 1, 2, ...; empty if not asked for
};

struct GenerationEnd {
  absl::Status status;  // not OK: the generation failed, and the rest is not set
  bool length = false;  // max_tokens or the context's end; else a stop
  std::optional<int32_t> stop_token;
  std::optional<std::string> stop_string;
  int32_t prompt_tokens = 0;
  int32_t cached_tokens = 0;  // of the prompt, computed by earlier requests
  int32_t completion_tokens = 0;
  std::string adapter_version;  // empty: base model
  int64_t adapter_read_us = 0;  // waited for the adapter to be read into host memory
};

// What is new since the previous poll.
struct GenerationDelta {
  std::optional<PromptEcho> prompt;
  std::vector<int32_t> tokens;
  std::string text;
  std::vector<TokenLogprobs> logprobs;  // [tokens] if asked for
  std::optional<GenerationEnd> end;     // nothing follows

  bool empty() const { return !prompt && tokens.empty() && text.empty() && !end; }
};

// One request under way. Poll and Cancel are for one thread at a time. Dropping an unfinished call
// cancels it.
class GenerationCall {
 public:
  // Validates, tokenises and submits, at once or, if the adapter is not in host memory, in the Poll
  // after it came. `wake` is called on the engine thread or a loader's, possibly before Start
  // returns, whenever Poll has something new: it must not block. Errors name the field, the value
  // and the bound, and are counted.
  static absl::StatusOr<std::unique_ptr<GenerationCall>> Start(const ServingContext& context,
                                                               GenerationInput input,
                                                               std::function<void()> wake);
  ~GenerationCall();

  // All that arrived; empty() if nothing. After `end` nothing more comes.
  GenerationDelta Poll();

  // Stops the work; Poll then ends with CANCELLED, unless it ended before.
  void Cancel();

 private:
  // A lease that another thread may bring.
  struct Lease {
    std::mutex mutex;
    std::optional<absl::StatusOr<AdapterLease>> lease;
    bool awaited = false;  // Start left without it
    int64_t arrived_us = 0;
  };

  GenerationCall(const ServingContext& context, int64_t arrival_us, const GenerationInput& input,
                 Request request, StopMatcher stops, std::function<void()> wake);

  void AskForAdapter();
  absl::Status SubmitIfReady();
  void OnToken(TokenEvent& event, GenerationDelta* delta);
  void OnFinished(const TokenEvent& event, GenerationDelta* delta);
  void End(GenerationEnd end, GenerationDelta* delta);

  const ServingContext& context_;
  const int64_t arrival_us_;
  const bool logprobs_;
  std::optional<PromptEcho> echo_;  // until it is sent
  const int32_t prompt_tokens_;
  const std::function<void()> wake_;
  std::optional<Request> request_;  // until it is submitted
  std::shared_ptr<Lease> lease_;    // until it is submitted; nullptr: base model
  bool canceled_ = false;           // before it was submitted
  std::string adapter_version_;
  int64_t adapter_read_us_ = 0;

  std::shared_ptr<TokenSink> sink_;
  RequestId id_ = 0;
  Detokenizer detokenizer_;
  StopMatcher stops_;
  int32_t cached_tokens_ = 0;
  int32_t completion_tokens_ = 0;
  int32_t last_token_ = -1;
  int64_t last_token_us_ = 0;
  bool ended_ = false;
};

}  // namespace lorikeet
