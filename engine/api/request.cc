#include "engine/api/request.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace lorikeet {
namespace {

absl::Status OutOfRange(const char* field, double value, const char* bound) {
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", value, "; it must be ", bound));
}

// Comparisons are written so that a NaN fails them.
bool Within(float value, float low, float high) { return value >= low && value <= high; }

}  // namespace

absl::Status ValidateSampling(const SamplingParams& p) {
  if (!(p.temperature >= 0.0f) || std::isinf(p.temperature)) {
    return OutOfRange("temperature", p.temperature, "finite and at least 0");
  }
  if (!(p.top_p > 0.0f && p.top_p <= 1.0f)) {
    return OutOfRange("top_p", p.top_p, "more than 0 and at most 1");
  }
  if (p.top_k < 0) return OutOfRange("top_k", p.top_k, "at least 0 (0: off)");
  if (!Within(p.min_p, 0.0f, 1.0f)) return OutOfRange("min_p", p.min_p, "between 0 and 1");
  if (!(p.repetition_penalty > 0.0f) || std::isinf(p.repetition_penalty)) {
    return OutOfRange("repetition_penalty", p.repetition_penalty, "finite and more than 0");
  }
  if (!Within(p.presence_penalty, -2.0f, 2.0f)) {
    return OutOfRange("presence_penalty", p.presence_penalty, "between -2 and 2");
  }
  if (!Within(p.frequency_penalty, -2.0f, 2.0f)) {
    return OutOfRange("frequency_penalty", p.frequency_penalty, "between -2 and 2");
  }
  if (p.top_logprobs < -1 || p.top_logprobs > Limits::kMaxTopLogprobs) {
    return absl::InvalidArgumentError(absl::StrCat("top_logprobs is ", p.top_logprobs,
                                                   "; it must be between 0 and ",
                                                   Limits::kMaxTopLogprobs, ", or -1 for none"));
  }
  for (const auto& [id, bias] : p.logit_bias) {
    if (!Within(bias, -100.0f, 100.0f)) {
      return OutOfRange(absl::StrCat("logit_bias[", id, "]").c_str(), bias,
                        "between -100 and 100");
    }
  }
  if (p.logit_bias.size() > Limits::kMaxLogitBiases) {
    return absl::InvalidArgumentError(absl::StrCat("logit_bias: ", p.logit_bias.size(),
                                                   " tokens; at most ", Limits::kMaxLogitBiases));
  }
  if (p.min_tokens < 0) return OutOfRange("min_tokens", p.min_tokens, "at least 0");
  size_t bad_tokens = 0;
  for (const std::vector<int32_t>& word : p.bad_words) {
    if (word.empty()) return absl::InvalidArgumentError("bad_words: one has no tokens");
    bad_tokens += word.size();
  }
  if (bad_tokens > Limits::kMaxBadWords) {
    return absl::InvalidArgumentError(
        absl::StrCat("bad_words: ", bad_tokens, " tokens; at most ", Limits::kMaxBadWords));
  }
  return absl::OkStatus();
}

}  // namespace lorikeet
