#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <cctype>

namespace lorikeet {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

constexpr double kSecond = 1e6;  // in microseconds

Buckets CountBuckets() { return {0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512}; }
Buckets StepSecondsBuckets() {
  return {0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2};
}
Buckets TokenSecondsBuckets() {
  return {0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5};
}
Buckets WaitSecondsBuckets() {
  return {0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120};
}

Counter& AddCounter(prometheus::Registry& registry, const char* name, const char* help) {
  return BuildCounter().Name(name).Help(help).Register(registry).Add({});
}
Gauge& AddGauge(prometheus::Registry& registry, const char* name, const char* help) {
  return BuildGauge().Name(name).Help(help).Register(registry).Add({});
}
Histogram& AddHistogram(prometheus::Registry& registry, const char* name, const char* help,
                        Buckets buckets) {
  return BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
}

}  // namespace

struct Metrics::Families {
  prometheus::Registry registry;

  prometheus::Family<Counter>& requests = BuildCounter()
                                              .Name("lorikeet_requests_total")
                                              .Help("Generation requests by outcome")
                                              .Register(registry);
  Counter& prompt_tokens =
      AddCounter(registry, "lorikeet_prompt_tokens_total", "Prompt tokens accepted");
  Counter& admitted_tokens =
      AddCounter(registry, "lorikeet_prefix_cache_queried_tokens_total",
                 "Prompt tokens of admitted requests, looked for in the prefix cache");
  Counter& cached_tokens = AddCounter(registry, "lorikeet_prefix_cache_hit_tokens_total",
                                      "Of them, those found: not computed again");
  Counter& generated_tokens =
      AddCounter(registry, "lorikeet_generated_tokens_total", "Tokens sampled");
  Histogram& ttft =
      AddHistogram(registry, "lorikeet_time_to_first_token_seconds",
                   "From a request's arrival to its first token", WaitSecondsBuckets());
  Histogram& itl = AddHistogram(registry, "lorikeet_inter_token_latency_seconds",
                                "Between two tokens of one request", TokenSecondsBuckets());

  Histogram& step_rows =
      AddHistogram(registry, "lorikeet_step_rows", "Tokens computed in one step", CountBuckets());
  Histogram& step_requests = AddHistogram(registry, "lorikeet_step_requests",
                                          "Requests computed in one step", CountBuckets());
  Histogram& step_adapters =
      AddHistogram(registry, "lorikeet_step_distinct_adapters",
                   "Distinct adapters in one step, the base not counted", CountBuckets());
  Histogram& step_seconds =
      AddHistogram(registry, "lorikeet_step_seconds", "Duration of one step", StepSecondsBuckets());
  Counter& prefill_rows = AddCounter(registry, "lorikeet_prefill_rows_total",
                                     "Rows of all steps that computed prompt tokens");
  Counter& base_rows =
      AddCounter(registry, "lorikeet_base_rows_total", "Rows of all steps that used no adapter");
  Counter& preemptions = AddCounter(registry, "lorikeet_preemptions_total",
                                    "Requests sent back to the queue because pages ran out");

  Gauge& waiting = AddGauge(registry, "lorikeet_waiting_requests", "Requests in the queue");
  Gauge& running = AddGauge(registry, "lorikeet_running_requests", "Requests holding pages");
  Gauge& pages_used = AddGauge(registry, "lorikeet_pages_used", "KV pages in use");
  Gauge& pages_cached = AddGauge(registry, "lorikeet_pages_cached",
                                 "KV pages of earlier requests, free once they are needed");
  Gauge& pages_total = AddGauge(registry, "lorikeet_pages", "KV pages there are");

  Gauge& adapters = AddGauge(registry, "lorikeet_adapters", "Adapters loaded, by name");
  Gauge& adapter_versions =
      AddGauge(registry, "lorikeet_adapter_versions", "Distinct adapters loaded or still in use");
  Gauge& adapters_in_host =
      AddGauge(registry, "lorikeet_adapters_in_host", "Distinct adapters in host memory");
  Gauge& adapter_bytes =
      AddGauge(registry, "lorikeet_adapter_bytes", "Host memory of the adapters that are there");
  Gauge& host_hits = AddGauge(registry, "lorikeet_adapter_host_hits_total",
                              "Requests whose adapter was in host memory");
  Gauge& host_misses = AddGauge(registry, "lorikeet_adapter_host_misses_total",
                                "Requests that waited for their adapter to be read");
  Gauge& evictions = AddGauge(registry, "lorikeet_adapter_host_evictions_total",
                              "Adapters that made room in host memory");
  Gauge& images = AddGauge(registry, "lorikeet_adapters_on_device", "Adapters on the device");
  Gauge& image_bytes = AddGauge(registry, "lorikeet_adapter_device_bytes",
                                "Bytes of the pages that adapters take on the device");
  Gauge& image_waste = AddGauge(registry, "lorikeet_adapter_device_waste_bytes",
                                "Of them, those that hold nothing: rounding to pages");
  Gauge& image_loads = AddGauge(registry, "lorikeet_adapter_device_loads_total",
                                "Adapters that were copied to the device");
  Gauge& image_failures = AddGauge(registry, "lorikeet_adapter_device_load_failures_total",
                                   "Copies of adapters to the device that failed");
  Gauge& image_drops = AddGauge(registry, "lorikeet_adapter_device_evictions_total",
                                "Adapters that left the device");
  Gauge& decode_waits =
      AddGauge(registry, "lorikeet_decode_waits_for_adapters_total",
               "Steps put off, though a request was generating, because adapters were on their way");
  prometheus::Family<Counter>& adapter_loads = BuildCounter()
                                                   .Name("lorikeet_adapter_loads_total")
                                                   .Help("Adapter loads by outcome")
                                                   .Register(registry);
  Histogram& adapter_load_seconds =
      AddHistogram(registry, "lorikeet_adapter_load_seconds",
                   "From an adapter's load request to its end", WaitSecondsBuckets());

  Gauge& vllm_waiting =
      AddGauge(registry, "vllm:num_requests_waiting", "As lorikeet_waiting_requests");
  Gauge& vllm_running =
      AddGauge(registry, "vllm:num_requests_running", "As lorikeet_running_requests");
  Gauge& vllm_kv_usage =
      AddGauge(registry, "vllm:kv_cache_usage_perc", "Share of KV pages in use, 1 = all of them");
};

std::string OutcomeLabel(const absl::Status& status) {
  std::string label = absl::StatusCodeToString(status.code());
  std::transform(label.begin(), label.end(), label.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return label;
}

Metrics::Metrics() : families_(std::make_unique<Families>()) {}
Metrics::~Metrics() = default;

void Metrics::OnStep(const StepStats& stats) {
  Families& f = *families_;
  f.step_rows.Observe(stats.rows);
  f.step_requests.Observe(stats.sequences);
  f.step_adapters.Observe(stats.distinct_adapters);
  f.step_seconds.Observe(stats.step_us / kSecond);
  f.prefill_rows.Increment(stats.prefill_rows);
  f.base_rows.Increment(stats.base_rows);
  f.preemptions.Increment(stats.preempted);
  f.generated_tokens.Increment(stats.tokens_sampled);
  f.admitted_tokens.Increment(stats.admitted_tokens);
  f.cached_tokens.Increment(stats.cached_tokens);
  f.pages_cached.Set(stats.pages_cached);
  f.pages_used.Set(stats.pages_used);
  f.pages_total.Set(stats.pages_total);
}

void Metrics::OnRequestDone(const absl::Status& outcome) {
  families_->requests.Add({{"outcome", OutcomeLabel(outcome)}}).Increment();
}

void Metrics::OnPrompt(int32_t tokens) { families_->prompt_tokens.Increment(tokens); }

void Metrics::OnFirstToken(int64_t since_arrival_us) {
  families_->ttft.Observe(since_arrival_us / kSecond);
}

void Metrics::OnNextToken(int64_t since_previous_us) {
  families_->itl.Observe(since_previous_us / kSecond);
}

void Metrics::OnAdapterLoad(const absl::Status& outcome, int64_t took_us) {
  families_->adapter_loads.Add({{"outcome", OutcomeLabel(outcome)}}).Increment();
  families_->adapter_load_seconds.Observe(took_us / kSecond);
}

std::string Metrics::Text(const Current& current) {
  Families& f = *families_;
  // Steps stop when nothing runs, so the last one's page count would stand for ever.
  if (current.running == 0) f.pages_used.Set(0);
  f.waiting.Set(current.waiting);
  f.running.Set(current.running);
  const RegistryStats& adapters = current.adapters;
  f.adapters.Set(static_cast<double>(adapters.names));
  f.adapter_versions.Set(static_cast<double>(adapters.versions));
  f.adapters_in_host.Set(static_cast<double>(adapters.in_host));
  f.adapter_bytes.Set(static_cast<double>(adapters.host_bytes));
  f.host_hits.Set(static_cast<double>(adapters.host_hits));
  f.host_misses.Set(static_cast<double>(adapters.host_misses));
  f.evictions.Set(static_cast<double>(adapters.evictions));
  f.images.Set(current.images.images);
  f.image_bytes.Set(static_cast<double>(current.images.image_bytes));
  f.image_waste.Set(static_cast<double>(current.images.image_bytes - current.images.used_bytes));
  f.image_loads.Set(static_cast<double>(current.images.loads));
  f.image_failures.Set(static_cast<double>(current.images.failures));
  f.image_drops.Set(static_cast<double>(current.images.drops));
  f.decode_waits.Set(static_cast<double>(current.decode_waits));
  f.vllm_waiting.Set(current.waiting);
  f.vllm_running.Set(current.running);
  const double total = f.pages_total.Value();
  f.vllm_kv_usage.Set(total > 0 ? f.pages_used.Value() / total : 0);
  return prometheus::TextSerializer().Serialize(f.registry.Collect());
}

}  // namespace lorikeet
