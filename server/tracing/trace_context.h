// Which trace a request belongs to, as W3C Trace Context (level 1) hands it on.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace lorikeet {

struct TraceContext {
  std::string trace_id;        // 16 bytes; empty: the request is not traced
  std::string span_id;         // 8 bytes: the request's own span
  std::string parent_span_id;  // 8 bytes, or empty: the trace begins here

  bool traced() const { return !trace_id.empty(); }
};

struct Traceparent {
  std::string trace_id;  // 16 bytes
  std::string span_id;   // 8 bytes
  bool sampled = false;
};

// The header `traceparent`. INVALID_ARGUMENT: it is none, and must be treated as absent.
absl::StatusOr<Traceparent> ParseTraceparent(std::string_view header);

std::string HexOf(const std::string& bytes);  // lower case

}  // namespace lorikeet
