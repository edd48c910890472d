// Directories from files to Adapter: what loads, and what is refused with which words.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/inspect.h"
#include "adapters_cache/normalise.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"
#include "tests/unit/adapters_support.h"

namespace lorikeet {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::PeftName;
using testing::TempDir;
using testing::TensorSpec;
using testing::TestAdapter;
using testing::TestBase;
using testing::WriteFile;
namespace fs = std::filesystem;

struct Loaded {
  std::shared_ptr<const Adapter> adapter;
  std::vector<std::string> warnings;
};

absl::StatusOr<Loaded> Load(const fs::path& directory, const BaseModel& base,
                            FactorPrecision precision = FactorPrecision::kFile) {
  LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadAdapterFiles(directory, {}));
  Problems problems;
  const RawAdapter raw = ParseAdapter(std::move(files), &problems);
  LK_RETURN_IF_ERROR(problems.ToStatus());
  LK_ASSIGN_OR_RETURN(auto adapter, Normalise(raw, base, {precision}));
  return Loaded{std::move(adapter), raw.warnings};
}

const std::string kQ0 = "model.layers.0.self_attn.q_proj";
const std::string kQ1 = "model.layers.1.self_attn.q_proj";

class AdapterLoad : public ::testing::Test {
 protected:
  absl::StatusOr<Loaded> WriteAndLoad(const TestAdapter& adapter,
                                      FactorPrecision precision = FactorPrecision::kFile) {
    adapter.Write(dir_.path());
    return Load(dir_.path(), base_, precision);
  }

  const TestBase base_ = TestBase::Random(2);
  const TempDir dir_;
  TestAdapter adapter_ = TestAdapter::Lora(base_, {"q_proj", "down_proj"}, 4, 1);
};

TEST_F(AdapterLoad, NamesLoadWithAndWithoutPrefixAndAdapterName) {
  const auto plain = WriteAndLoad(adapter_);
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_THAT(plain->warnings, IsEmpty());
  for (const auto& [from, to] :
       {std::pair{"base_model.model.", ""}, {".weight", ".default.weight"}}) {
    TestAdapter renamed{adapter_.config, {}};
    for (const auto& [name, tensor] : adapter_.tensors) {
      std::string other = name;
      other.replace(other.find(from), std::string(from).size(), to);
      renamed.tensors[other] = tensor;
    }
    const auto loaded = WriteAndLoad(renamed);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    const AlignedBuffer& a = plain->adapter->storage;
    const AlignedBuffer& b = loaded->adapter->storage;
    ASSERT_EQ(a.size(), b.size());
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size()), 0) << to;
  }
}

TEST_F(AdapterLoad, VersionIgnoresLayoutAndSeesEveryValueNameAndOption) {
  const auto version = [this](const TestAdapter& adapter) {
    adapter.Write(dir_.path());
    return ReadAdapterFiles(dir_.path(), {}).value().version;
  };
  const std::string original = version(adapter_);
  EXPECT_EQ(original.size(), 64);
  EXPECT_THAT(original, ::testing::MatchesRegex("[0-9a-f]*"));
  WriteFile(dir_.path() / "adapter_config.json", "\n" + adapter_.config.dump(7) + "  ");
  EXPECT_EQ(ReadAdapterFiles(dir_.path(), {}).value().version, original);

  TestAdapter option = adapter_;
  option.config["lora_alpha"] = 9;
  EXPECT_NE(version(option), original);
  TestAdapter value = adapter_;
  value.tensors.rbegin()->second.values.back() += 1;
  EXPECT_NE(version(value), original);
  TestAdapter shape = adapter_;  // the same bytes in another shape
  std::swap(shape.tensors.begin()->second.shape[0], shape.tensors.begin()->second.shape[1]);
  EXPECT_NE(version(shape), original);
  TestAdapter name = adapter_;  // the same bytes under another name
  auto node = name.tensors.extract(name.tensors.begin());
  node.key() += "x";
  name.tensors.insert(std::move(node));
  EXPECT_NE(version(name), original);
}

TEST_F(AdapterLoad, FactorsOfTwoTypesWiden) {
  adapter_.tensors[PeftName(kQ0, "lora_A.weight")].dtype = DType::kF16;
  adapter_.tensors[PeftName(kQ0, "lora_B.weight")].dtype = DType::kBF16;
  const auto loaded = WriteAndLoad(adapter_);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const LowRank& pair = loaded->adapter->modules[LayerModule(0, Linear::kQ)].low_rank;
  ASSERT_EQ(pair.dtype, DType::kF32);
  const auto& a = adapter_.tensors[PeftName(kQ0, "lora_A.weight")].values;
  const auto& b = adapter_.tensors[PeftName(kQ0, "lora_B.weight")].values;
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 16; ++i) {
      EXPECT_EQ(reinterpret_cast<const float*>(pair.a)[k * pair.a_stride + i], a[k * 16 + i]);
      EXPECT_EQ(reinterpret_cast<const float*>(pair.b)[k * pair.b_stride + i], b[i * 4 + k]);
    }
  }
}

TEST_F(AdapterLoad, StorageHoldsTheFactorsAtTheirOwnRank) {
  adapter_.config["rank_pattern"] = {{"layers.1.self_attn.q_proj", 1}};
  for (const char* parameter : {"lora_A.weight", "lora_B.weight"}) {
    auto& tensor = adapter_.tensors[PeftName(kQ1, parameter)];
    tensor.shape = parameter[5] == 'A' ? std::vector<int64_t>{1, 16} : std::vector<int64_t>{16, 1};
    tensor.values.resize(16);
  }
  const auto loaded = WriteAndLoad(adapter_);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  // q: in = out = 16 floats, one cache line a row; down: 24 and 16 floats, two lines and one.
  EXPECT_EQ(loaded->adapter->bytes, 4 * (64 + 64) + 1 * (64 + 64) + 2 * 4 * (128 + 64));
  EXPECT_EQ(loaded->adapter->max_rank, 4);
  EXPECT_EQ(loaded->adapter->modules[LayerModule(1, Linear::kQ)].low_rank.rank, 1);
}

TEST_F(AdapterLoad, SurplusModulesOfTheFileApplyWithAWarning) {
  adapter_.config["target_modules"] = {"down_proj"};
  const auto loaded = WriteAndLoad(adapter_);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_THAT(loaded->warnings, Contains(HasSubstr(kQ0)));
  EXPECT_EQ(loaded->adapter->modules[LayerModule(0, Linear::kQ)].low_rank.rank, 4);
}

TEST_F(AdapterLoad, UnknownKeysWarnOnlyWhenTheySaySomething) {
  adapter_.config["use_something_new"] = true;
  adapter_.config["another_new_option"] = nullptr;
  adapter_.config["and_one_more"] = false;
  const auto loaded = WriteAndLoad(adapter_);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_EQ(loaded->warnings.size(), 1);
  EXPECT_THAT(loaded->warnings[0], HasSubstr("'use_something_new'"));
}

// Of GPT-2's Conv1D alone, whose models are not served; PEFT too unsets it on linears.
TEST_F(AdapterLoad, FanInFanOutChangesNothingAndIsNamed) {
  const auto plain = WriteAndLoad(adapter_);
  adapter_.config["fan_in_fan_out"] = true;
  const auto loaded = WriteAndLoad(adapter_);
  ASSERT_TRUE(plain.ok() && loaded.ok()) << loaded.status();
  EXPECT_THAT(loaded->warnings, Contains(HasSubstr("fan_in_fan_out")));
  const AlignedBuffer &a = plain->adapter->storage, &b = loaded->adapter->storage;
  EXPECT_TRUE(std::equal(a.data(), a.data() + a.size(), b.data(), b.data() + b.size()));
}

// ---- what is refused

TEST_F(AdapterLoad, AnAdapterOfConv1dFindsNoPlace) {
  adapter_.config["fan_in_fan_out"] = true;
  adapter_.config["target_modules"] = {"c_attn"};
  const TensorSpec a{DType::kF32, {4, 16}, std::vector<float>(64, 1)};
  const TensorSpec b{DType::kF32, {48, 4}, std::vector<float>(192, 1)};
  adapter_.tensors = {{PeftName("transformer.h.0.attn.c_attn", "lora_A.weight"), a},
                      {PeftName("transformer.h.0.attn.c_attn", "lora_B.weight"), b}};
  const auto loaded = WriteAndLoad(adapter_);
  EXPECT_TRUE(absl::IsNotFound(loaded.status())) << loaded.status();
  EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("transformer.h.0.attn.c_attn"));
}

struct BadCase {
  const char* name;
  std::function<void(TestAdapter*)> damage;
  absl::StatusCode code;
  std::vector<std::string> says;
  bool inspect_sees = true;  // without a base model
};
void PrintTo(const BadCase& c, std::ostream* os) { *os << c.name; }

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnserved = absl::StatusCode::kUnimplemented;
constexpr auto kMissing = absl::StatusCode::kNotFound;

auto Set(const char* key, nlohmann::ordered_json value) {
  return [key, value](TestAdapter* adapter) { adapter->config[key] = value; };
}
testing::TensorSpec& TensorOf(TestAdapter* adapter, const std::string& path,
                              const char* parameter) {
  return adapter->tensors.at(PeftName(path, parameter));
}
void Rename(TestAdapter* adapter, const std::string& from, const std::string& to) {
  auto node = adapter->tensors.extract(from);
  node.key() = to;
  adapter->tensors.insert(std::move(node));
}
void Resize(testing::TensorSpec* tensor, std::vector<int64_t> shape) {
  int64_t elements = 1;
  for (int64_t d : shape) elements *= d;
  tensor->shape = std::move(shape);
  tensor->values.resize(elements);
}

const std::vector<BadCase>& BadCases() {
  static const auto* cases = new std::vector<BadCase>{
      {"peft_type_not_served", Set("peft_type", "SHADOW"), kUnserved, {"SHADOW", "not served"}},
      {"peft_type_unknown", Set("peft_type", "FOO"), kUnserved, {"'FOO'", "unknown"}},
      {"peft_type_absent",
       [](TestAdapter* a) { a->config.erase("peft_type"); },
       kInvalid,
       {"peft_type"}},
      {"adapterhub",
       [](TestAdapter* a) {
         a->config = {{"config", {{"non_linearity", "relu"}}}, {"hidden_size", 16}};
       },
       kInvalid,
       {"no place"}},
      {"alora", Set("alora_invocation_tokens", {1, -2}), kInvalid, {"alora_invocation_tokens"}},
      {"arrow", Set("arrow_config", {{"top_k", 3}}), kInvalid, {"task_adapter_names"}},
      {"bdlora", Set("use_bdlora", {{"nblocks", 3}}), kInvalid, {"nblocks 3"}, false},
      {"parameters", Set("target_parameters", {"experts.gate_up_proj"}), kMissing,
       {"no experts.gate_up_proj"}, false},
      {"parameter_names", Set("target_parameters", {1}), kInvalid, {"target_parameters is [1]"}},
      {"replication", Set("layer_replication", {{0, 2}, {1, 2}}), absl::StatusCode::kFailedPrecondition, {"--layer-replication '[[0,2],[1,2]]'"}, false},
      {"replication_form", Set("layer_replication", {{2, 0}}), kInvalid, {"'[[2,0]]' is not a list of ranges"}},
      {"modules_to_save", Set("modules_to_save", {3}), kInvalid, {"modules_to_save"}},
      {"tokens", Set("trainable_token_indices", {-1}), kInvalid, {"trainable_token_indices"}},
      {"megatron", Set("megatron_config", {{"x", 1}}), kUnserved, {"megatron_config"}},
      {"pissa", Set("init_lora_weights", "pissa_niter_4"), kUnserved, {"pissa_niter_4", "Convert"}},
      {"upper_case_init", Set("init_lora_weights", "CorDA"), kUnserved, {"corda", "Convert"}},
      {"corda", Set("init_lora_weights", "corda"), kUnserved, {"corda"}},
      {"loftq", Set("init_lora_weights", "loftq"), kUnserved, {"loftq"}},
      {"lora_ga", Set("init_lora_weights", "lora_ga"), kUnserved, {"lora_ga"}},
      {"init_unknown", Set("init_lora_weights", "new"), kUnserved, {"'new'", "unknown"}},
      {"task", Set("task_type", "SEQ_CLS"), kUnserved, {"SEQ_CLS", "CAUSAL_LM"}},
      {"r_zero", Set("r", 0), kInvalid, {"r is 0", "4096"}},
      {"r_fraction", Set("r", 2.5), kInvalid, {"r is 2.5"}},
      {"r_large", Set("r", 5000), kInvalid, {"5000", "4096"}},
      {"r_text", Set("r", "8"), kInvalid, {"r is \"8\""}},
      {"alpha_text", Set("lora_alpha", "x"), kInvalid, {"lora_alpha", "\"x\""}},
      {"alpha_huge", Set("lora_alpha", 1e300), kInvalid, {"lora_alpha", "out of range"}},
      {"rank_pattern_zero",
       Set("rank_pattern", {{"q_proj", 0}}),
       kInvalid,
       {kQ0, "rank_pattern gives 0"}},
      {"rank_pattern_type",
       Set("rank_pattern", {{"q_proj", "a"}}),
       kInvalid,
       {"rank_pattern['q_proj']"}},
      {"rank_pattern_disagrees",
       Set("rank_pattern", {{"q_proj", 2}}),
       kInvalid,
       {PeftName(kQ0, "lora_A.weight"), "[4, 16]", "[2, in]"}},
      {"lookaround",
       Set("target_modules", "(?<=x)q_proj"),
       kUnserved,
       {"target_modules", "(?<=x)q_proj", "look-around"}},
      {"target_type", Set("target_modules", 3), kInvalid, {"target_modules"}},
      {"target_entry", Set("target_modules", {1}), kInvalid, {"target_modules lists 1"}},
      {"layers_with_regex",
       [](TestAdapter* a) {
         a->config["target_modules"] = ".*";
         a->config["layers_to_transform"] = {0};
       },
       kInvalid,
       {"layers_to_transform"}},
      {"layers_pattern_alone", Set("layers_pattern", "layers"), kInvalid, {"layers_pattern"}},
      {"bias_value", Set("bias", "some"), kInvalid, {"\"some\"", "lora_only"}},
      {"dora_with_lora_bias",
       [](TestAdapter* a) {
         a->MakeDora();
         a->config["lora_bias"] = true;
       },
       kInvalid,
       {"lora_bias", "use_dora"}},
      {"flag_type", Set("use_dora", "yes"), kInvalid, {"use_dora", "\"yes\""}},

      {"unused_tensor",
       [](TestAdapter* a) {
         a->tensors["base_model.model.foo"] = {DType::kF32, {1}, {1}};
       },
       kInvalid,
       {"1 tensors", "base_model.model.foo"}},
      {"magnitude_without_dora",
       [](TestAdapter* a) {
         a->MakeDora();
         a->config["use_dora"] = false;
       },
       kInvalid,
       {"4 tensors", PeftName(kQ0, "lora_magnitude_vector")}},
      {"bias_without_option",
       [](TestAdapter* a) {
         a->tensors[PeftName(kQ0, "lora_B.bias")] = {DType::kF32, {16}, std::vector<float>(16)};
       },
       kInvalid,
       {PeftName(kQ0, "lora_B.bias")}},
      {"embedding",
       [](TestAdapter* a) {
         a->tensors[PeftName("model.embed_tokens", "lora_embedding_A")] = {
             DType::kF32, {4, 40}, std::vector<float>(160)};
         a->tensors[PeftName("model.embed_tokens", "base_layer.weight")] = {
             DType::kF32, {40, 16}, std::vector<float>(640)};
       },
       kInvalid,
       {"model.embed_tokens has no lora_B"}},
      {"integers",
       [](TestAdapter* a) { a->tensors[PeftName(kQ0, "lora_A.weight")].dtype = DType::kI32; },
       kInvalid,
       {PeftName(kQ0, "lora_A.weight"), "I32"}},
      {"no_lora_b",
       [](TestAdapter* a) { a->tensors.erase(PeftName(kQ0, "lora_B.weight")); },
       kInvalid,
       {kQ0 + " has no lora_B.weight"}},
      {"no_magnitude",
       [](TestAdapter* a) {
         a->MakeDora();
         a->tensors.erase(PeftName(kQ1, "lora_magnitude_vector"));
       },
       kInvalid,
       {kQ1 + " has no lora_magnitude_vector"}},
      {"no_lora_bias", Set("lora_bias", true), kInvalid, {kQ0 + " has no lora_B.bias"}},
      {"no_tensors", [](TestAdapter* a) { a->tensors.clear(); }, kInvalid, {"no LoRA tensors"}},
      {"two_for_one",
       [](TestAdapter* a) {
         a->tensors[kQ0 + ".lora_A.weight"] = TensorOf(a, kQ0, "lora_A.weight");
       },
       kInvalid,
       {"two tensors", kQ0 + ".lora_A.weight"}},
      {"three_dimensions",
       [](TestAdapter* a) {
         Resize(&TensorOf(a, kQ0, "lora_A.weight"), {4, 4, 4});
       },
       kInvalid,
       {PeftName(kQ0, "lora_A.weight"), "[4, 4, 4]"}},

      {"targeted_without_tensors",
       Set("target_modules", {"q_proj", "down_proj", "v_proj"}),
       kMissing,
       {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"}},
      {"layer_beyond_the_base",
       [](TestAdapter* a) {
         for (const char* p : {"lora_A.weight", "lora_B.weight"}) {
           Rename(a, PeftName(kQ1, p), PeftName("model.layers.7.self_attn.q_proj", p));
         }
       },
       kMissing,
       {"2 layers", "model.layers.7.self_attn.q_proj"}},
      {"module_of_another_model",
       [](TestAdapter* a) {
         for (const char* p : {"lora_A.weight", "lora_B.weight"}) {
           Rename(a, PeftName(kQ1, p), PeftName("transformer.h.0.attn.c_attn", p));
         }
       },
       kMissing,
       {"transformer.h.0.attn.c_attn"}},
      {"wrong_in",
       [](TestAdapter* a) {
         Resize(&TensorOf(a, kQ0, "lora_A.weight"), {4, 17});
       },
       kInvalid,
       {PeftName(kQ0, "lora_A.weight"), "[4, 17]", "[4, 16]"}},
      {"wrong_out_everywhere",
       [](TestAdapter* a) {
         Resize(&TensorOf(a, kQ0, "lora_B.weight"), {8, 4});
         Resize(&TensorOf(a, kQ1, "lora_B.weight"), {8, 4});
       },
       kInvalid,
       {PeftName(kQ0, "lora_B.weight"), "[8, 4]", "[16, 4]"},
       false},
      {"wrong_magnitude",
       [](TestAdapter* a) {
         a->MakeDora();
         Resize(&TensorOf(a, kQ0, "lora_magnitude_vector"), {1, 16});
       },
       kInvalid,
       {PeftName(kQ0, "lora_magnitude_vector"), "[1, 16]", "[16]"}},
      {"bias_the_base_lacks",
       [](TestAdapter* a) {
         a->config["bias"] = "lora_only";
         a->tensors[PeftName(kQ0, "base_layer.bias")] = {DType::kF32, {16}, std::vector<float>(16)};
       },
       kInvalid,
       {PeftName(kQ0, "base_layer.bias"), "has none"},
       false},
      {"nan",
       [](TestAdapter* a) {
         TensorOf(a, kQ1, "lora_B.weight").values[5] = std::numeric_limits<float>::quiet_NaN();
       },
       kInvalid,
       {PeftName(kQ1, "lora_B.weight"), "element 5", "NaN"}},
      {"infinite",
       [](TestAdapter* a) {
         TensorOf(a, kQ0, "lora_A.weight").values[2] = std::numeric_limits<float>::infinity();
       },
       kInvalid,
       {PeftName(kQ0, "lora_A.weight"), "element 2", "infinite"}},
      {"dora_of_nothing",
       [](TestAdapter* a) {
         a->MakeDora();
         auto& m = TensorOf(a, kQ0, "lora_magnitude_vector").values;
         m.assign(m.size(), std::numeric_limits<float>::max());
         auto& b = TensorOf(a, kQ0, "lora_B.weight").values;
         b.assign(b.size(), 0.0f);
       },
       kInvalid,
       {kQ0, "DoRA's scale of output"},
       false},
  };
  return *cases;
}

class BadAdapter : public ::testing::TestWithParam<BadCase> {};

TEST_P(BadAdapter, IsRefusedInWordsThatHelp) {
  TestBase base = TestBase::Random(2);
  TempDir dir;
  TestAdapter adapter = TestAdapter::Lora(base, {"q_proj", "down_proj"}, 4, 1);
  if (std::string_view(GetParam().name) == "dora_of_nothing") base.Scale(kQ0, 1e-6f);
  GetParam().damage(&adapter);
  adapter.Write(dir.path());
  const auto loaded = Load(dir.path(), base);
  ASSERT_EQ(loaded.status().code(), GetParam().code) << loaded.status();
  const InspectReport report = InspectAdapter(dir.path());
  const std::string inspected = FormatReport(report);
  EXPECT_EQ(report.loadable(), !GetParam().inspect_sees) << inspected;
  for (const std::string& words : GetParam().says) {
    EXPECT_THAT(std::string(loaded.status().message()), HasSubstr(words));
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, BadAdapter, ::testing::ValuesIn(BadCases()),
                         [](const auto& info) { return info.param.name; });

TEST_F(AdapterLoad, AllProblemsComeAtOnce) {
  adapter_.config["megatron_config"] = {{"x", 1}};
  adapter_.config["r"] = 3;
  adapter_.tensors["foo"] = {DType::kF32, {1}, {1}};
  const absl::Status status = WriteAndLoad(adapter_).status();
  for (const char* words : {"megatron_config", "foo", "[3, in]"}) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(words));
  }
}

TEST_F(AdapterLoad, OverflowInBfloat16IsRefusedAndExactIsNot) {
  auto& a = adapter_.tensors[PeftName(kQ0, "lora_A.weight")];
  a.values[9] = std::numeric_limits<float>::max();
  const absl::Status fast = WriteAndLoad(adapter_, FactorPrecision::kBF16).status();
  EXPECT_EQ(fast.code(), kInvalid);
  EXPECT_THAT(std::string(fast.message()), HasSubstr("element 9"));
  EXPECT_TRUE(WriteAndLoad(adapter_).ok());
}

TEST_F(AdapterLoad, ACopyOfTheHeadMustBeTheBasesHead) {
  TestAdapter adapter = TestAdapter::Lora(base_, {"lm_head"}, 4, 1);
  auto& copy = adapter.tensors[PeftName("lm_head", "base_layer.weight")];
  copy = {DType::kF32, {40, 16}, base_.At(HeadModule(2)).weight};
  EXPECT_TRUE(WriteAndLoad(adapter).ok()) << WriteAndLoad(adapter).status();
  for (float& value : copy.values) value += 0.25f;
  const absl::Status other = WriteAndLoad(adapter).status();
  EXPECT_EQ(other.code(), kInvalid);
  EXPECT_THAT(std::string(other.message()), HasSubstr("another base"));
  Resize(&copy, {41, 16});
  EXPECT_THAT(std::string(WriteAndLoad(adapter).status().message()),
              HasSubstr("has 41 tokens and base_model.model.lm_head.lora_B.weight 40"));
}

TEST_F(AdapterLoad, MissingAndMalformedFiles) {
  const auto message = [this] { return std::string(Load(dir_.path(), base_).status().ToString()); };
  EXPECT_EQ(Load(dir_.path() / "none", base_).status().code(), kMissing);
  EXPECT_THAT(message(), HasSubstr("no adapter_config.json in " + dir_.path().string()));
  WriteFile(dir_.path() / "adapter_config.json", adapter_.config.dump());
  EXPECT_THAT(message(), HasSubstr("no adapter_model.safetensors in " + dir_.path().string()));
  WriteFile(dir_.path() / "adapter_model.bin", "PK\x03\x04");
  EXPECT_EQ(Load(dir_.path(), base_).status().code(), kUnserved);
  EXPECT_THAT(message(), HasSubstr("pickle"));
  EXPECT_THAT(message(), HasSubstr("save_file"));

  const std::string whole = testing::SafetensorsBytes(adapter_.tensors);
  for (size_t keep : {size_t{0}, size_t{7}, size_t{100}, whole.size() - 1}) {
    WriteFile(dir_.path() / "adapter_model.safetensors", whole.substr(0, keep));
    EXPECT_EQ(Load(dir_.path(), base_).status().code(), absl::StatusCode::kDataLoss)
        << keep << " " << message();
    EXPECT_THAT(message(), HasSubstr("adapter_model.safetensors"));
  }
  WriteFile(dir_.path() / "adapter_model.safetensors", whole);
  EXPECT_TRUE(Load(dir_.path(), base_).ok()) << message();
  for (const char* config : {"", "{", "[]", "{\"r\": NaN}", "{\"r\": 1, \"r\": 2}", "{}\xff"}) {
    WriteFile(dir_.path() / "adapter_config.json", config);
    EXPECT_FALSE(Load(dir_.path(), base_).ok()) << config;
    EXPECT_THAT(message(), HasSubstr("adapter_config.json")) << config;
  }
  WriteFile(dir_.path() / "adapter_config.json", std::string(100000, '['));
  EXPECT_THAT(message(), HasSubstr("deeper"));
  WriteFile(dir_.path() / "adapter_config.json", std::string((1 << 20) + 1, ' '));
  EXPECT_EQ(Load(dir_.path(), base_).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(message(), HasSubstr("1048576"));
}

// ---- whatever bytes: a Status

TEST_F(AdapterLoad, DamagedDirectoriesGiveAStatusAndNeverCrash) {
  adapter_.MakeDora();
  const std::string weights = testing::SafetensorsBytes(adapter_.tensors);
  adapter_.config["rank_pattern"] = {{"layers.0.*q_proj", 4}};
  adapter_.config["layers_to_transform"] = {0, 1};
  adapter_.config["layers_pattern"] = "layers";
  const std::string config = adapter_.config.dump();
  std::mt19937 generator(3);
  const auto damage = [&generator](std::string bytes, size_t within) {
    for (uint32_t n = 1 + generator() % 3; n > 0; --n) {
      const size_t at = generator() % std::min(within, bytes.size());
      switch (generator() % 5) {
        case 0:
          bytes[at] = static_cast<char>(generator());
          break;
        case 1:
          bytes[at] ^= static_cast<char>(1 << generator() % 8);
          break;
        case 2:
          bytes.erase(at, 1 + generator() % 8);
          break;
        case 3:
          bytes.insert(at, bytes.substr(at, generator() % 16));
          break;
        case 4:
          bytes[at] = "0123456789[]{}\",:-.*(e"[generator() % 22];
          break;
      }
    }
    return bytes;
  };
  const size_t header = weights.size() - 3000;  // damage names, shapes and offsets as well as data
  int loaded = 0, refused = 0;
  for (int i = 0; i < 1000; ++i) {
    const bool hit_config = i % 2 == 0;
    WriteFile(dir_.path() / "adapter_config.json",
              hit_config ? damage(config, config.size()) : config);
    WriteFile(dir_.path() / "adapter_model.safetensors",
              hit_config ? weights : damage(weights, i % 4 == 1 ? header : weights.size()));
    const auto result = Load(dir_.path(), base_);
    const InspectReport report = InspectAdapter(dir_.path());
    EXPECT_FALSE(FormatReport(report).empty());
    (result.ok() ? loaded : refused) += 1;
    EXPECT_TRUE(report.loadable() || !result.ok()) << i << FormatReport(report);
    EXPECT_EQ(result.ok(), result.status().message().empty()) << i;
  }
  EXPECT_GT(loaded, 20);  // the damage is of the kind that can pass
  EXPECT_GT(refused, 200);
}

// ---- inspection

TEST_F(AdapterLoad, InspectionTellsRanksTargetsAndSize) {
  adapter_.MakeDora();
  adapter_.config["base_model_name_or_path"] = "some/base";
  adapter_.config["alpha_pattern"] = {{"layers.1.*q_proj", 2}};
  adapter_.Write(dir_.path());
  const InspectReport report = InspectAdapter(dir_.path());
  EXPECT_THAT(report.refusals, IsEmpty());
  EXPECT_EQ(report.variant, "dora");
  EXPECT_EQ(report.base_model, "some/base");
  EXPECT_EQ(report.dtypes, "F32");
  EXPECT_EQ(report.version, Load(dir_.path(), base_)->adapter->version);
  const int64_t q = 4 * 16 + 16 * 4 + 16, down = 4 * 24 + 16 * 4 + 16;
  EXPECT_EQ(report.parameters, 2 * (q + down));
  EXPECT_EQ(report.tensor_bytes, 4 * report.parameters);
  ASSERT_EQ(report.groups.size(), 2);
  EXPECT_EQ(report.groups[0].module, "mlp.down_proj");
  EXPECT_EQ(report.groups[0].count, 2);
  EXPECT_EQ(report.groups[0].in, 24);
  EXPECT_EQ(report.groups[0].out, 16);
  EXPECT_EQ(report.groups[1].max_rank, 4);
  EXPECT_EQ(report.groups[1].min_scale, 0.5f);
  EXPECT_EQ(report.groups[1].max_scale, 2.0f);
  for (const char* words : {"dora", "some/base", "self_attn.q_proj", "0.5-2"}) {
    EXPECT_THAT(FormatReport(report), HasSubstr(words));
  }
}

}  // namespace
}  // namespace lorikeet
