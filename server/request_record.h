// What is known of one generation request while it is served, for metrics, logs and traces.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "server/tracing/trace_context.h"

namespace lorikeet {

// Times are microseconds on the engine's clock, 0 where the request has not come so far.
struct RequestRecord {
  std::string id;      // RequestOrigin's
  TraceContext trace;
  std::string adapter;          // as the client named it; empty: the base model
  bool sum = false;             // of several adapters, whose names `adapter` joins with "+"
  std::string tenant;           // empty: the server has no keys
  std::string adapter_version;  // empty: the base model, or not known yet

  int64_t arrival_us = 0;
  int64_t adapter_read_us = 0;  // a duration: how long it waited for host memory to have its adapter
  int64_t submitted_us = 0;     // to the engine
  int64_t adapter_copy_us = 0;  // a duration, after that: how long it waited for the device
  int64_t admitted_us = 0;      // the first step that it was in was planned
  int64_t first_token_us = 0;
  int64_t end_us = 0;

  int32_t prompt_tokens = 0;      // once, however many choices
  int32_t cached_tokens = 0;      // of them, computed by earlier requests
  int32_t completion_tokens = 0;  // of all choices
  absl::Status status;            // of the whole
};

}  // namespace lorikeet
