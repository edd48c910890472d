// MoLE's directories: what loads, and what is refused with which words.
#include <string>
#include <vector>

#include "adapters_cache/mixer.h"
#include "tests/unit/adapter_directory.h"

namespace lorikeet {
namespace {

using testing::TestAdapter;

class MoleAdapter : public testing::AdapterDirectory {
 protected:
  // Two LoRAs, one of them on the second linear alone.
  MoleAdapter() {
    adapter_.config = {{"peft_type", "MOLE"}, {"task_type", "CAUSAL_LM"}, {"temperature", 0.5},
                       {"adapters", {{"first", "a"}, {"second", "b"}}}};
    experts_["first"] = TestAdapter::Lora(base_, {"q_proj", "down_proj"}, 3, 1);
    experts_["second"] = TestAdapter::Lora(base_, {"down_proj"}, 2, 2);
    for (int layer = 0; layer < base_.layers(); ++layer) {
      for (const Linear linear : {Linear::kQ, Linear::kDown}) PutGate(LayerModule(layer, linear), 2);
    }
  }
  std::string Gate(ModuleId id) const { return "base_model.model." + base_.path(id) + ".mole_gate.weight"; }
  void PutGate(ModuleId id, int64_t experts) { Put(Gate(id), {experts, base_.shape(id).in}); }
};

TEST_F(MoleAdapter, EveryLinearHasItsGatesAndRanksTheirLora) {
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_THAT(warnings_, ::testing::IsEmpty());
  const Adapter& adapter = **loaded;
  EXPECT_EQ(adapter.variant, "mole");
  EXPECT_TRUE(adapter.cacheable);
  EXPECT_EQ(adapter.kv_sets(), 1);
  EXPECT_EQ(adapter.prototype_gates.chosen, 2);
  EXPECT_FALSE(adapter.prototype_gates.magnitudes);
  const ModuleDelta& down = adapter.modules[LayerModule(1, Linear::kDown)];
  ASSERT_EQ(down.low_rank.rank, 5);
  EXPECT_EQ(std::vector<int32_t>(down.rank_gate, down.rank_gate + 5), (std::vector<int32_t>{0, 0, 0, 1, 1}));
  EXPECT_EQ(down.prototypes[0], 0.5f);
  EXPECT_EQ(adapter.modules[LayerModule(1, Linear::kQ)].low_rank.rank, 3);
  EXPECT_EQ(adapter.modules[LayerModule(1, Linear::kK)].prototypes, nullptr);
  EXPECT_STREQ(Unsummable(adapter), "gates per token");
}

TEST_F(MoleAdapter, GatesAreOfTheLinearsThatHaveLoras) {
  PutGate(LayerModule(0, Linear::kV), 2);
  ExpectRefused(absl::StatusCode::kNotFound, {"no LoRA is on the linears of ", "layers.0.self_attn.v_proj.mole_gate"});
  adapter_.tensors.erase(Gate(LayerModule(0, Linear::kV)));
  PutGate(LayerModule(0, Linear::kQ), 3);
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"q_proj.mole_gate.weight is F32 [3, ", "needed are floats [2, "});
  adapter_.tensors.erase(Gate(LayerModule(0, Linear::kQ)));
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"no gate for model.layers.0.self_attn.q_proj"});
}

TEST_F(MoleAdapter, NothingElseIsInTheFile) {
  Put("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", {2, 2});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"1 tensors have no place"});
  adapter_.tensors.erase("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
  Put("base_model.model.model.layers.0.self_attn.q_proj.mole_gate.default.weight", {2, 2});  // once more
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"1 tensors have no place"});
}

TEST_F(MoleAdapter, SettingsAreChecked) {
  adapter_.config["temperature"] = 0;
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"temperature must be above 0"});
  adapter_.config["adapters"] = nlohmann::ordered_json::object();
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"names no LoRAs"});
  adapter_.config["adapters"] = {{"third", "c"}};
  ExpectRefused(absl::StatusCode::kNotFound, {"the expert 'third' is not there"});
}

TEST_F(MoleAdapter, OnlyPairsHaveGates) {
  experts_["second"].MakeDora();
  ExpectRefused(absl::StatusCode::kUnimplemented, {"expert 1 has "});
}

}  // namespace
}  // namespace lorikeet
