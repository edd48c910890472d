// X-LoRA's directories: what loads, and what is refused with which words.
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "adapters_cache/mixer.h"
#include "tests/unit/adapter_directory.h"

namespace lorikeet {
namespace {

using testing::TestAdapter;

const std::string kClassifier = "base_model.internal_xlora_classifier.layers.";

class GatedAdapter : public testing::AdapterDirectory {
 protected:
  // Two experts on two linears a layer, of which one has q alone; a classifier of two layers.
  GatedAdapter() {
    adapter_.config = {{"peft_type", "XLORA"}, {"task_type", "CAUSAL_LM"}, {"hidden_size", 16},
                       {"adapters", {{"0", "x"}, {"1", "y"}}}, {"xlora_depth", 2},
                       {"xlora_size", 8}, {"xlora_dropout_p", 0.0}, {"layerwise_scalings", true}};
    Put(kClassifier + "0.weight", {8, 16});
    Put(kClassifier + "0.bias", {8});
    Put(kClassifier + "2.weight", {2 * 4, 8});
    Put(kClassifier + "2.bias", {2 * 4});
    experts_ = {{"0", TestAdapter::Lora(base_, {"q_proj", "down_proj"}, 4, 1)},
                {"1", TestAdapter::Lora(base_, {"q_proj"}, 3, 2)}};
  }
};

TEST_F(GatedAdapter, EveryRankKnowsItsExpertAndEveryLinearItsGates) {
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_TRUE(warnings_.empty()) << warnings_.front();
  const Adapter& adapter = **loaded;
  EXPECT_EQ(adapter.variant, "xlora");
  EXPECT_EQ(adapter.kv_sets(), 2);
  EXPECT_FALSE(adapter.cacheable);
  EXPECT_EQ(adapter.gating.sets, 4);
  for (int layer = 0; layer < 2; ++layer) {
    const ModuleDelta& q = adapter.modules[LayerModule(layer, Linear::kQ)];
    ASSERT_EQ(q.low_rank.rank, 7);
    EXPECT_EQ(std::vector<int32_t>(q.rank_gate, q.rank_gate + 7),
              (std::vector<int32_t>{0, 0, 0, 0, 1, 1, 1}));
    EXPECT_EQ(adapter.gating.set_of[LayerModule(layer, Linear::kQ)], 2 * layer);
    EXPECT_EQ(adapter.modules[LayerModule(layer, Linear::kDown)].low_rank.rank, 4);
    EXPECT_EQ(adapter.gating.set_of[LayerModule(layer, Linear::kDown)], 2 * layer + 1);
  }
  EXPECT_STREQ(Unsummable(adapter), "gates per token");
}

// The version is of the experts too.
TEST_F(GatedAdapter, AnotherExpertIsAnotherVersion) {
  const auto one = Load();
  experts_["1"] = TestAdapter::Lora(base_, {"q_proj"}, 3, 5);
  const auto other = Load();
  ASSERT_TRUE(one.ok() && other.ok());
  EXPECT_NE((*one)->version, (*other)->version);
}

TEST_F(GatedAdapter, WhatPeftLeavesOutOfItsFilesIsMissed) {
  adapter_.tensors.erase(kClassifier + "0.weight");
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"classifier is not whole", "layers.0.weight"});
}

TEST_F(GatedAdapter, AnExpertThatIsNotThereIsNamedWithItsPlace) {
  adapter_.config["adapters"]["2"] = "z";
  ExpectRefused(absl::StatusCode::kNotFound, {"expert '2'", (dir_.path() / "2").string()});
}

TEST_F(GatedAdapter, NamesDoNotLeadOutOfTheDirectory) {
  adapter_.config["adapters"] = {{"../0", "x"}};
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"../0"});
}

TEST_F(GatedAdapter, OnlyPairsHaveGates) {
  experts_["1"].MakeDora();
  ExpectRefused(absl::StatusCode::kUnimplemented, {"expert 1", "DoRA"});
}

TEST_F(GatedAdapter, TheClassifierMustFitBaseExpertsAndLinears) {
  Put(kClassifier + "2.weight", {2, 8});
  Put(kClassifier + "2.bias", {2});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"to 2 values", "4 linears take 8"});
  adapter_.config["layerwise_scalings"] = false;
  EXPECT_TRUE(Load().ok());
  Put(kClassifier + "0.weight", {8, 15});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"from 15", "have 16"});
  Put(kClassifier + "0.weight", {7, 16});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"no linear of floats"});
}

TEST_F(GatedAdapter, SettingsAreChecked) {
  const auto config = adapter_.config;
  const std::vector<std::tuple<const char*, nlohmann::ordered_json, absl::StatusCode>> bad = {
      {"top_k_lora", 3, absl::StatusCode::kInvalidArgument},
      {"softmax_temperature", 0, absl::StatusCode::kInvalidArgument},
      {"enable_softmax", 1, absl::StatusCode::kInvalidArgument},
      {"xlora_depth", 0, absl::StatusCode::kInvalidArgument},
      {"scaling_pass_value", 0.5, absl::StatusCode::kUnimplemented},
      {"adapters", "x", absl::StatusCode::kInvalidArgument}};
  for (const auto& [key, value, code] : bad) {
    adapter_.config = config;
    adapter_.config[key] = value;
    ExpectRefused(code, {key});
  }
}

TEST_F(GatedAdapter, InspectionListsTheExperts) {
  ASSERT_TRUE(Load().ok());
  ExpectReported({"0/self_attn.q_proj", "1/self_attn.q_proj", "loads"});
}

}  // namespace
}  // namespace lorikeet
