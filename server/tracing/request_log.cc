#include "server/tracing/request_log.h"

#include <chrono>
#include <utility>

#include "absl/strings/escaping.h"
#include "server/log.h"
#include "server/random.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

std::string RandomId(int bytes) { return absl::HexStringToBytes(RandomHex(2 * bytes)); }

// The server's own failures; what clients do wrong is their business.
LogLevel LevelOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnavailable:
      return LogLevel::kWarning;
    default:
      return LogLevel::kInfo;
  }
}

Json FieldsOf(const RequestRecord& record) {
  Json fields = {{"request_id", record.id}};
  if (record.trace.traced()) {
    fields["trace_id"] = HexOf(record.trace.trace_id);
    fields["span_id"] = HexOf(record.trace.span_id);
  }
  if (!record.tenant.empty()) fields["tenant"] = record.tenant;
  if (!record.adapter.empty()) fields["adapter"] = record.adapter;
  if (!record.adapter_version.empty()) fields["adapter_version"] = record.adapter_version;
  fields["status"] = absl::StatusCodeToString(record.status.code());
  if (!record.status.ok()) fields["error"] = record.status.message();
  fields["prompt_tokens"] = record.prompt_tokens;
  fields["cached_tokens"] = record.cached_tokens;
  fields["completion_tokens"] = record.completion_tokens;
  const auto duration = [&](const char* name, int64_t us) {
    if (us > 0) fields[name] = static_cast<double>(us) / 1000;
  };
  duration("adapter_read_ms", record.adapter_read_us);
  duration("adapter_copy_ms", record.adapter_copy_us);
  if (record.admitted_us > 0) duration("queue_ms", record.admitted_us - record.submitted_us);
  if (record.first_token_us > 0) {
    duration("first_token_ms", record.first_token_us - record.arrival_us);
  }
  duration("duration_ms", record.end_us - record.arrival_us);
  return fields;
}

struct Part {
  const char* name;
  int64_t begin_us;
  int64_t end_us;
};

std::vector<Part> PartsOf(const RequestRecord& r) {
  std::vector<Part> parts;
  const auto add = [&](const char* name, int64_t begin_us, int64_t end_us) {
    if (begin_us > 0 && end_us >= begin_us) parts.push_back({name, begin_us, end_us});
  };
  if (r.adapter_read_us > 0) add("adapter.read", r.arrival_us, r.arrival_us + r.adapter_read_us);
  if (r.submitted_us == 0) return parts;
  const int64_t admitted_us = r.admitted_us > 0 ? r.admitted_us : r.end_us;
  add("queue", r.submitted_us, admitted_us);
  if (r.adapter_copy_us > 0) {
    add("adapter.copy", r.submitted_us, std::min(admitted_us, r.submitted_us + r.adapter_copy_us));
  }
  const int64_t first_us = r.first_token_us > 0 ? r.first_token_us : r.end_us;
  if (r.admitted_us > 0) add("prefill", r.admitted_us, first_us);
  if (r.first_token_us > 0) add("decode", r.first_token_us, r.end_us);
  return parts;
}

// Names after OpenTelemetry's conventions for generative AI where there are any.
void Describe(const RequestRecord& record, OtlpSpan* span) {
  SetAttribute("gen_ai.operation.name", "text_completion", span);
  SetAttribute("lorikeet.request.id", record.id, span);
  if (!record.adapter.empty()) {
    SetAttribute("lorikeet.adapter", record.adapter, span);
    SetAttribute("lorikeet.adapter.version", record.adapter_version, span);
  }
  if (!record.tenant.empty()) SetAttribute("lorikeet.tenant", record.tenant, span);
  SetAttribute("gen_ai.usage.input_tokens", record.prompt_tokens, span);
  SetAttribute("gen_ai.usage.output_tokens", record.completion_tokens, span);
  SetAttribute("lorikeet.cached_tokens", record.cached_tokens, span);
  if (record.status.ok()) return;
  SetAttribute("error.type", absl::StatusCodeToString(record.status.code()), span);
  span->mutable_status()->set_code(opentelemetry::proto::trace::v1::Status::STATUS_CODE_ERROR);
  span->mutable_status()->set_message(std::string(record.status.message()));
}

}  // namespace

std::vector<OtlpSpan> SpansOf(const RequestRecord& record, int64_t unix_us) {
  const auto make = [&](const char* name, int64_t begin_us, int64_t end_us) {
    OtlpSpan span;
    span.set_trace_id(record.trace.trace_id);
    span.set_name(name);
    span.set_start_time_unix_nano(static_cast<uint64_t>(unix_us + begin_us) * 1000);
    span.set_end_time_unix_nano(static_cast<uint64_t>(unix_us + end_us) * 1000);
    return span;
  };
  std::vector<OtlpSpan> spans;
  OtlpSpan& whole = spans.emplace_back(make("generate", record.arrival_us, record.end_us));
  whole.set_kind(OtlpSpan::SPAN_KIND_SERVER);
  whole.set_span_id(record.trace.span_id);
  whole.set_parent_span_id(record.trace.parent_span_id);
  Describe(record, &whole);
  for (const Part& part : PartsOf(record)) {
    OtlpSpan& span = spans.emplace_back(make(part.name, part.begin_us, part.end_us));
    span.set_kind(OtlpSpan::SPAN_KIND_INTERNAL);
    span.set_span_id(RandomId(8));
    span.set_parent_span_id(record.trace.span_id);
  }
  return spans;
}

void RequestLog::Begin(const RequestOrigin& origin, RequestRecord* record) const {
  record->id = origin.id;
  if (exporter_ == nullptr) return;
  const absl::StatusOr<Traceparent> parent = ParseTraceparent(origin.traceparent);
  const bool wanted =
      parent.ok() ? parent->sampled
                  : RandomSeed() % 100 < static_cast<uint64_t>(trace_percent_);
  if (!wanted) return;
  record->trace = {.trace_id = parent.ok() ? parent->trace_id : RandomId(16),
                   .span_id = RandomId(8),
                   .parent_span_id = parent.ok() ? parent->span_id : ""};
}

void RequestLog::End(const RequestRecord& record) const {
  const LogLevel level = LevelOf(record.status);
  if (level >= CurrentLogLevel()) Log(level, "request", FieldsOf(record));
  if (!record.trace.traced()) return;
  const int64_t unix_us = std::chrono::duration_cast<std::chrono::microseconds>(
                              std::chrono::system_clock::now().time_since_epoch())
                              .count() -
                          clock_->NowMicros();
  exporter_->Add(SpansOf(record, unix_us));
}

}  // namespace lorikeet
