// What a load test measured, and how it is printed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lorikeet {

// Percentiles by linear interpolation between the closest ranks, in the samples' unit.
struct Distribution {
  double mean = 0;
  double p50 = 0;
  double p90 = 0;
  double p99 = 0;
};
Distribution Summarise(std::vector<double> samples);  // all zero without samples

struct BenchResult {
  int32_t concurrency = 0;  // closed loop; 0: open loop
  double rate_per_s = 0;    // open loop
  std::vector<std::string> adapters;
  int64_t ok = 0;
  int64_t failed = 0;
  std::string first_error;
  double wall_s = 0;  // from the first request to the last answer
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  std::vector<double> ttft_ms;  // from when a request was due to its first token
  std::vector<double> itl_ms;   // between tokens; one that came with others counts its share

  double OutputTokensPerSecond() const { return wall_s > 0 ? completion_tokens / wall_s : 0; }
  double PromptTokensPerSecond() const { return wall_s > 0 ? prompt_tokens / wall_s : 0; }
};

std::string BenchTable(const BenchResult& result);
std::string BenchJson(const BenchResult& result);  // one object, several lines

}  // namespace lorikeet
