// Every Prometheus metric of the server. Names starting with lorikeet_ are ours; those starting
// with vllm: are what routers read: gateway_metrics.h.
//
// Thread-safe. OnStep costs a few microseconds on the engine thread and never waits for a scrape
// longer than one observation.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "adapters_cache/registry.h"
#include "engine/api/step_stats.h"
#include "engine/image_ledger.h"
#include "engine/memory/memory_use.h"
#include "server/gateway_metrics.h"
#include "server/request_record.h"
#include "server/tracing/span_counts.h"

namespace lorikeet {

struct MetricsOptions {
  bool vllm = true;             // routers' names as well
  int32_t named_adapters = 100;  // and tenants with series of their own; the rest are "other"
};

class Metrics final : public StatsSink {
 public:
  explicit Metrics(const MetricsOptions& options);
  ~Metrics() override;

  void OnStep(const StepStats& stats) override;

  // A generation request, in this order. What ends before it was accepted comes to the last alone.
  void OnRequestStart(const RequestRecord& request);
  void OnPrompt(const RequestRecord& request);      // the engine has it
  void OnFirstToken(const RequestRecord& request);  // of all its choices
  void OnNextToken(int64_t since_previous_us);      // of one choice
  void OnRequestDone(const RequestRecord& request);

  void OnAdapterLoad(const absl::Status& outcome, int64_t took_us);

  // What is read when Prometheus asks.
  struct Current {
    ServerState state;
    RegistryStats adapters;
    ImageCounts images;
    int64_t decode_waits = 0;  // Engine::Gauges
    MemoryUse device_memory;
    int64_t weight_bytes = 0;  // that every step reads
    SpanCounts spans;
    double bandwidth = 0;      // bytes a second of the memory they are in; 0: not known
    std::function<bool(const std::string&)> gone;  // no adapter has that name
  };
  // The exposition format, version 0.0.4.
  std::string Text(Current current);

 private:
  struct Families;
  void StopWaiting(const RequestRecord& request);
  void SetRegistry(const RegistryStats& stats);
  void SetImages(const ImageCounts& images);

  std::unique_ptr<Families> families_;
};

// "ok", "not_found", ...: the status code as a label value.
std::string OutcomeLabel(const absl::Status& status);

}  // namespace lorikeet
