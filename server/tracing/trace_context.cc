#include "server/tracing/trace_context.h"

#include <algorithm>

#include "absl/strings/escaping.h"

namespace lorikeet {
namespace {

// version "-" trace-id "-" parent-id "-" flags
constexpr size_t kVersionEnd = 2;
constexpr size_t kTraceEnd = kVersionEnd + 1 + 32;
constexpr size_t kSpanEnd = kTraceEnd + 1 + 16;
constexpr size_t kEnd = kSpanEnd + 1 + 2;

bool LowerHex(std::string_view text) {
  return std::ranges::all_of(text, [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  });
}

bool AllZero(std::string_view text) { return text.find_first_not_of('0') == text.npos; }

}  // namespace

absl::StatusOr<Traceparent> ParseTraceparent(std::string_view header) {
  const absl::Status none = absl::InvalidArgumentError("not a traceparent");
  if (header.size() < kEnd) return none;
  const std::string_view version = header.substr(0, kVersionEnd);
  const std::string_view trace = header.substr(kVersionEnd + 1, 32);
  const std::string_view span = header.substr(kTraceEnd + 1, 16);
  const std::string_view flags = header.substr(kSpanEnd + 1, 2);
  for (const size_t dash : {kVersionEnd, kTraceEnd, kSpanEnd}) {
    if (header[dash] != '-') return none;
  }
  for (const std::string_view part : {version, trace, span, flags}) {
    if (!LowerHex(part)) return none;
  }
  // Later versions may go on behind another dash.
  const bool whole = header.size() == kEnd || (version != "00" && header[kEnd] == '-');
  if (!whole || version == "ff" || AllZero(trace) || AllZero(span)) return none;
  const char low = flags[1];
  const int digit = low <= '9' ? low - '0' : low - 'a' + 10;
  return Traceparent{.trace_id = absl::HexStringToBytes(std::string(trace)),
                     .span_id = absl::HexStringToBytes(std::string(span)),
                     .sampled = (digit & 1) != 0};
}

std::string HexOf(const std::string& bytes) { return absl::BytesToHexString(bytes); }

}  // namespace lorikeet
