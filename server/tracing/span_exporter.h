// Sends spans to an OpenTelemetry collector (OTLP over gRPC), from a thread of its own. Whoever adds
// spans never waits: what the collector does not take in time is dropped and counted.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "opentelemetry/proto/collector/trace/v1/trace_service.grpc.pb.h"
#include "server/tracing/span_counts.h"

namespace lorikeet {

using OtlpSpan = opentelemetry::proto::trace::v1::Span;

// Sets an attribute of a span or a resource.
template <typename Message>
void SetAttribute(const std::string& key, const std::string& value, Message* message) {
  auto* attribute = message->add_attributes();
  attribute->set_key(key);
  attribute->mutable_value()->set_string_value(value);
}
template <typename Message>
void SetAttribute(const std::string& key, int64_t value, Message* message) {
  auto* attribute = message->add_attributes();
  attribute->set_key(key);
  attribute->mutable_value()->set_int_value(value);
}

// Thread-safe.
class SpanExporter {
 public:
  static constexpr size_t kMostQueued = 8192;  // spans; later ones are dropped
  static constexpr size_t kMostAtOnce = 512;

  // `endpoint`: HOST:PORT or http://HOST:PORT, in the clear, or https://HOST:PORT. INVALID_ARGUMENT
  // otherwise. It is connected to when there are spans, again and again.
  static absl::StatusOr<std::unique_ptr<SpanExporter>> Start(const std::string& endpoint);
  ~SpanExporter();  // gives what is queued two seconds to be taken

  void Add(std::vector<OtlpSpan> spans);
  SpanCounts counts() const;

 private:
  using Service = opentelemetry::proto::collector::trace::v1::TraceService;

  explicit SpanExporter(std::unique_ptr<Service::Stub> stub);
  void Run();
  bool Send(std::vector<OtlpSpan> spans, grpc::ClientContext* context);

  const std::unique_ptr<Service::Stub> stub_;
  mutable std::mutex mutex_;  // everything below
  std::condition_variable changed_;
  std::vector<OtlpSpan> queued_;
  SpanCounts counts_;
  bool stopping_ = false;
  bool done_ = false;                        // the thread is
  grpc::ClientContext* sending_ = nullptr;  // of the call under way
  std::thread thread_;
};

}  // namespace lorikeet
