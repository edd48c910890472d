// Stop strings over text that arrives in pieces.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace lorikeet {

// Passes text on up to the first stop string. A stop string is found where it ends first; of those
// that end at the same byte the longest counts. The outcome depends on the whole text alone, not on
// how it was cut into pieces. Text that may be the beginning of a stop string is held back until
// that is decided, so nothing passed on ever has to be taken back. Linear in the text and in the
// number of stop strings. Not thread-safe; one per stream.
class StopMatcher {
 public:
  // `include_stop`: whether the stop string itself is passed on. INVALID_ARGUMENT: an empty stop
  // string, or one that is not UTF-8. No stop strings at all is fine.
  static absl::StatusOr<StopMatcher> Create(std::vector<std::string> stops, bool include_stop);

  // Appends to *out what is safe to pass on; text after a stop is dropped. Returns stopped().
  bool Push(std::string_view text, std::string* out);
  // The end of the stream: what was held back is passed on, unless a stop string was found.
  void Finish(std::string* out);

  bool stopped() const { return matched_.has_value(); }
  // The stop string that was found; nullptr: none so far.
  const std::string* matched() const { return matched_ ? &stops_[*matched_].text : nullptr; }

 private:
  // A Knuth-Morris-Pratt matcher.
  struct Stop {
    std::string text;
    std::vector<size_t> border;  // [size + 1] longest proper prefix that also ends prefix i
    size_t matched = 0;          // bytes of `text` that the stream ends with
  };

  StopMatcher(std::vector<Stop> stops, bool include_stop)
      : stops_(std::move(stops)), include_stop_(include_stop) {}

  std::vector<Stop> stops_;
  bool include_stop_;
  std::string held_;  // the end of the stream, not passed on yet
  std::optional<size_t> matched_;
};

}  // namespace lorikeet
