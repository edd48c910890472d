// What metrics cost: a scrape with 1,000 adapters that are all used and loaded, with series of their
// own, and what the engine's thread does a step and a front's a request.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/metrics.h"

namespace {

using lorikeet::Metrics;

constexpr int kAdapters = 1000;

double MicrosOf(const auto& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
}

std::string NameOf(int i) { return absl::StrCat("customer-", i, "/support-v", i % 7); }

Metrics::Current Loaded() {
  Metrics::Current current;
  for (int i = 0; i < kAdapters; ++i) {
    lorikeet::AdapterInfo info;
    info.name = NameOf(i);
    info.version = std::string(64, 'a');
    info.path = "/adapters/" + info.name;
    info.max_rank = 16;
    info.device_bytes = 84 << 20;
    current.state.in_host.push_back(std::move(info));
  }
  current.state.has_device_tier = true;
  current.gone = [](const std::string&) { return false; };
  return current;
}

}  // namespace

int main() {
  Metrics metrics({.vllm = true, .named_adapters = kAdapters});
  lorikeet::RequestRecord request{.arrival_us = 1, .submitted_us = 1, .admitted_us = 2,
                                  .first_token_us = 3, .end_us = 4, .prompt_tokens = 100,
                                  .completion_tokens = 50};
  constexpr int kRequests = 20 * kAdapters;
  const double requests_us = MicrosOf([&] {
    for (int i = 0; i < kRequests; ++i) {
      request.adapter = NameOf(i % kAdapters);
      metrics.OnRequestStart(request);
      metrics.OnPrompt(request);
      metrics.OnFirstToken(request);
      metrics.OnRequestDone(request);
    }
  });

  constexpr int kSteps = 100'000;
  lorikeet::StepStats step{.rows = 64, .sequences = 64, .distinct_adapters = 32, .pages_total = 1000,
                           .tokens_sampled = 64, .step_us = 8000};
  const double steps_us = MicrosOf([&] {
    for (int i = 0; i < kSteps; ++i) metrics.OnStep(step);
  });

  const Metrics::Current current = Loaded();
  std::vector<double> scrapes_us;
  size_t bytes = 0;
  for (int i = 0; i < 101; ++i) {
    scrapes_us.push_back(MicrosOf([&] { bytes = metrics.Text(current).size(); }));
  }
  std::sort(scrapes_us.begin(), scrapes_us.end());
  std::printf("scrape, %d adapters: median %.2f ms, slowest %.2f ms, %zu bytes\n", kAdapters,
              scrapes_us[50] / 1e3, scrapes_us[100] / 1e3, bytes);
  std::printf("step: %.2f us; request: %.2f us\n", steps_us / kSteps, requests_us / kRequests);
  return 0;
}
