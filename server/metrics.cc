#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "server/process_metrics.h"
#include "server/usage_table.h"

namespace lorikeet {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Buckets = Histogram::BucketBoundaries;

constexpr double kSecond = 1e6;  // in microseconds

// Values of the label `adapter` beside adapters' names.
constexpr char kBase[] = "base";    // requests of the base model
constexpr char kSum[] = "sum";      // of a sum of several adapters
constexpr char kOther[] = "other";  // of adapters, or tenants, without series of their own

Buckets CountBuckets() { return {0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512}; }
Buckets StepSecondsBuckets() {
  return {0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2};
}
Buckets TokenSecondsBuckets() {
  return {0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5};
}
Buckets WaitSecondsBuckets() {
  return {0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120};
}

// Who ended a request that did not end by itself; nullptr: nobody.
const char* CancelReason(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kCancelled: return "client";
    case absl::StatusCode::kDeadlineExceeded: return "deadline";
    case absl::StatusCode::kUnavailable: return "server";
    default: return nullptr;
  }
}

Usage UsageOf(const RequestRecord& request) {
  return {.requests = 1,
          .failed = request.status.ok() ? 0 : 1,
          .prompt_tokens = request.prompt_tokens,
          .cached_tokens = request.cached_tokens,
          .completion_tokens = request.completion_tokens,
          .adapter_wait_us = request.adapter_read_us + request.adapter_copy_us,
          .serving_us = request.admitted_us > 0 ? request.end_us - request.admitted_us : 0};
}

struct UsageColumn {
  const char* name;  // behind lorikeet_adapter_ or lorikeet_tenant_
  const char* help;
  double (*value)(const Usage&);
};

constexpr UsageColumn kUsageColumns[] = {
    {"requests_total", "Requests that ended", [](const Usage& u) { return double(u.requests); }},
    {"failed_requests_total", "Of them, those with an error or cancelled",
     [](const Usage& u) { return double(u.failed); }},
    {"prompt_tokens_total", "Prompt tokens of those requests",
     [](const Usage& u) { return double(u.prompt_tokens); }},
    {"cached_tokens_total", "Of them, found in the prefix cache",
     [](const Usage& u) { return double(u.cached_tokens); }},
    {"generated_tokens_total", "Tokens answered to those requests",
     [](const Usage& u) { return double(u.completion_tokens); }},
    {"wait_seconds_total", "Time that those requests waited for their adapter",
     [](const Usage& u) { return u.adapter_wait_us / kSecond; }},
    {"serving_seconds_total", "From those requests' admission to their end",
     [](const Usage& u) { return u.serving_us / kSecond; }}};

// One family a counter, one sample a name and one for the rest, by `label`.
std::vector<MetricFamily> UsageFamilies(const std::string& label, const UsageTable& table) {
  const UsageTable::Counters counters = table.Read();
  std::vector<MetricFamily> families;
  for (const UsageColumn& column : kUsageColumns) {
    MetricFamily& family = families.emplace_back(
        MakeFamily("lorikeet_" + label + "_" + column.name,
                   std::string(column.help) + ", by " + label, MetricType::Counter));
    for (const auto& [name, usage] : counters.named) {
      AddSample(&family, {{label, name}}, column.value(usage));
    }
    AddSample(&family, {{label, kOther}}, column.value(counters.other));
  }
  return families;
}

void Append(std::vector<MetricFamily> more, std::vector<MetricFamily>* all) {
  std::move(more.begin(), more.end(), std::back_inserter(*all));
}

// Makes families in `registry`.
struct Maker {
  prometheus::Registry& registry;

  Family<Counter>& Counters(const char* name, const char* help) const {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
  }
  Counter& Count(const char* name, const char* help) const { return Counters(name, help).Add({}); }
  Family<Gauge>& Gauges(const char* name, const char* help) const {
    return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
  }
  Gauge& Level(const char* name, const char* help) const { return Gauges(name, help).Add({}); }
  Family<Histogram>& Histograms(const char* name, const char* help) const {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
  }
  Histogram& Distribution(const char* name, const char* help, Buckets buckets) const {
    return Histograms(name, help).Add({}, std::move(buckets));
  }
};

// A counter that another part keeps: it grows to what that part says.
void GrowTo(Counter& counter, double value) {
  counter.Increment(std::max(value - counter.Value(), 0.0));
}

}  // namespace

struct Metrics::Families {
  prometheus::Registry registry;
  const Maker make{registry};

  // ---- requests
  Family<Counter>& requests =
      make.Counters("lorikeet_requests_total", "Generation requests by outcome");
  Family<Counter>& cancels =
      make.Counters("lorikeet_canceled_requests_total", "Requests ended before their time, by whom");
  Counter& prompt_tokens =
      make.Count("lorikeet_prompt_tokens_total", "Prompt tokens accepted");
  Counter& admitted_tokens =
      make.Count("lorikeet_prefix_cache_queried_tokens_total",
                 "Prompt tokens of admitted requests, looked for in the prefix cache");
  Counter& cached_tokens = make.Count("lorikeet_prefix_cache_hit_tokens_total",
                                      "Of them, those found: not computed again");
  Counter& generated_tokens = make.Count("lorikeet_generated_tokens_total", "Tokens sampled");
  Histogram& ttft =
      make.Distribution("lorikeet_time_to_first_token_seconds",
                        "From a request's arrival to its first token", WaitSecondsBuckets());
  Histogram& itl = make.Distribution("lorikeet_inter_token_latency_seconds",
                                     "Between two tokens of one request", TokenSecondsBuckets());
  Histogram& request_seconds =
      make.Distribution("lorikeet_request_seconds", "From a request's arrival to its end, successful ones",
                        WaitSecondsBuckets());
  Histogram& queue_seconds = make.Distribution(
      "lorikeet_queue_seconds", "From the engine's taking a request to its first step",
      WaitSecondsBuckets());
  Family<Histogram>& adapter_wait =
      make.Histograms("lorikeet_adapter_wait_seconds",
                      "What requests waited for their adapter to reach a tier, those that waited");
  Histogram& host_wait = adapter_wait.Add({{"tier", "host"}}, WaitSecondsBuckets());
  Histogram& device_wait = adapter_wait.Add({{"tier", "device"}}, WaitSecondsBuckets());
  Gauge& waiting = make.Level("lorikeet_waiting_requests", "Requests in the queue");
  Gauge& running = make.Level("lorikeet_running_requests", "Requests holding pages");

  // ---- steps
  Histogram& step_rows =
      make.Distribution("lorikeet_step_rows", "Tokens computed in one step", CountBuckets());
  Histogram& step_requests = make.Distribution("lorikeet_step_requests",
                                               "Requests computed in one step", CountBuckets());
  Histogram& step_adapters =
      make.Distribution("lorikeet_step_distinct_adapters",
                        "Distinct adapters in one step, the base not counted", CountBuckets());
  Histogram& step_seconds = make.Distribution("lorikeet_step_seconds", "Duration of one step",
                                              StepSecondsBuckets());
  Counter& step_bytes =
      make.Count("lorikeet_step_context_bytes_total",
                 "Keys, values and adapters that steps had to read, once each a step");
  Gauge& weight_bytes =
      make.Level("lorikeet_weight_bytes", "Weights that every step has to read");
  Gauge& bandwidth = make.Level("lorikeet_memory_bandwidth_bytes_per_second",
                                "Of the memory they are in, measured at start or configured");
  Counter& prefill_rows = make.Count("lorikeet_prefill_rows_total",
                                     "Rows of all steps that computed prompt tokens");
  Counter& base_rows =
      make.Count("lorikeet_base_rows_total", "Rows of all steps that used no adapter");
  Counter& preemptions = make.Count("lorikeet_preemptions_total",
                                    "Requests sent back to the queue because pages ran out");

  // ---- memory
  Gauge& pages_used = make.Level("lorikeet_pages_used", "Pages with running requests' keys and values");
  Gauge& pages_cached = make.Level("lorikeet_pages_cached",
                                   "Pages of earlier requests, free once they are needed");
  Gauge& pages_adapters = make.Level("lorikeet_pages_adapters",
                                     "Pages with adapters, free once needed and not in use");
  Gauge& pages_adapters_used =
      make.Level("lorikeet_pages_adapters_used", "Of them, of the adapters in the last step");
  Gauge& pages_total = make.Level("lorikeet_pages", "Pages there are");
  Gauge& device_used = make.Level("lorikeet_device_memory_used_bytes",
                                  "Of the GPU, by whomever; 0 on the CPU");
  Gauge& device_total =
      make.Level("lorikeet_device_memory_bytes", "Memory of the GPU; 0 on the CPU");

  // ---- adapters
  Gauge& adapters = make.Level("lorikeet_adapters", "Adapters loaded, by name");
  Gauge& adapter_versions =
      make.Level("lorikeet_adapter_versions", "Distinct adapters loaded or still in use");
  Family<Gauge>& resident =
      make.Gauges("lorikeet_adapters_resident", "Distinct adapters in a tier");
  Gauge& host_resident = resident.Add({{"tier", "host"}});
  Gauge& device_resident = resident.Add({{"tier", "device"}});
  Gauge& adapter_bytes =
      make.Level("lorikeet_adapter_bytes", "Host memory of the adapters that are there");
  Gauge& uploaded_bytes =
      make.Level("lorikeet_adapter_uploaded_bytes", "Disk that uploaded adapters take");
  Gauge& image_bytes = make.Level("lorikeet_adapter_device_bytes",
                                  "Bytes of the pages that adapters take on the device");
  Gauge& image_waste = make.Level("lorikeet_adapter_device_waste_bytes",
                                  "Of them, those that hold nothing: rounding to pages");
  Counter& decode_waits =
      make.Count("lorikeet_decode_waits_for_adapters_total",
                 "Steps put off, though a request was generating, because adapters were on their way");
  Family<Counter>& hits = make.Counters("lorikeet_adapter_hits_total",
                                        "Requests whose adapter was in the tier when they came");
  Counter& host_hits = hits.Add({{"tier", "host"}});
  Counter& device_hits = hits.Add({{"tier", "device"}});
  Family<Counter>& misses = make.Counters("lorikeet_adapter_misses_total",
                                          "Requests that waited for it to come there");
  Counter& host_misses = misses.Add({{"tier", "host"}});
  Counter& device_misses = misses.Add({{"tier", "device"}});
  Family<Counter>& evictions =
      make.Counters("lorikeet_adapter_evictions_total", "Adapters that made room in a tier");
  Counter& host_evictions = evictions.Add({{"tier", "host"}});
  Counter& device_evictions = evictions.Add({{"tier", "device"}});
  Family<Counter>& loads = make.Counters("lorikeet_adapter_loads_total",
                                         "Adapters brought into a tier, from the one below it");
  Counter& host_loads = loads.Add({{"tier", "host"}});
  Counter& device_loads = loads.Add({{"tier", "device"}});
  Family<Counter>& failures =
      make.Counters("lorikeet_adapter_load_failures_total", "Those that could not be brought there");
  Counter& host_failures = failures.Add({{"tier", "host"}});
  Counter& device_failures = failures.Add({{"tier", "device"}});
  Family<Counter>& load_bytes =
      make.Counters("lorikeet_adapter_load_bytes_total", "Bytes that those loads brought");
  Counter& host_load_bytes = load_bytes.Add({{"tier", "host"}});
  Counter& device_load_bytes = load_bytes.Add({{"tier", "device"}});
  Family<Counter>& load_seconds =
      make.Counters("lorikeet_adapter_load_seconds_total", "Time that those loads took");
  Counter& host_load_seconds = load_seconds.Add({{"tier", "host"}});
  Counter& device_load_seconds = load_seconds.Add({{"tier", "device"}});
  Gauge& loading = make.Level("lorikeet_adapters_loading", "Adapters on their way to the device");
  Family<Counter>& registrations =
      make.Counters("lorikeet_adapter_registrations_total", "Calls that load an adapter, by outcome");
  Histogram& registration_seconds =
      make.Distribution("lorikeet_adapter_registration_seconds",
                        "From such a call to its end", WaitSecondsBuckets());

  // ---- traces
  Counter& spans_exported =
      make.Count("lorikeet_spans_exported_total", "Spans of traces that the collector took");
  Counter& spans_dropped = make.Count("lorikeet_spans_dropped_total",
                                      "Spans that it did not take, or not in time");

  explicit Families(const MetricsOptions& options)
      : vllm(options.vllm),
        adapters_usage(static_cast<size_t>(options.named_adapters)),
        tenants_usage(static_cast<size_t>(options.named_adapters)) {}

  const bool vllm;
  UsageTable adapters_usage;
  UsageTable tenants_usage;
  std::mutex scrape_mutex;  // one scrape at a time
  std::mutex mutex;
  std::map<std::string, int32_t> waited_for;  // requests without a token, by adapter
};

std::string OutcomeLabel(const absl::Status& status) {
  std::string label = absl::StatusCodeToString(status.code());
  std::transform(label.begin(), label.end(), label.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return label;
}

Metrics::Metrics(const MetricsOptions& options) : families_(std::make_unique<Families>(options)) {
  for (const char* reason : {"client", "deadline", "server"}) {
    families_->cancels.Add({{"reason", reason}});  // there from the start, so that rates begin at 0
  }
}
Metrics::~Metrics() = default;

void Metrics::OnStep(const StepStats& stats) {
  Families& f = *families_;
  f.step_rows.Observe(stats.rows);
  f.step_requests.Observe(stats.sequences);
  f.step_adapters.Observe(stats.distinct_adapters);
  f.step_seconds.Observe(stats.step_us / kSecond);
  f.step_bytes.Increment(static_cast<double>(stats.context_bytes));
  f.prefill_rows.Increment(stats.prefill_rows);
  f.base_rows.Increment(stats.base_rows);
  f.preemptions.Increment(stats.preempted);
  f.generated_tokens.Increment(stats.tokens_sampled);
  f.admitted_tokens.Increment(stats.admitted_tokens);
  f.cached_tokens.Increment(stats.cached_tokens);
  f.device_hits.Increment(stats.image_hits);
  f.device_misses.Increment(stats.image_misses);
  f.loading.Set(stats.images_loading);
  f.pages_cached.Set(stats.pages_cached);
  f.pages_adapters.Set(stats.pages_images);
  f.pages_adapters_used.Set(stats.pages_images_used);
  f.pages_used.Set(stats.pages_used);
  f.pages_total.Set(stats.pages_total);
}

void Metrics::OnRequestStart(const RequestRecord& request) {
  if (request.adapter.empty() || request.sum) return;
  std::lock_guard lock(families_->mutex);
  ++families_->waited_for[request.adapter];
}

void Metrics::OnPrompt(const RequestRecord& request) {
  families_->prompt_tokens.Increment(request.prompt_tokens);
  if (request.adapter_read_us > 0) families_->host_wait.Observe(request.adapter_read_us / kSecond);
}

void Metrics::OnFirstToken(const RequestRecord& request) {
  Families& f = *families_;
  f.ttft.Observe((request.first_token_us - request.arrival_us) / kSecond);
  f.queue_seconds.Observe((request.admitted_us - request.submitted_us) / kSecond);
  if (request.adapter_copy_us > 0) f.device_wait.Observe(request.adapter_copy_us / kSecond);
  StopWaiting(request);
}

void Metrics::StopWaiting(const RequestRecord& request) {
  if (request.adapter.empty() || request.sum) return;
  std::lock_guard lock(families_->mutex);
  const auto waited = families_->waited_for.find(request.adapter);
  if (waited != families_->waited_for.end() && --waited->second == 0) {
    families_->waited_for.erase(waited);
  }
}

void Metrics::OnNextToken(int64_t since_previous_us) {
  families_->itl.Observe(since_previous_us / kSecond);
}

void Metrics::OnRequestDone(const RequestRecord& request) {
  Families& f = *families_;
  f.requests.Add({{"outcome", OutcomeLabel(request.status)}}).Increment();
  const char* reason = CancelReason(request.status);
  if (reason != nullptr) f.cancels.Add({{"reason", reason}}).Increment();
  if (request.status.ok()) {
    f.request_seconds.Observe((request.end_us - request.arrival_us) / kSecond);
  }
  if (request.first_token_us == 0) StopWaiting(request);
  if (request.submitted_us == 0) return;  // refused: no name in it is known to be an adapter's
  const char* adapter = request.sum ? kSum : request.adapter.c_str();
  f.adapters_usage.Add(request.adapter.empty() ? kBase : adapter, UsageOf(request));
  if (!request.tenant.empty()) f.tenants_usage.Add(request.tenant, UsageOf(request));
}

void Metrics::OnAdapterLoad(const absl::Status& outcome, int64_t took_us) {
  families_->registrations.Add({{"outcome", OutcomeLabel(outcome)}}).Increment();
  families_->registration_seconds.Observe(took_us / kSecond);
}

std::string Metrics::Text(Current current) {
  Families& f = *families_;
  std::lock_guard scrape(f.scrape_mutex);
  ServerState& state = current.state;
  // Steps stop when nothing runs, so the last one's counts would stand for ever.
  if (state.running == 0) {
    f.pages_used.Set(0);
    f.pages_adapters_used.Set(0);
  }
  f.waiting.Set(state.waiting);
  f.running.Set(state.running);
  f.weight_bytes.Set(static_cast<double>(current.weight_bytes));
  f.bandwidth.Set(current.bandwidth);
  f.device_used.Set(static_cast<double>(current.device_memory.used));
  f.device_total.Set(static_cast<double>(current.device_memory.total));
  GrowTo(f.spans_exported, static_cast<double>(current.spans.exported));
  GrowTo(f.spans_dropped, static_cast<double>(current.spans.dropped));
  GrowTo(f.decode_waits, static_cast<double>(current.decode_waits));
  SetRegistry(current.adapters);
  SetImages(current.images);
  f.adapters_usage.Retire([&](const std::string& name) {
    return name != kBase && name != kSum && current.gone && current.gone(name);
  });
  std::vector<MetricFamily> all = f.registry.Collect();
  Append(UsageFamilies("adapter", f.adapters_usage), &all);
  Append(UsageFamilies("tenant", f.tenants_usage), &all);
  Append(ProcessFamilies(), &all);
  if (f.vllm) {
    const double total = f.pages_total.Value();
    const double taken = f.pages_used.Value() + f.pages_adapters_used.Value();
    state.kv_usage = total > 0 ? taken / total : 0;
    {
      std::lock_guard lock(f.mutex);
      for (const auto& [name, requests] : f.waited_for) state.waited_for.insert(name);
    }
    Append(GatewayFamilies(state), &all);
  }
  return prometheus::TextSerializer().Serialize(all);
}

void Metrics::SetRegistry(const RegistryStats& stats) {
  Families& f = *families_;
  f.adapters.Set(static_cast<double>(stats.names));
  f.adapter_versions.Set(static_cast<double>(stats.versions));
  f.host_resident.Set(static_cast<double>(stats.in_host));
  f.adapter_bytes.Set(static_cast<double>(stats.host_bytes));
  f.uploaded_bytes.Set(static_cast<double>(stats.disk_bytes));
  GrowTo(f.host_hits, static_cast<double>(stats.host_hits));
  GrowTo(f.host_misses, static_cast<double>(stats.host_misses));
  GrowTo(f.host_evictions, static_cast<double>(stats.evictions));
  GrowTo(f.host_loads, static_cast<double>(stats.reads));
  GrowTo(f.host_failures, static_cast<double>(stats.read_failures));
  GrowTo(f.host_load_bytes, static_cast<double>(stats.read_bytes));
  GrowTo(f.host_load_seconds, stats.read_us / kSecond);
}

void Metrics::SetImages(const ImageCounts& images) {
  Families& f = *families_;
  f.device_resident.Set(images.images);
  f.image_bytes.Set(static_cast<double>(images.image_bytes));
  f.image_waste.Set(static_cast<double>(images.image_bytes - images.used_bytes));
  GrowTo(f.device_evictions, static_cast<double>(images.drops));
  GrowTo(f.device_loads, static_cast<double>(images.loads));
  GrowTo(f.device_failures, static_cast<double>(images.failures));
  GrowTo(f.device_load_bytes, static_cast<double>(images.load_bytes));
  GrowTo(f.device_load_seconds, images.load_us / kSecond);
}

}  // namespace lorikeet
