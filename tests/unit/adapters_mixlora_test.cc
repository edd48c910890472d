// MixLoRA's directories: what loads, and what is refused with which words.
#include <string>
#include <tuple>
#include <vector>

#include "adapters_cache/mixer.h"
#include "tests/unit/adapter_directory.h"

namespace lorikeet {
namespace {

class MixLora : public testing::AdapterDirectory {
 protected:
  // Two experts of rank 2 on up_proj, of which one is chosen, and rank 2 on q_proj.
  MixLora() {
    adapter_.config = {{"peft_type", "MIXLORA"}, {"task_type", "CAUSAL_LM"}, {"r", 2}, {"lora_alpha", 4},
                       {"lora_dropout", 0.05}, {"target_modules", {"q_proj", "up_proj"}},
                       {"routing_strategy", "mixlora"}, {"num_experts", 2}, {"top_k", 1},
                       {"act_fn", "silu"}};
    for (const std::string layer : {"0", "1"}) {
      const std::string prefix = "mixlora.layers." + layer + ".";
      Put(prefix + "mlp.moe_gate.weight", {2, 16});
      Pair(prefix + "self_attn.q_proj", 16, 16);
      for (const std::string expert : {"0", "1"}) Pair(prefix + "mlp.up_proj.experts." + expert, 16, 24);
    }
  }

  void Pair(const std::string& linear, int64_t in, int64_t out) {
    Put(linear + ".lora_A.weight", {2, in});
    Put(linear + ".lora_B.weight", {out, 2});
  }
};

TEST_F(MixLora, ExpertsAreAdaptersOfTheMlpAlone) {
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const Adapter& adapter = **loaded;
  EXPECT_TRUE(warnings_.empty()) << warnings_.front();
  EXPECT_EQ(adapter.variant, "mixlora");
  EXPECT_EQ(adapter.kv_sets(), 1);
  EXPECT_TRUE(adapter.cacheable);
  const ModuleId q = LayerModule(1, Linear::kQ), up = LayerModule(1, Linear::kUp);
  EXPECT_EQ(adapter.module(q).low_rank.rank, 2);
  EXPECT_EQ(adapter.module(up).low_rank.rank, 0);
  const MlpMixture& mixture = adapter.mlp_mixture;
  EXPECT_EQ(mixture.chosen, 1);
  ASSERT_EQ(mixture.experts.size(), 2);
  ASSERT_EQ(mixture.routers.size(), 2);
  int64_t bytes = 2 * 2 * 16 * 4;
  for (const auto& expert : mixture.experts) {
    EXPECT_EQ(expert->module(q).low_rank.rank, 0);
    EXPECT_EQ(expert->module(up).low_rank.rank, 2);
    EXPECT_EQ(expert->module(up).low_rank.scale, 2);
    bytes += expert->bytes;
  }
  EXPECT_GT(adapter.bytes, bytes);
  EXPECT_STREQ(Unsummable(adapter), "routers over its LoRAs");
}

TEST_F(MixLora, TargetsMayBeAnObject) {
  adapter_.config["target_modules"] = {{"q_proj", true}, {"up_proj", true}, {"down_proj", false}};
  EXPECT_TRUE(Load().ok());
}

TEST_F(MixLora, NothingOfTheFileIsLost) {
  Put("mixlora.layers.0.mlp.up_proj.experts.2.lora_A.weight", {2, 16});
  Put("mixlora.layers.00.mlp.moe_gate.weight", {2, 16});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"2 tensors have no place", "experts.2", "layers.00"});
}

TEST_F(MixLora, WhatIsMissingIsNamedWithItsExpert) {
  adapter_.tensors.erase("mixlora.layers.1.mlp.up_proj.experts.1.lora_B.weight");
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"expert 1", "up_proj"});
  adapter_.tensors.erase("mixlora.layers.1.mlp.up_proj.experts.1.lora_A.weight");
  ExpectRefused(absl::StatusCode::kNotFound, {"expert 1", "model.layers.1.mlp.up_proj"});
}

TEST_F(MixLora, RoutersMustFitTheBase) {
  Put("mixlora.layers.2.mlp.moe_gate.weight", {2, 16});
  ExpectRefused(absl::StatusCode::kNotFound, {"2 layers", "layers.2.mlp.moe_gate"});
  adapter_.tensors.erase("mixlora.layers.2.mlp.moe_gate.weight");
  Put("mixlora.layers.1.mlp.moe_gate.weight", {2, 15});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"[2, 15]", "[2, 16]"});
  adapter_.tensors.erase("mixlora.layers.1.mlp.moe_gate.weight");
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"no router", "layer 1"});
}

TEST_F(MixLora, SettingsAreChecked) {
  const auto config = adapter_.config;
  const std::vector<std::tuple<const char*, nlohmann::ordered_json, absl::StatusCode>> bad = {
      {"top_k", 3, absl::StatusCode::kInvalidArgument},
      {"num_experts", 65, absl::StatusCode::kInvalidArgument},
      {"num_experts", nullptr, absl::StatusCode::kInvalidArgument},
      {"target_modules", {"q_proj"}, absl::StatusCode::kInvalidArgument},
      {"target_modules", "all-linear", absl::StatusCode::kInvalidArgument},
      {"routing_strategy", "mixlora-switch", absl::StatusCode::kUnimplemented},
      {"act_fn", "relu", absl::StatusCode::kUnimplemented},
      {"use_dora", true, absl::StatusCode::kUnimplemented},
      {"expert_lora", {{"r", 4}}, absl::StatusCode::kUnimplemented}};
  for (const auto& [key, value, code] : bad) {
    adapter_.config = config;
    adapter_.config[key] = value;
    ExpectRefused(code, {key});
  }
  adapter_.config = config;
  adapter_.config["jitter_noise"] = 0.1;
  EXPECT_TRUE(Load().ok());
  EXPECT_EQ(warnings_.size(), 1);
}

TEST_F(MixLora, InspectionListsTheExperts) {
  ASSERT_TRUE(Load().ok());
  ExpectReported({"self_attn.q_proj", "1/mlp.up_proj", "loads"});
}

}  // namespace
}  // namespace lorikeet
