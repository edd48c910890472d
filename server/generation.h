// From a front's request to the engine and from token events to text: everything gRPC and HTTP have
// in common. A front fills a GenerationInput, starts a GenerationCall and turns the deltas it polls
// into its own messages.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/mixer.h"
#include "engine/api/adapter_store.h"
#include "engine/api/request.h"
#include "engine/api/token_event.h"
#include "engine/base/clock.h"
#include "engine/engine.h"
#include "server/auth/access.h"
#include "server/metrics.h"
#include "server/request_origin.h"
#include "server/request_record.h"
#include "server/text/model_text.h"
#include "server/tracing/request_log.h"

namespace lorikeet {

// What a front serves with. Everything pointed to outlives every call.
struct ServingContext {
  ModelText text;  // the base model's
  Engine* engine = nullptr;
  Access* access = nullptr;
  const AdapterStore* adapters = nullptr;
  AdapterMixer* mixer = nullptr;  // of `adapters`
  const Clock* clock = nullptr;                 // the engine's
  Metrics* metrics = nullptr;
  const RequestLog* request_log = nullptr;
  std::string model_name;
  int64_t started_unix_s = 0;
  int32_t hidden_size = 0;  // values of an embedding
  int32_t max_context_tokens = 0;
};

struct GenerationInput {
  RequestOrigin origin;
  // Plain text, a conversation (whose time is filled in), or token ids.
  std::variant<std::string, ChatRequest, std::vector<int32_t>> prompt;
  std::string model;        // as ResolveModel (generation_request.h) takes it; empty: the base
  std::vector<WeightedAdapter> adapters;  // their weighted sum, instead of `model`
  SamplingParams sampling;  // prompt_logprobs is set from the field below
  // Log-probabilities of the prompt's tokens, and of so many alternatives.
  std::optional<int32_t> prompt_logprobs;
  std::vector<std::string> bad_words;    // texts that do not occur in the answer
  std::optional<GrammarSource> grammar;  // what the answer looks like
  std::string grammar_field = "form";    // where the client said so, for messages
  std::optional<int32_t> max_tokens;  // absent: what the context has room for
  std::string max_tokens_field = "stop.max_tokens";  // as grammar_field
  std::vector<std::string> stop_strings;
  bool include_stop_string = false;  // in the text
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  bool echo = false;
  std::string cache_salt;  // Request::cache_salt
  bool skip_prefix_cache = false;
  std::optional<Pooling> pooling;  // an embedding of the prompt instead of an answer
  int32_t choices = 1;  // answers; choice i takes the seed + i
  int32_t best_of = 0;  // more than `choices`: that many are made, and the most likely are given
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
  bool eos = false;  // stop_token is one of the model's own
  std::optional<std::string> stop_string;
  int32_t prompt_tokens = 0;
  int32_t cached_tokens = 0;  // of the prompt, computed by earlier requests
  int32_t completion_tokens = 0;
  std::string adapter_version;  // empty: base model
  int64_t adapter_read_us = 0;  // waited for the adapter to be read into host memory
  int64_t adapter_copy_us = 0;  // and to be copied to the device
  std::shared_ptr<const Embedding> embedding;  // of a request with `pooling`
};

// What is new of one choice since it was polled before.
struct GenerationDelta {
  int32_t choice = 0;  // in [0, GenerationInput::choices)
  const Tokenizer* tokenizer = nullptr;  // of its tokens; lives as long as the call
  std::optional<PromptEcho> prompt;
  std::vector<int32_t> tokens;
  std::string text;
  std::vector<TokenLogprobs> logprobs;  // [tokens] if asked for
  std::optional<GenerationEnd> end;     // nothing of this choice follows
  bool last = false;                    // nothing at all follows

  bool empty() const { return !prompt && tokens.empty() && text.empty() && !end; }
  void Append(GenerationDelta next);  // of the same choice
};

class Choice;

// One request under way. Poll and Cancel are for one thread at a time. Dropping an unfinished call
// cancels it.
class GenerationCall {
 public:
  // Validates, tokenises and submits, at once or, if the adapter is not in host memory, in the Poll
  // after it came and the thread that brought it tokenised. `wake` is called on the engine thread or
  // a loader's, possibly before Start returns, whenever Poll has something new: it must not block.
  // Errors name the field, the value and the bound, and are counted.
  static absl::StatusOr<std::unique_ptr<GenerationCall>> Start(const ServingContext& context,
                                                               const Identity& caller,
                                                               GenerationInput input,
                                                               std::function<void()> wake);
  ~GenerationCall();

  // Something of one choice; empty() when there is nothing new of any. The first choice that fails
  // is the last delta. After `last` nothing more comes.
  GenerationDelta Poll();

  // Stops the work; Poll then ends with CANCELLED, unless it ended before.
  void Cancel();

 private:
  struct Built;
  struct Building;
  struct Prepared;  // a request that is not submitted yet

  explicit GenerationCall(const ServingContext& context);

  absl::Status Prepare(const Identity& caller, GenerationInput input, std::function<void()> wake);
  static absl::StatusOr<Built> Build(const ServingContext& context, Building& building,
                                     AdapterLease lease);
  static absl::StatusOr<Built> BuildLeased(const ServingContext& context, Building& building,
                                           absl::StatusOr<AdapterLease> lease);
  void AskForAdapter();
  absl::Status SubmitIfReady();
  GenerationDelta Fail(const absl::Status& status);
  GenerationDelta PollStreaming();
  GenerationDelta PollBest();
  void RankBest();

  void Done(const absl::Status& status);

  const ServingContext& context_;
  RequestRecord record_;
  std::unique_ptr<Prepared> prepared_;  // until it is submitted
  std::vector<std::unique_ptr<Choice>> choices_;
  size_t next_ = 0;  // to poll
  size_t open_ = 0;  // choices that have not ended

  // With best_of: every choice as a whole, then those to give, best first.
  int32_t wanted_ = 0;
  bool logprobs_wanted_ = false;
  bool best_ = false;
  std::vector<GenerationDelta> whole_;
  bool done_ = false;
};

}  // namespace lorikeet
