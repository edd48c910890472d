// What `adapters inspect DIR --model PATH` says of the goldens of variants.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/inspect.h"
#include "adapters_cache/inspect_loaded.h"
#include "adapters_cache/normalise.h"
#include "engine/model/base_model_view.h"
#include "nlohmann/json.hpp"
#include "server/inspect.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
namespace fs = std::filesystem;

const fs::path kGoldens = "tests/golden";

std::string Inspected(const std::string& name, const std::string& base = "llama") {
  const auto text = InspectOnModel(kGoldens / "variants" / name, kGoldens / "models" / base);
  EXPECT_TRUE(text.ok()) << name << ": " << text.status();
  return text.value_or("");
}

// Without a model too.
TEST(Inspect, EveryGoldenWouldLoad) {
  for (const auto& c : nlohmann::json::parse(std::ifstream(kGoldens / "variants" / "cases.json"))) {
    if (c.contains("adapters")) continue;
    const InspectReport report = InspectAdapter(kGoldens / "variants" / c["name"].get<std::string>());
    EXPECT_THAT(report.refusals, ::testing::IsEmpty()) << c["name"];
  }
}

// Layers, q's and o's widths, the MLP's, the head's outputs of the golden Llama.
constexpr double kLayers = 2, kHidden = 64, kInner = 96, kVocab = 320;

LoadedReport Report(const std::string& name) {
  auto source = ModelSource::Open(kGoldens / "models" / "llama");
  LK_CHECK(source.ok());
  const BaseModelView base(std::shared_ptr<const ModelSource>(*std::move(source)));
  auto files = ReadAdapterFiles(kGoldens / "variants" / name, {});
  LK_CHECK(files.ok());
  Problems problems;
  const RawAdapter raw = ParseAdapter(*std::move(files), &problems);
  const auto adapter = Normalise(raw, base, {.allow_dense = true});
  LK_CHECK_MSG(adapter.ok(), adapter.status().ToString());
  return InspectLoaded(**adapter, base, 1);
}

TEST(Inspect, EveryGoldenHasACostAndMemory) {
  for (const auto& c : nlohmann::json::parse(std::ifstream(kGoldens / "variants" / "cases.json"))) {
    if (c.contains("adapters")) continue;  // a mixture
    const std::string base = c["base"];
    const std::string text = Inspected(c["name"], base.substr(0, base.find(' ')));  // stacked as the adapter says
    EXPECT_THAT(text, HasSubstr("more multiply-adds a token than the base alone")) << c["name"];
    EXPECT_THAT(text, HasSubstr("on the host ")) << c["name"];
    EXPECT_THAT(text, HasSubstr("on a GPU    ")) << c["name"];
  }
}

TEST(Inspect, CostsAreThoseOfTheParts) {
  const double kv = Report("lora").groups[1].of_base / kLayers / kHidden;  // k's outputs
  const double of_base = kLayers * (2 * kHidden * kHidden + 2 * kHidden * kv + 3 * kHidden * kInner) + kHidden * kVocab;
  const LoadedReport lora = Report("lora");
  EXPECT_EQ(lora.of_base, of_base);
  ASSERT_EQ(lora.groups.size(), 7u);
  EXPECT_EQ(lora.groups[0].module, "model.layers.*.self_attn.q_proj");
  EXPECT_EQ(lora.groups[0].parts, "low rank");
  EXPECT_EQ(lora.groups[0].max_rank, 4);
  EXPECT_EQ(lora.multiply_adds, 4 * kLayers * (2 * 2 * kHidden + 2 * (kHidden + kv) + 3 * (kHidden + kInner)));
  const LoadedReport random = Report("randlora");
  EXPECT_EQ(random.multiply_adds, 2 * kLayers * kHidden * kHidden);  // twice q
  EXPECT_EQ(random.groups[0].of_base, kLayers * kHidden * kHidden);
  EXPECT_EQ(Report("hira").multiply_adds, kLayers * (kHidden * kHidden + kHidden * kv));
  EXPECT_EQ(Report("oft").multiply_adds, 2 * kLayers * kHidden * 8);
  EXPECT_EQ(Report("oft").groups[0].parts, "input rotation");
  EXPECT_EQ(Report("dora").groups[0].parts, "low rank, output scale");
  EXPECT_GT(Report("xlora").multiply_adds, of_base);  // a pass of the base besides
  const LoadedReport prompt = Report("prompt_tuning");
  EXPECT_THAT(prompt.beside, ::testing::ElementsAre("5 virtual tokens before every prompt"));
  EXPECT_EQ(prompt.multiply_adds, 0);
}

TEST(Inspect, WhatIsSharedDenseOrRefusedIsSaid) {
  EXPECT_THAT(Inspected("vera"), HasSubstr("once for all adapters that have the same"));
  EXPECT_THAT(Inspected("lora"), Not(HasSubstr("once for all")));
  EXPECT_THAT(Inspected("hira"), HasSubstr("dense       this adapter is a dense delta, which takes 32768 bytes"));
  EXPECT_THAT(Inspected("experts_lokr", "mixtral"), HasSubstr("on a GPU    refused: the adapter changes experts by more"));
  const auto other = InspectOnModel(kGoldens / "variants" / "lora", kGoldens / "models" / "mixtral");
  EXPECT_EQ(other.status().code(), absl::StatusCode::kNotFound) << other.status();
}

}  // namespace
}  // namespace lorikeet
