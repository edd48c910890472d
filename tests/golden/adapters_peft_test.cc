// What PEFT computes with its own adapters is what the normalised form computes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/formats/peft_targets.h"
#include "adapters_cache/normalise.h"
#include "engine/model/base_model_view.h"
#include "engine/tensor/dequantize.h"
#include "engine/tensor/safetensors.h"
#include "tests/unit/adapters_support.h"

namespace lorikeet {
namespace {

using testing::TestBase;
namespace fs = std::filesystem;

const fs::path kDirectory = "tests/golden/adapters_peft";
constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

struct Case {
  const char* name;
  const char* base;
  const char* variant;
  int adapted;  // linears with a delta
};
void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }

std::vector<float> Floats(const TensorView& view) {
  std::vector<float> values(view.elements());
  Dequantize(view.dtype, view.bytes.data(), view.elements(), values.data());
  return values;
}

absl::StatusOr<std::shared_ptr<const Adapter>> Load(const Case& c, const TestBase& base,
                                                    FactorPrecision precision) {
  auto files = ReadAdapterFiles(kDirectory / c.name, {});
  if (!files.ok()) return files.status();
  Problems problems;
  const RawAdapter raw = ParseAdapter(*std::move(files), &problems);
  if (!problems.empty()) return problems.ToStatus();
  EXPECT_THAT(raw.warnings, ::testing::IsEmpty());
  return Normalise(raw, base, {precision});
}

float Value(const LowRank& pair, const std::byte* factor, int64_t index) {
  float value;
  Dequantize(pair.dtype, factor + index * Info(pair.dtype).block_bytes, 1, &value);
  return value;
}
float A(const LowRank& pair, int64_t k, int64_t i) {
  return Value(pair, pair.a, k * pair.a_stride + i);
}
float B(const LowRank& pair, int64_t k, int64_t o) {
  return Value(pair, pair.b, k * pair.b_stride + o);
}

class PeftGolden : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    base_ =
        TestBase::FromFile(kDirectory / "base" / (std::string(GetParam().base) + ".safetensors"));
    auto expected = ReadSafetensors(kDirectory / GetParam().name / "expected.safetensors");
    ASSERT_TRUE(expected.ok()) << expected.status();
    expected_ = *std::move(expected);
  }

  const TensorView* Expected(ModuleId id, const char* what) const {
    return expected_.Find(ModulePath(id, base_.layers()) + "." + what);
  }

  TestBase base_;
  TensorFile expected_;
};

TEST_P(PeftGolden, DeltaIsPeftsDeltaWeight) {
  const auto adapter = Load(GetParam(), base_, FactorPrecision::kFile);
  ASSERT_TRUE(adapter.ok()) << adapter.status();
  EXPECT_EQ((*adapter)->variant, GetParam().variant);
  int adapted = 0;
  for (ModuleId id = 0; id < ModuleCount(base_.layers()); ++id) {
    const LowRank& pair = (*adapter)->modules[id].low_rank;
    const std::string path = ModulePath(id, base_.layers());
    const TensorView* view = Expected(id, "delta");
    ASSERT_EQ(pair.rank > 0, view != nullptr) << path;
    if (view == nullptr) continue;
    ++adapted;
    const std::vector<float> delta = Floats(*view);
    const auto [in, out] = base_.shape(id);
    for (int32_t o = 0; o < out; ++o) {
      for (int32_t i = 0; i < in; ++i) {
        double sum = 0, magnitude = 0;
        for (int32_t k = 0; k < pair.rank; ++k) {
          const double term = double{pair.scale} * B(pair, k, o) * A(pair, k, i);
          sum += term;
          magnitude += std::abs(term);
        }
        ASSERT_NEAR(delta[o * in + i], sum, (pair.rank + 2) * kEpsilon * magnitude)
            << path << " [" << o << ", " << i << "]";
      }
    }
  }
  EXPECT_EQ(adapted, GetParam().adapted);
}

TEST_P(PeftGolden, DoraScaleIsPeftsMagnitudeOverNorm) {
  const auto adapter = Load(GetParam(), base_, FactorPrecision::kFile);
  ASSERT_TRUE(adapter.ok()) << adapter.status();
  for (ModuleId id = 0; id < ModuleCount(base_.layers()); ++id) {
    const ModuleDelta& module = (*adapter)->modules[id];
    const TensorView* view = Expected(id, "out_scale");
    ASSERT_EQ(module.out_scale != nullptr, view != nullptr) << ModulePath(id, base_.layers());
    if (view == nullptr) continue;
    const std::vector<float> scale = Floats(*view);
    const auto [in, out] = base_.shape(id);
    for (int32_t o = 0; o < out; ++o) {
      const double bound = (in + module.low_rank.rank + 4) * kEpsilon * scale[o];
      ASSERT_NEAR(scale[o], module.out_scale[o], bound)
          << ModulePath(id, base_.layers()) << " " << o;
    }
  }
}

// y = out_scale ∘ (x Wᵀ + s (x Aᵀ) Bᵀ) + base bias + bias, with every part PEFT's.
TEST_P(PeftGolden, LinearsGivePeftsOutput) {
  const auto adapter = Load(GetParam(), base_, FactorPrecision::kFile);
  ASSERT_TRUE(adapter.ok()) << adapter.status();
  for (ModuleId id = 0; id < ModuleCount(base_.layers()); ++id) {
    const ModuleDelta& module = (*adapter)->modules[id];
    const TestBase::LinearWeights& linear = base_.At(id);
    const TensorView* y_view = Expected(id, "y");
    if (y_view == nullptr) {
      EXPECT_TRUE(module.empty()) << ModulePath(id, base_.layers());
      continue;
    }
    const std::vector<float> x = Floats(*Expected(id, "x"));
    const std::vector<float> y = Floats(*y_view);
    const auto [in, out] = linear.shape;
    for (int64_t row = 0; row < y_view->rows(); ++row) {
      for (int32_t o = 0; o < out; ++o) {
        double sum = 0, magnitude = 0;
        const auto add = [&](double term) {
          sum += term;
          magnitude += std::abs(term);
        };
        for (int32_t i = 0; i < in; ++i) {
          const double xi = x[row * in + i];
          add(xi * linear.weight[o * in + i]);
          const LowRank& pair = module.low_rank;
          for (int32_t k = 0; k < pair.rank; ++k) {
            add(pair.scale * xi * A(pair, k, i) * B(pair, k, o));
          }
        }
        if (module.out_scale != nullptr) {
          sum *= module.out_scale[o];
          magnitude *= 3 * std::abs(module.out_scale[o]) + 1;  // PEFT adds (c - 1) times the base
        }
        if (!linear.bias.empty()) add(linear.bias[o]);
        if (module.bias != nullptr) add(module.bias[o]);
        const double bound = (in + module.low_rank.rank + 8) * kEpsilon * magnitude;
        ASSERT_NEAR(y[row * out + o], sum, bound)
            << ModulePath(id, base_.layers()) << " row " << row << " output " << o;
      }
    }
  }
}

TEST_P(PeftGolden, FastPrecisionRoundsEveryFactorOnceToBfloat16) {
  const auto exact = Load(GetParam(), base_, FactorPrecision::kFile);
  const auto fast = Load(GetParam(), base_, FactorPrecision::kBF16);
  ASSERT_TRUE(exact.ok() && fast.ok()) << exact.status() << fast.status();
  for (ModuleId id = 0; id < ModuleCount(base_.layers()); ++id) {
    const LowRank& from = (*exact)->modules[id].low_rank;
    const LowRank& to = (*fast)->modules[id].low_rank;
    ASSERT_EQ(from.rank, to.rank);
    if (to.rank == 0) continue;
    EXPECT_EQ(to.dtype, DType::kBF16);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(to.a) % 64, 0);
    EXPECT_EQ(to.a_stride * 2 % 64, 0);
    EXPECT_EQ(to.b_stride * 2 % 64, 0);
    const auto [in, out] = base_.shape(id);
    for (int32_t k = 0; k < to.rank; ++k) {
      for (int32_t i = 0; i < in; ++i) {
        ASSERT_EQ(A(to, k, i), BF16ToFloat(FloatToBF16(A(from, k, i))));
      }
      for (int32_t o = 0; o < out; ++o) {
        ASSERT_EQ(B(to, k, o), BF16ToFloat(FloatToBF16(B(from, k, o))));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, PeftGolden,
    ::testing::Values(Case{"lora", "llama", "lora", 4}, Case{"lora_bf16", "llama", "lora", 14},
                      Case{"lora_f16", "llama", "lora", 14}, Case{"rslora", "llama", "rslora", 14},
                      Case{"dora", "llama", "dora", 14},
                      Case{"dora_rslora_bf16", "llama", "dora", 4},
                      Case{"dora_qwen2", "qwen2", "dora", 4}, Case{"lora_bias", "qwen2", "lora", 4},
                      Case{"bias_lora_only", "qwen2", "lora", 4},
                      Case{"bias_all", "qwen2", "lora", 2}, Case{"head", "llama", "lora", 3},
                      Case{"layers", "llama", "lora", 2}, Case{"regex", "llama", "lora", 8}),
    [](const auto& info) { return info.param.name; });

// Adapters that replace biases need the base's own.
TEST(BaseModelBias, IsTheCheckpointsBiasOrNone) {
  const fs::path directory = "tests/golden/models/qwen2";
  auto source = ModelSource::Open(directory);
  ASSERT_TRUE(source.ok()) << source.status();
  const BaseModelView base(std::shared_ptr<const ModelSource>(*std::move(source)));
  const auto file = ReadSafetensorsModel(directory);
  ASSERT_TRUE(file.ok()) << file.status();
  for (ModuleId id = 0; id < ModuleCount(base.layers()); ++id) {
    const std::string path = ModulePath(id, base.layers());
    const TensorView* expected = file->Find(path + ".bias");
    std::vector<float> bias(base.shape(id).out);
    ASSERT_EQ(base.ReadBias(id, bias.data()), expected != nullptr) << path;
    ASSERT_EQ(base.ReadBias(id, nullptr), expected != nullptr) << path;
    if (expected != nullptr) {
      EXPECT_EQ(bias, Floats(*expected)) << path;
    }
  }
}

nlohmann::ordered_json ReadJson(const char* name) {
  std::ifstream file(kDirectory / name);
  return nlohmann::ordered_json::parse(file);
}

TEST(PeftMatching, TargetsAreThoseOfPeft) {
  const auto golden = ReadJson("targets.json");
  ASSERT_GT(golden["cases"].size(), 20);
  for (const auto& one : golden["cases"]) {
    Problems problems;
    const PeftTargets targets = PeftTargets::Parse(one["config"], &problems);
    EXPECT_TRUE(problems.empty()) << one["config"] << problems.ToStatus();
    std::vector<std::string> matched;
    for (const std::string path : golden["paths"]) {
      if (targets.Match(path)) matched.push_back(path);
    }
    EXPECT_EQ(matched, one["paths"].get<std::vector<std::string>>()) << one["config"];
  }
}

TEST(PeftMatching, PatternValuesAreThoseOfPeft) {
  const auto golden = ReadJson("patterns.json");
  ASSERT_GT(golden["cases"].size(), 10);
  for (const auto& one : golden["cases"]) {
    Problems problems;
    const auto values =
        PeftPatternValues::Parse({{"rank_pattern", one["pattern"]}}, "rank_pattern", &problems);
    EXPECT_TRUE(problems.empty()) << one["pattern"] << problems.ToStatus();
    for (const auto& [path, value] : one["values"].items()) {
      const std::optional<double> found = values.Find(path);
      ASSERT_EQ(found.has_value(), !value.is_null()) << one["pattern"] << " " << path;
      if (value.is_null()) continue;
      EXPECT_EQ(*found, value.get<double>()) << one["pattern"] << " " << path;
    }
  }
}

}  // namespace
}  // namespace lorikeet
