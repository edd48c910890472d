#include "server/cli/bench_stats.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace lorikeet {
namespace {

double Percentile(const std::vector<double>& sorted, double share) {
  const double position = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(std::floor(position));
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (position - below) * (sorted[above] - sorted[below]);
}

nlohmann::ordered_json ToJson(const Distribution& d) {
  return {{"mean", d.mean}, {"p50", d.p50}, {"p90", d.p90}, {"p99", d.p99}};
}

std::string TableRow(const char* name, const Distribution& d) {
  return absl::StrFormat("%-10s %10.2f %10.2f %10.2f %10.2f\n", name, d.mean, d.p50, d.p90, d.p99);
}

}  // namespace

Distribution Summarise(std::vector<double> samples) {
  if (samples.empty()) return {};
  std::sort(samples.begin(), samples.end());
  const double sum = std::accumulate(samples.begin(), samples.end(), 0.0);
  return {sum / static_cast<double>(samples.size()), Percentile(samples, 0.5),
          Percentile(samples, 0.9), Percentile(samples, 0.99)};
}

std::string BenchTable(const BenchResult& r) {
  std::string text =
      absl::StrFormat("%-10s %d ok, %d failed, %.2f s\n", "requests", r.ok, r.failed, r.wall_s);
  absl::StrAppendFormat(&text, "%-10s %.1f tokens/s (%d tokens)\n", "output",
                        r.OutputTokensPerSecond(), r.completion_tokens);
  absl::StrAppendFormat(&text, "%-10s %.1f tokens/s (%d tokens)\n", "prompt",
                        r.PromptTokensPerSecond(), r.prompt_tokens);
  absl::StrAppendFormat(&text, "%-10s %10s %10s %10s %10s\n", "", "mean", "p50", "p90", "p99");
  absl::StrAppend(&text, TableRow("TTFT ms", Summarise(r.ttft_ms)),
                  TableRow("ITL ms", Summarise(r.itl_ms)));
  return text;
}

std::string BenchJson(const BenchResult& r) {
  nlohmann::ordered_json root;
  root["concurrency"] = r.concurrency;
  root["rate_per_s"] = r.rate_per_s;
  root["adapters"] = r.adapters;
  root["requests_ok"] = r.ok;
  root["requests_failed"] = r.failed;
  root["wall_s"] = r.wall_s;
  root["prompt_tokens"] = r.prompt_tokens;
  root["completion_tokens"] = r.completion_tokens;
  root["prompt_tokens_per_s"] = r.PromptTokensPerSecond();
  root["output_tokens_per_s"] = r.OutputTokensPerSecond();
  root["ttft_ms"] = ToJson(Summarise(r.ttft_ms));
  root["itl_ms"] = ToJson(Summarise(r.itl_ms));
  return root.dump(2) + "\n";
}

}  // namespace lorikeet
