// A scheduler alone, stepped by hand.
#pragma once

#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/scheduler/scheduler.h"
#include "gtest/gtest.h"

namespace lorikeet::testing {

inline constexpr int32_t kEos = 2;

inline AdapterLease MakeAdapter(const std::string& version, const std::string& tenant = "") {
  auto adapter = std::make_shared<Adapter>();
  adapter->version = version;
  return AdapterLease(adapter, adapter, tenant);
}

inline Request MakeRequest(int32_t prompt, int32_t max_new, AdapterLease adapter = {}) {
  Request request;
  for (int32_t i = 0; i < prompt; ++i) request.prompt.push_back(100 + i);
  request.max_new_tokens = max_new;
  request.adapter = std::move(adapter);
  return request;
}

// One scheduler, its batch and its events by request. Every sampled token is `answer`.
class Scheduling : public ::testing::Test {
 protected:
  void Start(Limits limits, int32_t pages,
             int32_t tenant_image_pages = std::numeric_limits<int32_t>::max()) {
    if (limits.max_context_tokens == 0) limits.max_context_tokens = 1000;
    SchedulerOptions options;
    options.limits = limits;
    options.kv = KvLayout::Make(2, 1, 64, DType::kF32);
    ASSERT_EQ(options.kv.pages_per_block, 1);
    options.pages = pages;
    options.eos_ids = {kEos};
    options.tenant_image_pages = tenant_image_pages;
    scheduler_ = std::make_unique<Scheduler>(options);
  }

  bool Plan() { return scheduler_->Plan(now_, &batch_); }

  void Commit(int32_t answer = 7) {
    StepResult result;
    for (const LogitRow& row : batch_.logit_rows) {
      SampledToken sampled;
      sampled.token = row.target >= 0 ? row.target : answer;
      sampled.logprobs.logprob = -static_cast<float>(sampled.token);
      result.sampled.push_back(sampled);
    }
    RequestEvents events;
    scheduler_->Commit(std::move(result), now_, &events);
    Take(std::move(events));
  }

  void Step(int32_t answer = 7) {
    ASSERT_TRUE(Plan());
    Commit(answer);
  }

  void Take(RequestEvents events) {
    for (RequestEvent& e : events) events_[e.id].push_back(std::move(e.event));
  }

  std::vector<int32_t> Tokens(RequestId id) {
    std::vector<int32_t> tokens;
    for (const TokenEvent& event : events_[id]) {
      if (event.kind == TokenEvent::Kind::kToken) tokens.push_back(event.token);
    }
    return tokens;
  }

  FinishReason Finish(RequestId id) {
    return events_[id].empty() ? FinishReason::kNone : events_[id].back().finish;
  }

  std::unique_ptr<Scheduler> scheduler_;
  Batch batch_;
  std::map<RequestId, std::vector<TokenEvent>> events_;
  int64_t now_ = 0;
};

}  // namespace lorikeet::testing
