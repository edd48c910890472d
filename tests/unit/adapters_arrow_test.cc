// Arrow's directories: what loads, what its prototypes are, and what is refused with which words.
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "adapters_cache/low_rank_rows.h"
#include "adapters_cache/mixer.h"
#include "engine/kernels/cpu/structured.h"
#include "tests/unit/adapter_directory.h"

namespace lorikeet {
namespace {

using testing::PeftName;
using testing::TestAdapter;

constexpr const char* kQ0 = "model.layers.0.self_attn.q_proj";

class ArrowAdapter : public testing::AdapterDirectory {
 protected:
  // Three LoRAs on two linears a layer, and a general one that no configuration of these tests asks for yet.
  ArrowAdapter() {
    adapter_ = TestAdapter::Lora(base_, {"q_proj", "down_proj"}, 3, 9);
    adapter_.config["arrow_config"] = {{"top_k", 2}, {"router_temperature", 0.5}, {"use_gks", false},
                                       {"task_adapter_names", {"task_0", "task_1", "task_2"}},
                                       {"gks_adapter_names", nullptr}, {"rng_seed", nullptr}};
    for (const char* name : {"task_0", "task_1", "task_2", "gks_0", "gks_1"}) {
      experts_[name] = TestAdapter::Lora(base_, {"q_proj", "down_proj"}, 3, static_cast<uint32_t>(experts_.size()));
    }
  }
  nlohmann::ordered_json& arrow() { return adapter_.config["arrow_config"]; }

  const std::vector<float>& Values(const std::string& expert, const char* factor) {
    return experts_[expert].tensors[PeftName(kQ0, factor)].values;
  }

  // The direction that steps of v ← (B A)ᵀ (B A) v come to; a: [3, in], b: [out, 3].
  static std::vector<double> MostRead(const std::vector<double>& a, const std::vector<double>& b) {
    const size_t in = a.size() / 3, out = b.size() / 3;
    std::vector<double> delta(out * in);
    for (size_t i = 0; i < delta.size(); ++i) {
      for (size_t k = 0; k < 3; ++k) delta[i] += b[i / in * 3 + k] * a[k * in + i % in];
    }
    std::vector<double> v(in, 1);
    for (int step = 0; step < 20000; ++step) {
      std::vector<double> next(in);
      for (size_t o = 0; o < out; ++o) {
        const double* row = &delta[o * in];
        const double dot = std::inner_product(v.begin(), v.end(), row, 0.0);
        for (size_t i = 0; i < in; ++i) next[i] += dot * row[i];
      }
      const double norm = std::sqrt(std::inner_product(next.begin(), next.end(), next.begin(), 0.0));
      for (size_t i = 0; i < in; ++i) v[i] = next[i] / norm;
    }
    return v;
  }

  static std::vector<double> Less(const std::vector<float>& values, const std::vector<double>& mean) {
    std::vector<double> less(values.begin(), values.end());
    for (size_t i = 0; i < less.size(); ++i) less[i] -= mean[i];
    return less;
  }
};

TEST_F(ArrowAdapter, EveryLinearHasItsPairsAndPrototypes) {
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const Adapter& adapter = **loaded;
  EXPECT_EQ(adapter.variant, "arrow");
  EXPECT_EQ(adapter.kv_sets(), 1);
  EXPECT_TRUE(adapter.cacheable);
  EXPECT_EQ(adapter.prototype_gates.experts, 3);
  EXPECT_EQ(adapter.prototype_gates.chosen, 2);
  EXPECT_EQ(adapter.prototype_gates.temperature, 0.5f);
  const ModuleDelta& q = adapter.modules[LayerModule(0, Linear::kQ)];
  ASSERT_EQ(q.low_rank.rank, 9);
  EXPECT_EQ(std::vector<int32_t>(q.rank_gate, q.rank_gate + 9),
            (std::vector<int32_t>{0, 0, 0, 1, 1, 1, 2, 2, 2}));
  EXPECT_EQ(adapter.modules[LayerModule(0, Linear::kK)].prototypes, nullptr);
  EXPECT_STREQ(Unsummable(adapter), "gates per token");
}

TEST_F(ArrowAdapter, APrototypeIsWhatItsLoraReadsMost) {
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const float* prototype = (*loaded)->modules[LayerModule(0, Linear::kQ)].prototypes;
  for (const char* expert : {"task_0", "task_1", "task_2"}) {
    const std::vector<double> none(Values(expert, "lora_B.weight").size() + Values(expert, "lora_A.weight").size());
    const auto expected = MostRead(Less(Values(expert, "lora_A.weight"), none), Less(Values(expert, "lora_B.weight"), none));
    const double dot = std::inner_product(expected.begin(), expected.end(), prototype, 0.0);
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_NEAR(prototype[i], std::copysign(1, dot) * expected[i], 1e-5) << expert << " " << i;
    }
    prototype += expected.size();
  }
}

// A of one 1 a row and B of one value a column, so that the values are B A's singular values.
TEST_F(ArrowAdapter, SingularValuesThatPeftCannotTellApartAreNamed) {
  const auto set = [this](const std::string& expert, float second) {
    for (auto& [name, tensor] : experts_[expert].tensors) {
      const bool is_a = name.find("lora_A") != std::string::npos;
      const int64_t columns = tensor.shape[1];
      tensor.values.assign(tensor.values.size(), 0);
      for (int k = 0; k < 3; ++k) {
        const float value = is_a || k == 0 ? 1 : k == 1 ? second : 0.1f;
        tensor.values[k * columns + k] = value;
      }
    }
  };
  for (const char* name : {"task_0", "task_1", "task_2"}) set(name, 0.7f);
  ASSERT_TRUE(Load().ok());
  EXPECT_THAT(warnings_, ::testing::IsEmpty());
  set("task_1", 0.95f);
  ASSERT_TRUE(Load().ok());
  ASSERT_EQ(warnings_.size(), 1u);
  EXPECT_THAT(warnings_[0], ::testing::HasSubstr("in 4 linears"));
  EXPECT_THAT(warnings_[0], ::testing::HasSubstr("by up to about 0.21"));  // 0.95^30
}

TEST_F(ArrowAdapter, TheMeanOfGeneralLorasIsTakenFromBothFactors) {
  arrow()["use_gks"] = true;
  arrow()["gks_adapter_names"] = {"gks_0", "gks_1"};
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const ModuleDelta& q = (*loaded)->modules[LayerModule(0, Linear::kQ)];
  EXPECT_EQ((*loaded)->prototype_gates.experts, 3);
  ASSERT_EQ(q.low_rank.rank, 9);
  const auto less_mean = [&](const char* factor) {
    std::vector<double> mean;
    for (const float value : Values("gks_0", factor)) mean.push_back(value);
    for (size_t i = 0; i < mean.size(); ++i) mean[i] = (mean[i] + Values("gks_1", factor)[i]) / 2;
    return Less(Values("task_1", factor), mean);
  };
  const std::vector<double> a = less_mean("lora_A.weight"), b = less_mean("lora_B.weight");
  const size_t in = a.size() / 3, out = b.size() / 3;
  const double alpha = experts_["task_1"].config["lora_alpha"];
  std::vector<float> row(std::max(in, out));
  for (size_t k = 0; k < 3; ++k) {
    ReadA(q.low_rank, static_cast<int32_t>(3 + k), static_cast<int64_t>(in), row.data());
    for (size_t i = 0; i < in; ++i) EXPECT_NEAR(row[i], a[k * in + i], 1e-6);
    ReadB(q.low_rank, static_cast<int32_t>(3 + k), static_cast<int64_t>(out), row.data());
    for (size_t o = 0; o < out; ++o) EXPECT_NEAR(row[o], alpha / 3 * b[o * 3 + k], 1e-5);
  }
  const auto expected = MostRead(a, b);
  EXPECT_NEAR(std::abs(std::inner_product(expected.begin(), expected.end(), q.prototypes + in, 0.0)), 1, 1e-5);
}

// A LoRA that was never trained adds nothing and reads nothing.
TEST_F(ArrowAdapter, ALoraOfZerosHasAPrototypeOfZeros) {
  for (float& value : experts_["task_2"].tensors[PeftName(kQ0, "lora_B.weight")].values) value = 0;
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const auto in = static_cast<int32_t>(Values("task_2", "lora_A.weight").size()) / 3;
  const float* prototypes = (*loaded)->modules[LayerModule(0, Linear::kQ)].prototypes;
  for (int32_t i = 0; i < in; ++i) EXPECT_EQ(prototypes[2 * in + i], 0);
}

TEST_F(ArrowAdapter, AsPeftSavesItTheLorasAreBesideTheRouter) {
  const auto below = Load();
  ASSERT_TRUE(below.ok()) << below.status();
  const testing::TempDir saved;
  adapter_.Write(saved.path() / "arrow_router");
  for (const auto& [name, expert] : experts_) expert.Write(saved.path() / name);
  for (const char* router : {"arrow_router", "arrow_router/"}) {
    const auto files = ReadAdapterFiles(saved.path() / router, {});
    ASSERT_TRUE(files.ok()) << files.status();
    EXPECT_EQ(files->version, (*below)->version);
  }
  const std::filesystem::path roots[] = {std::filesystem::canonical(saved.path()) / "arrow_router"};
  EXPECT_EQ(ReadAdapterFiles(saved.path() / "arrow_router", roots).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(ArrowAdapter, LorasMustBeAlikeAndOnTheRoutersLinears) {
  const auto experts = experts_;
  experts_["task_1"] = TestAdapter::Lora(base_, {"q_proj", "down_proj"}, 2, 1);
  ExpectRefused(absl::StatusCode::kInvalidArgument, {kQ0, "ranks 3 and 2"});
  experts_["task_1"] = TestAdapter::Lora(base_, {"q_proj"}, 3, 1);
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"down_proj", "ranks 3 and 0"});
  experts_ = experts;
  adapter_.config["target_modules"] = {"q_proj"};
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"down_proj", "leave it out"});
  adapter_.config["target_modules"] = {"q_proj", "k_proj", "down_proj"};
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"k_proj", "ask for it"});
}

TEST_F(ArrowAdapter, OnlyPlainLorasAreItsExperts) {
  experts_["task_1"].MakeDora();
  ExpectRefused(absl::StatusCode::kUnimplemented, {"expert 1", "'dora'"});
}

TEST_F(ArrowAdapter, SettingsAreChecked) {
  const auto config = adapter_.config;
  const std::vector<std::tuple<const char*, nlohmann::ordered_json, std::string>> bad = {
      {"top_k", 4, "it must be 1 to 3"},
      {"top_k", 0, "it must be 1 to 3"},
      {"router_temperature", 0, "must be above 0"},
      {"use_gks", 1, "neither true nor false"},
      {"use_gks", true, "names none"},
      {"task_adapter_names", nlohmann::ordered_json::array(), "names no task_adapter_names"},
      {"task_adapter_names", {"../task_0"}, "no directory's name"},
      {"task_adapter_names", {7}, "no directory's name"}};
  for (const auto& [key, value, words] : bad) {
    adapter_.config = config;
    arrow()[key] = value;
    ExpectRefused(absl::StatusCode::kInvalidArgument, {words});
  }
  adapter_.config["arrow_config"] = 3;
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"arrow_config is no object"});
  adapter_.config = config;
  arrow()["task_adapter_names"] = {"task_0", "task_9"};
  ExpectRefused(absl::StatusCode::kNotFound, {"'task_9'", (dir_.path() / "task_9").string()});
}

TEST_F(ArrowAdapter, WhatIsIgnoredIsSaid) {
  arrow()["rng_seed"] = 4;
  arrow()["gate"] = "new";
  ASSERT_TRUE(Load().ok());
  ASSERT_GE(warnings_.size(), 2u);
  EXPECT_THAT(warnings_[0], ::testing::HasSubstr("rng_seed is ignored"));
  EXPECT_THAT(warnings_[1], ::testing::HasSubstr("unknown key 'gate'"));
  Put("base_model.model." + std::string(kQ0) + ".lora_arrow.prototypes", {3, 16});
  ExpectRefused(absl::StatusCode::kInvalidArgument, {"no place", "lora_arrow.prototypes"});
}

TEST(SharesByPrototypes, AreOfAsManyAsAreChosen) {
  const PrototypeGates gates{.experts = 3, .chosen = 2, .temperature = 0.5f};
  const float prototypes[] = {1, 0, 0, -1, 0, 0};
  const float x[] = {1, 2};
  float shares[3];
  ShareByPrototypes(gates, prototypes, x, 2, shares);
  EXPECT_NEAR(shares[0], 1 / (1 + std::exp(2.0)), 1e-6);
  EXPECT_NEAR(shares[1], 1 / (1 + std::exp(-2.0)), 1e-6);
  EXPECT_EQ(shares[2], 0);
  const float nothing[] = {0, 0};
  ShareByPrototypes(gates, prototypes, nothing, 2, shares);
  EXPECT_EQ(std::vector<float>(shares, shares + 3), (std::vector<float>{0.5f, 0.5f, 0}));
}

}  // namespace
}  // namespace lorikeet
