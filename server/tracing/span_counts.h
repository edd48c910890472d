// What became of the spans of traces.
#pragma once

#include <cstdint>

namespace lorikeet {

struct SpanCounts {
  int64_t exported = 0;
  int64_t dropped = 0;  // the queue was full, or the collector did not take them
};

}  // namespace lorikeet
