// The parts of the metrics that need no server.
#include <algorithm>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/gateway_metrics.h"
#include "server/usage_table.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

AdapterInfo InHost(const std::string& name) {
  AdapterInfo info;
  info.name = name;
  info.max_rank = 16;
  return info;
}

const prometheus::MetricFamily& Find(const std::vector<prometheus::MetricFamily>& families,
                                     const std::string& name) {
  const auto found = std::ranges::find(families, name, &prometheus::MetricFamily::name);
  EXPECT_NE(found, families.end()) << name;
  return *found;
}

std::string LabelOf(const prometheus::ClientMetric& sample, const std::string& name) {
  for (const auto& label : sample.label) {
    if (label.name == name) return label.value;
  }
  return "";
}

TEST(GatewayFamilies, OnADeviceOnlyWhatIsThereCountsAsLoaded) {
  ServerState state;
  state.has_device_tier = true;
  state.in_host = {InHost("a"), InHost("b"), InHost("c")};
  state.in_host[1].device_bytes = 1 << 20;
  state.waited_for = {"a", "b", "z"};  // b is there: its requests wait for a turn, not for it
  state.max_adapters = 40;
  const auto families = GatewayFamilies(state);
  const auto& info = Find(families, "vllm:lora_requests_info").metric;
  ASSERT_EQ(info.size(), 1u);
  EXPECT_EQ(LabelOf(info[0], "running_lora_adapters"), "b");
  EXPECT_EQ(LabelOf(info[0], "waiting_lora_adapters"), "a,z");
  EXPECT_EQ(LabelOf(info[0], "max_lora"), "40");
  EXPECT_GT(info[0].gauge.value, 1.7e9) << "a Unix time";
  std::vector<std::pair<std::string, std::string>> levels;
  for (const auto& sample : Find(families, "vllm:lora_adapter_loaded").metric) {
    levels.emplace_back(LabelOf(sample, "adapter_name"), LabelOf(sample, "level"));
  }
  EXPECT_THAT(levels, UnorderedElementsAre(Pair("a", "cpu"), Pair("b", "cpu"), Pair("b", "gpu"),
                                           Pair("c", "cpu")));
  EXPECT_EQ(Find(families, "vllm:num_gpu_loaded_lora_adapters").metric[0].gauge.value, 1);
  EXPECT_EQ(Find(families, "vllm:num_cpu_loaded_lora_adapters").metric[0].gauge.value, 3);
  EXPECT_EQ(Find(families, "vllm:max_gpu_lora_adapters").metric[0].gauge.value, 40);
}

Usage Request() { return {.requests = 1, .completion_tokens = 10}; }

TEST(UsageTable, CountsEveryRequestOnceWithFewNames) {
  UsageTable table(8);
  for (int i = 0; i < 5000; ++i) {
    table.Add("hot" + std::to_string(i % 4), Request());
    if (i % 7 == 0) table.Add("cold" + std::to_string(i), Request());
  }
  const UsageTable::Counters counters = table.Read();
  EXPECT_LE(counters.named.size(), 8u);
  int64_t requests = counters.other.requests;
  for (const auto& [name, usage] : counters.named) {
    requests += usage.requests;
    EXPECT_EQ(usage.completion_tokens, 10 * usage.requests) << name;
    if (!name.starts_with("hot")) continue;
    EXPECT_EQ(usage.requests, 1250) << "named from the first on";
  }
  EXPECT_LE(requests, 5000 + 715) << "names that lost their place took their counts along";
}

TEST(UsageTable, AHotNameTakesTheColdestPlace) {
  UsageTable table(2);
  table.Add("a", Request());
  table.Add("b", Request());
  table.Add("b", Request());
  for (int i = 0; i < 2; ++i) table.Add("c", Request());
  EXPECT_THAT(table.Read().named, ElementsAre(Pair("a", testing::_), Pair("b", testing::_)));
  table.Add("c", Request());  // the third: more than twice a's one
  const UsageTable::Counters counters = table.Read();
  ASSERT_THAT(counters.named, ElementsAre(Pair("b", testing::_), Pair("c", testing::_)));
  EXPECT_EQ(counters.named[1].second.requests, 1) << "from zero";
  EXPECT_EQ(counters.other.requests, 2);
}

TEST(UsageTable, WhatIsGoneIsRetired) {
  UsageTable table(2);
  table.Add("a", Request());
  table.Add("b", Request());
  table.Retire([](const std::string& name) { return name == "a"; });
  EXPECT_THAT(table.Read().named, ElementsAre(Pair("b", testing::_)));
  table.Add("c", Request());
  EXPECT_THAT(table.Read().named, ElementsAre(Pair("b", testing::_), Pair("c", testing::_)))
      << "its place is free";
}

}  // namespace
}  // namespace lorikeet
