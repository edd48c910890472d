// The process itself, under the names that Prometheus' client libraries give these.
#pragma once

#include <prometheus/metric_family.h>

#include <vector>

namespace lorikeet {

std::vector<prometheus::MetricFamily> ProcessFamilies();

}  // namespace lorikeet
