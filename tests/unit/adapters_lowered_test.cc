// Variants whose linears are lowered one by one, on several threads.
#include <cstdint>
#include <string>
#include <vector>

#include "tests/unit/adapter_directory.h"

namespace lorikeet {
namespace {

class LoweredAdapter : public testing::AdapterDirectory {
 protected:
  LoweredAdapter() {
    adapter_.config = {{"peft_type", "LORA"}, {"task_type", "CAUSAL_LM"}, {"r", 100},
                       {"target_modules", {"q_proj"}}, {"init_lora_weights", "pissa"}};
  }
  void PutQ(const std::string& layer, const std::string& factor, std::vector<int64_t> shape) {
    Put("base_model.model.model.layers." + layer + ".self_attn.q_proj." + factor + ".weight", shape);
  }
};

// Of two that fail the second is much faster, which must not show.
TEST_F(LoweredAdapter, OfLinearsThatDoNotFitTheFirstIsNamed) {
  const auto [in, out] = base_.shape(LayerModule(0, Linear::kQ));
  PutQ("0", "lora_A", {100, in});  // more ranks than W has
  PutQ("0", "lora_B", {out, 100});
  PutQ("1", "lora_A", {100, 1});
  PutQ("1", "lora_B", {1, 100});
  for (int i = 0; i < 50; ++i) {
    ExpectRefused(absl::StatusCode::kInvalidArgument, {"layers.0.self_attn.q_proj: rank 100 of "});
  }
}

// Which `all-linear` does not ask for.
TEST_F(LoweredAdapter, AnEmbeddingThatIsAskedForMustBeThere) {
  const auto [in, out] = base_.shape(LayerModule(0, Linear::kQ));
  adapter_.config = {{"peft_type", "LORA"}, {"task_type", "CAUSAL_LM"}, {"r", 2},
                     {"target_modules", {"layers.0.self_attn.q_proj", "embed_tokens"}}};
  PutQ("0", "lora_A", {2, in});
  PutQ("0", "lora_B", {out, 2});
  ExpectRefused(absl::StatusCode::kNotFound, {"target_modules asks for", "model.embed_tokens"});
  ExpectReported({"refused     target_modules asks for", "model.embed_tokens"});
  adapter_.config["target_modules"] = "all-linear";
  const absl::Status status = Load().status();
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("layers.0.self_attn.k_proj"));
  EXPECT_THAT(std::string(status.message()), ::testing::Not(::testing::HasSubstr("embed_tokens")));
}

// Whole modules and rows that the configuration names.
TEST_F(LoweredAdapter, WhatIsSavedBesideMustBeThere) {
  const auto [in, out] = base_.shape(LayerModule(0, Linear::kQ));
  adapter_.config = {{"peft_type", "LORA"}, {"task_type", "CAUSAL_LM"}, {"r", 2}, {"target_modules", {"layers.0.self_attn.q_proj"}}};
  PutQ("0", "lora_A", {2, in});
  PutQ("0", "lora_B", {out, 2});
  adapter_.config["modules_to_save"] = {"norm"};
  const std::vector<std::string> norms = {"layers.0.input_layernorm", "layers.0.post_attention_layernorm", "layers.1.input_layernorm",
                                          "layers.1.post_attention_layernorm", "norm"};
  for (const std::string& norm : norms) {
    ExpectRefused(absl::StatusCode::kNotFound, {"modules_to_save", "model." + norm});
    Put("base_model.model.model." + norm + ".weight", {in});
  }
  EXPECT_TRUE(Load().ok()) << Load().status();
  adapter_.config["modules_to_save"].push_back("lm_head");
  ExpectRefused(absl::StatusCode::kNotFound, {"no tensors for: lm_head"});
  adapter_.config["modules_to_save"] = {"norm"};
  adapter_.config["trainable_token_indices"] = {1, 2};
  ExpectRefused(absl::StatusCode::kNotFound, {"trainable_token_indices", "embed_tokens"});
}

// What a method's settings ask for beside its first tensors.
TEST_F(LoweredAdapter, PartsThatSettingsAskForMustBeThere) {
  const auto [in, out] = base_.shape(LayerModule(0, Linear::kQ));
  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj.";
  const auto start = [&](const char* type) {
    adapter_ = {};
    adapter_.config = {{"peft_type", type}, {"task_type", "CAUSAL_LM"}, {"r", 2}, {"target_modules", {"layers.0.self_attn.q_proj"}}};
  };
  start("GRALORA");
  Put(q + "gralora_A", {2, in / 2, 2});
  Put(q + "gralora_B", {2, 2, out / 2});
  EXPECT_TRUE(Load().ok()) << Load().status();
  adapter_.config["hybrid_r"] = 2;
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"hybrid_r asks for gralora_A_general"});
  start("GLORA");
  for (const char* part : {"A", "B", "D", "E"}) Put(q + "glora_" + part + ".X", {out, 1});
  EXPECT_TRUE(Load().ok()) << Load().status();
  adapter_.config["config_C"] = "vector";
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"config_C asks for glora_C"});
  start("LORA");
  PutQ("0", "lora_A", {2, in});
  PutQ("0", "lora_B", {out, 2});
  adapter_.config["kasa_config"] = {{"beta", 1e-4}, {"gamma", 1e-3}};
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"kasa_config asks for", "lora_diag"});
}

// Poly, of three tasks, two skills and one slice.
TEST_F(LoweredAdapter, ProjectionsThatAreNotSavedAreAskedFor) {
  const auto [in, out] = base_.shape(LayerModule(0, Linear::kQ));
  adapter_.config = {{"peft_type", "TINYLORA"}, {"r", 2}, {"u", 4}, {"weight_tying", 1.0},
                     {"target_modules", {"layers.0.self_attn.q_proj"}}};
  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_";
  Put("base_model.tinylora_v.0", {4});
  Put(q + "P", {4, 2, 2});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"no tinylora_A", "save_projection=True"});
  Put(q + "A", {2, in});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"no tinylora_B", "save_projection=True"});
  Put(q + "B", {out, 2});
  EXPECT_TRUE(Load().ok()) << Load().status();
}

TEST_F(LoweredAdapter, ATaskMustBeNamedAndThere) {
  const auto [in, out] = base_.shape(LayerModule(0, Linear::kQ));
  adapter_.config = {{"peft_type", "POLY"}, {"task_type", "CAUSAL_LM"}, {"r", 2}, {"target_modules", {"layers.0.self_attn.q_proj"}}};
  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj.poly_";
  Put(q + "lora_A", {1, 2, in, 2});
  Put(q + "lora_B", {1, 2, 2, out});
  Put(q + "router.module_logits", {3, 2});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"of 3 tasks", "add \"task_id\", 0 to 2"});
  for (const nlohmann::ordered_json& task : {nlohmann::ordered_json(3), {-1}, {1.5}, {"1"}}) {
    adapter_.config["task_id"] = task.is_array() ? task[0] : task;
    ExpectRefused(absl::StatusCode::kInvalidArgument, {"task_id is ", "tasks 0 to 2"});
  }
  adapter_.config["task_id"] = 2;
  EXPECT_TRUE(Load().ok());
  EXPECT_THAT(warnings_, ::testing::IsEmpty());
}

// Factors that are tensor trains: a chain from one to one whose sizes are those of the matrix.
TEST_F(LoweredAdapter, TrainsMustMeetAndFit) {
  const auto [in, out] = base_.shape(LayerModule(0, Linear::kQ));
  adapter_.config = {{"peft_type", "LORETTA"}, {"task_type", "CAUSAL_LM"}, {"r", 4}, {"target_modules", {"layers.0.self_attn.q_proj"}}};
  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj.";
  const auto put = [&](const std::string& factor, std::vector<std::vector<int64_t>> cores) {
    for (size_t k = 0; k < cores.size(); ++k) Put(q + factor + ".cores." + std::to_string(k), cores[k]);
  };
  put("lora_A", {{1, in / 2, 3}, {3, 2, 2}, {2, 4, 1}});
  put("lora_B", {{1, 4, 2}, {2, out, 1}});
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ((*loaded)->modules[LayerModule(0, Linear::kQ)].low_rank.rank, 4);
  put("lora_A", {{1, in / 2, 3}, {2, 2, 2}});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"lora_A: core 1 is [2, 2, 2], behind one that ends in 3"});
  put("lora_A", {{1, in / 2, 3}, {3, 2, 2}, {2, 4, 2}});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"core 2 is [2, 4, 2]", "the last ends in 1"});
  put("lora_A", {{1, in / 2, 3}, {3, 2, 2}, {2, 5, 1}});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"lora_B: the train has ", "no matrix [5, "});
  put("lora_A", {{1, in / 2, 3}, {3, 2, 2}, {2, 4, 1}});
  adapter_.config["r"] = 8;
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"r is 8, the rank of its tensors 4"});
  adapter_.tensors.erase(q + "lora_B.cores.1");
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"lora_B: core 0"});
  adapter_.tensors.erase(q + "lora_A.cores.0");
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"no tensor lora_A.cores.0"});
}

TEST_F(LoweredAdapter, ATiedPairMustBeWideEnough) {
  const auto [in, out] = base_.shape(LayerModule(0, Linear::kQ));
  adapter_.config = {{"peft_type", "TIED_LORA"}, {"task_type", "CAUSAL_LM"}, {"r", 3}, {"target_modules", {"layers.0.self_attn.q_proj"}}};
  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj.tied_lora_";
  Put("base_model.tied_lora_A", {3, in + 5});
  Put("base_model.tied_lora_B", {out + 7, 3});
  Put(q + "u", {3});
  Put(q + "v", {out});
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ((*loaded)->modules[LayerModule(0, Linear::kQ)].low_rank.rank, 3);
  Put("base_model.tied_lora_B", {out - 1, 3});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"smaller than this linear"});
  adapter_.tensors.erase(q + "u");
  Put("base_model.tied_lora_B", {out, 3});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"no tensor tied_lora_u"});
}

}  // namespace
}  // namespace lorikeet
