// A golden of a variant against what a server answers.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/variant_server.h"

namespace lorikeet {

inline std::shared_ptr<TokenSink> Submit(VariantServer* server, Request request) {
  auto sink = std::make_shared<TokenSink>(request.max_new_tokens + 2, [] {});
  const auto id = server->engine()->Submit(std::move(request), sink);
  LK_CHECK_MSG(id.ok(), id.status().ToString());
  return sink;
}

inline std::shared_ptr<TokenSink> Submit(VariantServer* server, const VariantCase& c, const VariantPrompt& prompt) {
  Request request;
  request.prompt = prompt.tokens;
  request.sampling.temperature = 0;
  request.sampling.top_logprobs = 20;
  request.max_new_tokens = static_cast<int32_t>(prompt.greedy.size());
  request.ignore_eos = true;
  request.adapter = server->Lease(c.adapters);
  request.adapter_name = c.name;
  return Submit(server, std::move(request));
}

// All events up to the end.
inline std::vector<TokenEvent> Drain(TokenSink* sink) {
  std::vector<TokenEvent> events;
  while (events.empty() || events.back().kind != TokenEvent::Kind::kFinished) {
    TokenEvent event;
    if (sink->Pop(&event)) events.push_back(std::move(event));
    else std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return events;
}

// Of the absolute differences of log-probabilities, a golden's 8 best of every step. An adapter that
// were left out would move their mean by 0.4 or more.
struct Errors {
  double largest = 0;
  double sum = 0;
  int count = 0;
  int steps = 0;

  double mean() const { return sum / count; }
};

struct Bounds {
  double mean;
  double largest;
};

// Adds the steps before the paths part, which they may only where the best two are closer than the
// bound can move them.
inline void Compare(const VariantCase& c, const VariantPrompt& prompt, const std::vector<TokenEvent>& events,
             Bounds bounds, Errors* errors) {
  EXPECT_TRUE(events.back().status.ok()) << c.name << ": " << events.back().status;
  ASSERT_EQ(events.size(), prompt.greedy.size() + 1) << c.name;
  for (size_t step = 0; step + 1 < events.size(); ++step, ++errors->steps) {
    const TokenLogprobs& found = events[step].logprobs;
    for (const auto& [token, expected] : prompt.top[step]) {
      const auto it = std::find_if(found.top.begin(), found.top.end(),
                                   [token = token](const auto& top) { return top.first == token; });
      const double error = it == found.top.end() ? INFINITY : std::abs(it->second - expected);
      errors->largest = std::max(errors->largest, error);
      errors->sum += error;
      ++errors->count;
    }
    if (events[step].token == prompt.greedy[step]) continue;
    const double gap = prompt.top[step][0].second - prompt.top[step][1].second;
    EXPECT_LT(gap, 2 * bounds.largest) << c.name << ", step " << step;
    return;
  }
}

}  // namespace lorikeet
