#include "server/gateway_metrics.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_join.h"

namespace lorikeet {
namespace {

using prometheus::MetricFamily;
using prometheus::MetricType;

double UnixSeconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

MetricFamily Gauge(std::string name, std::string help, double value) {
  MetricFamily family = MakeFamily(std::move(name), std::move(help), MetricType::Gauge);
  AddSample(&family, {}, value);
  return family;
}

// Where steps can use it.
bool Ready(const ServerState& state, const AdapterInfo& adapter) {
  return !state.has_device_tier || adapter.device_bytes > 0;
}

// One series alone; the newest counts, says the protocol, by a value that is the time.
MetricFamily LoraRequestsInfo(const ServerState& state) {
  std::vector<std::string> ready;
  std::set<std::string> waiting = state.waited_for;
  for (const AdapterInfo& adapter : state.in_host) {
    if (!Ready(state, adapter)) continue;
    ready.push_back(adapter.name);
    waiting.erase(adapter.name);
  }
  MetricFamily family = MakeFamily(
      "vllm:lora_requests_info",
      "Adapters that are loaded and those that are waited for; the value is the time of this list",
      MetricType::Gauge);
  AddSample(&family,
            {{"max_lora", std::to_string(state.max_adapters)},
             {"running_lora_adapters", absl::StrJoin(ready, ",")},
             {"waiting_lora_adapters", absl::StrJoin(waiting, ",")}},
            UnixSeconds());
  return family;
}

void AddResidency(const ServerState& state, std::vector<MetricFamily>* families) {
  MetricFamily loaded = MakeFamily("vllm:lora_adapter_loaded", "1 for each adapter and each tier it is in",
                                   MetricType::Gauge);
  int64_t on_device = 0;
  for (const AdapterInfo& adapter : state.in_host) {
    const auto add = [&](const char* level) {
      AddSample(&loaded,
                {{"adapter_name", adapter.name},
                 {"level", level},
                 {"pinned", adapter.pinned ? "true" : "false"},
                 {"rank", std::to_string(adapter.max_rank)}},
                1);
    };
    add("cpu");
    if (!state.has_device_tier || !Ready(state, adapter)) continue;
    add("gpu");
    ++on_device;
  }
  families->push_back(std::move(loaded));
  families->push_back(Gauge("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory",
                            static_cast<double>(state.in_host.size())));
  families->push_back(Gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device",
                            static_cast<double>(on_device)));
  if (!state.has_device_tier) return;
  families->push_back(Gauge("vllm:max_gpu_lora_adapters",
                            "Adapters that fit on the device, by the mean size of those there",
                            static_cast<double>(state.max_adapters)));
}

}  // namespace

MetricFamily MakeFamily(std::string name, std::string help, MetricType type) {
  MetricFamily family;
  family.name = std::move(name);
  family.help = std::move(help);
  family.type = type;
  return family;
}

void AddSample(MetricFamily* family, std::vector<prometheus::ClientMetric::Label> labels,
               double value) {
  prometheus::ClientMetric& sample = family->metric.emplace_back();
  sample.label = std::move(labels);
  if (family->type == MetricType::Counter) {
    sample.counter.value = value;
  } else {
    sample.gauge.value = value;
  }
}

std::vector<MetricFamily> GatewayFamilies(const ServerState& state) {
  std::vector<MetricFamily> families;
  families.push_back(
      Gauge("vllm:num_requests_waiting", "As lorikeet_waiting_requests", state.waiting));
  families.push_back(
      Gauge("vllm:num_requests_running", "As lorikeet_running_requests", state.running));
  families.push_back(Gauge("vllm:kv_cache_usage_perc",
                           "Share of the pages that a new request cannot have, 1 = all of them",
                           state.kv_usage));
  MetricFamily config = MakeFamily("vllm:cache_config_info", "Of the KV cache, as labels",
                                   MetricType::Gauge);
  AddSample(&config,
            {{"block_size", std::to_string(state.block_tokens)},
             {"num_gpu_blocks", std::to_string(state.blocks)}},
            1);
  families.push_back(std::move(config));
  families.push_back(LoraRequestsInfo(state));
  AddResidency(state, &families);
  return families;
}

}  // namespace lorikeet
