// The metrics that routers read, under the names that vLLM gave them: the model server protocol of
// the Gateway API Inference Extension (proposal 003), and which adapter is where, as its routers'
// residency scorers expect it.
//
// They are made anew at every scrape, so that a series goes with what it says.
#pragma once

#include <prometheus/metric_family.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "adapters_cache/registry.h"

namespace lorikeet {

// Names in one label value or with a series of their own, at most.
inline constexpr int32_t kMaxListedAdapters = 1024;

struct ServerState {
  int32_t waiting = 0;  // requests
  int32_t running = 0;
  double kv_usage = 0;  // share of the pages that a new request cannot have, [0, 1]
  int32_t block_tokens = 0;
  int64_t blocks = 0;

  std::vector<AdapterInfo> in_host;      // at most kMaxListedAdapters
  bool has_device_tier = false;          // else adapters are used where the host has them
  // Adapters that fit into the memory they are used in, by the mean size of those there.
  int64_t max_adapters = 0;
  std::set<std::string> waited_for;  // names of adapters with requests that have no token yet
};

std::vector<prometheus::MetricFamily> GatewayFamilies(const ServerState& state);

// A family of one type; samples are added by AddSample.
prometheus::MetricFamily MakeFamily(std::string name, std::string help,
                                    prometheus::MetricType type);
void AddSample(prometheus::MetricFamily* family,
               std::vector<prometheus::ClientMetric::Label> labels, double value);

}  // namespace lorikeet
