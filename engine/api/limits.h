// Every bound of the server, stated once and checked at the door.
#pragma once

#include <cstdint>

namespace lorikeet {

struct Limits {
  int32_t max_context_tokens = 0;      // prompt + generated; 0: the model's own context length
  int32_t max_batch_tokens = 256;      // rows of one step, prefill chunks included
  int32_t max_running_requests = 64;   // sequences that hold pages at the same time
  int32_t max_queued_requests = 1024;  // waiting behind them; one more is RESOURCE_EXHAUSTED

  static constexpr int32_t kMaxStopStrings = 16;
  static constexpr int32_t kMaxStopStringBytes = 256;
  static constexpr int32_t kMaxStopTokenIds = 64;
  static constexpr int32_t kMaxTopLogprobs = 20;
  static constexpr int32_t kMaxLogitBiases = 1024;
  static constexpr int32_t kMaxBadWords = 1024;  // and tokens of all of them
  static constexpr int32_t kMaxBadWordBytes = 256;
  static constexpr int32_t kMaxChoices = 64;  // of one call: n and best_of
  static constexpr int32_t kMaxEmbeddingInputs = 2048;  // of one call
  static constexpr int32_t kMaxCacheSaltBytes = 256;
  static constexpr int32_t kMaxAdapterRank = 4096;
  static constexpr int32_t kMaxExperts = 64;  // LoRAs of an adapter that deals tokens out among them
  static constexpr int32_t kMaxAddedTokens = 16384;  // of an adapter, to the base's vocabulary
  static constexpr int64_t kMaxAdapterFileBytes = int64_t{8} << 30;
  static constexpr int32_t kMaxRequestBytes = 16 << 20;
};

}  // namespace lorikeet
