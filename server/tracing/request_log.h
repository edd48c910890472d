// Where requests are told of that have ended: a line in the log, and spans for the collector.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "engine/base/clock.h"
#include "server/request_origin.h"
#include "server/request_record.h"
#include "server/tracing/span_exporter.h"

namespace lorikeet {

// Thread-safe; waits for nobody.
class RequestLog {
 public:
  // `clock`: the records'. `exporter`: nullptr, nothing is traced. `trace_percent`: of the requests
  // that come without a trace of their own.
  RequestLog(const Clock* clock, SpanExporter* exporter, int32_t trace_percent)
      : clock_(clock), exporter_(exporter), trace_percent_(trace_percent) {}

  // Gives the record its id and, if it is to be traced, its place in a trace.
  void Begin(const RequestOrigin& origin, RequestRecord* record) const;
  void End(const RequestRecord& record) const;

 private:
  const Clock* const clock_;
  SpanExporter* const exporter_;
  const int32_t trace_percent_;
};

// The request as one span and what it waited for as spans below it: adapter.read (into host memory),
// queue, adapter.copy (onto the device, within the queue), prefill, decode. `unix_us`: the time at
// which the record's clock shows 0.
std::vector<OtlpSpan> SpansOf(const RequestRecord& record, int64_t unix_us);

}  // namespace lorikeet
