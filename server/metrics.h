// Every Prometheus metric of the server. Names starting with lorikeet_ are ours; those starting
// with vllm: are what the Gateway API Inference Extension's endpoint picker reads.
//
// Thread-safe. OnStep costs a few microseconds on the engine thread and never waits for a scrape
// longer than one observation.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "adapters_cache/registry.h"
#include "engine/api/step_stats.h"
#include "engine/image_ledger.h"

namespace lorikeet {

class Metrics final : public StatsSink {
 public:
  Metrics();
  ~Metrics() override;

  void OnStep(const StepStats& stats) override;

  // One finished generation request. `outcome`: its status; OK counts as "ok".
  void OnRequestDone(const absl::Status& outcome);
  void OnPrompt(int32_t tokens);  // a request that was accepted
  void OnFirstToken(int64_t since_arrival_us);
  void OnNextToken(int64_t since_previous_us);
  void OnAdapterLoad(const absl::Status& outcome, int64_t took_us);

  // What is read when Prometheus asks.
  struct Current {
    int32_t waiting = 0;
    int32_t running = 0;
    int64_t decode_waits = 0;
    ImageCounts images;
    RegistryStats adapters;
  };
  // The exposition format, version 0.0.4.
  std::string Text(const Current& current);

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

// "ok", "not_found", ...: the status code as a label value.
std::string OutcomeLabel(const absl::Status& status);

}  // namespace lorikeet
