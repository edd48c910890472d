// The forward pass against Transformers + PEFT in float32: tiny random models of every family with
// and without adapters (tests/golden/make_goldens.py).
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "adapters_cache/registry.h"
#include "engine/model/base_model_view.h"
#include "engine/tensor/dequantize.h"
#include "engine/tensor/safetensors.h"
#include "nlohmann/json.hpp"
#include "tests/support/model_harness.h"

namespace lorikeet {
namespace {

const std::filesystem::path kRoot = "tests/golden";

struct Case {
  std::string model;
  std::string adapter;  // empty: base
  std::vector<int32_t> prompt;
  std::vector<std::vector<float>> logits;  // [T][vocab]
  std::vector<int32_t> greedy;
};

void LoadCases(const std::string& index, std::vector<Case>* cases) {
  std::ifstream file(kRoot / index);
  LK_CHECK_MSG(file.good(), "tests/golden/" + index + " is missing: run from the source root");
  std::map<std::string, TensorFile> files;
  for (const nlohmann::json& item : nlohmann::json::parse(file)) {
    Case c;
    c.model = item["model"];
    c.adapter = item["adapter"].is_null() ? "" : item["adapter"];
    if (c.adapter.ends_with("lora_head")) continue;  // LoRA on embeddings is not served
    c.prompt = item["prompt_ids"].get<std::vector<int32_t>>();
    c.greedy = item["greedy_ids"].get<std::vector<int32_t>>();
    const std::string path = item["logits_file"];
    if (!files.contains(path)) {
      absl::StatusOr<TensorFile> tensors = ReadSafetensors(kRoot / path);
      LK_CHECK_MSG(tensors.ok(), tensors.status().ToString());
      files.emplace(path, *std::move(tensors));
    }
    const TensorView* view = files.at(path).Find(item["logits"].get<std::string>());
    LK_CHECK(view != nullptr);
    for (int64_t r = 0; r < view->rows(); ++r) {
      c.logits.emplace_back(view->row_elements());
      Dequantize(view->dtype, view->row(r), view->row_elements(), c.logits.back().data());
    }
    cases->push_back(std::move(c));
  }
}

// One model with its adapters, loaded once for all its cases.
class GoldenModel {
 public:
  explicit GoldenModel(const std::string& model)
      : harness(kRoot / model, Precision::kExact, 16, 128), base_(harness.shared_source()) {
    absl::StatusOr<std::unique_ptr<AdapterRegistry>> registry =
        AdapterRegistry::Create(base_, {.base_name = "base", .allowed_roots = {}});
    LK_CHECK_MSG(registry.ok(), registry.status().ToString());
    registry_ = *std::move(registry);
  }

  // Empty path: the base model.
  AdapterLease Adapter(const std::string& path) {
    if (path.empty()) return AdapterLease();
    const std::string name = std::filesystem::path(path).filename();
    absl::StatusOr<AdapterInfo> info =
        registry_->Load(name, std::filesystem::absolute(kRoot / path),
                        AdapterRegistry::Origin::kOperator);
    LK_CHECK_MSG(info.ok(), path + ": " + info.status().ToString());
    return *registry_->Acquire(name);
  }

  ModelHarness harness;

 private:
  BaseModelView base_;
  std::unique_ptr<AdapterRegistry> registry_;
};

// Rounding of float32 sums over a pass: each logit is the end of a chain of `layers` blocks whose
// inner products have up to `width` terms; errors of random sign grow with the root of both.
float Tolerance(const ModelConfig& config, const std::vector<float>& logits) {
  float top = 0;
  for (float v : logits) top = std::max(top, std::abs(v));
  const float terms = static_cast<float>(std::max(config.ffn, config.vocab)) * 4 * config.layers;
  return 8 * 0x1p-24f * std::sqrt(terms) * top;
}

void ExpectClose(const Case& c, const ModelConfig& config, int32_t position,
                 const std::vector<float>& expected, const std::vector<float>& actual) {
  ASSERT_EQ(actual.size(), expected.size()) << c.model << " " << c.adapter;
  const float tolerance = Tolerance(config, expected);
  size_t worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!(std::abs(actual[i] - expected[i]) <= std::abs(actual[worst] - expected[worst]))) worst = i;
  }
  EXPECT_LE(std::abs(actual[worst] - expected[worst]), tolerance)
      << c.model << " adapter '" << c.adapter << "' position " << position << " token " << worst
      << ": " << actual[worst] << " expected " << expected[worst];
}

class ModelGolden : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    cases_ = new std::vector<Case>();
    LoadCases("cases.json", cases_);
    LoadCases("gguf_cases.json", cases_);  // weights dequantised by gguf-py
    LoadCases("fp8_cases.json", cases_);   // and by compressed-tensors and Transformers
    models_ = new std::map<std::string, std::unique_ptr<GoldenModel>>();
    for (const Case& c : *cases_) {
      auto& model = (*models_)[c.model];
      if (!model) model = std::make_unique<GoldenModel>(c.model);
    }
  }
  static GoldenModel& ModelOf(const Case& c) { return *models_->at(c.model); }

  static std::vector<Case>* cases_;
  static std::map<std::string, std::unique_ptr<GoldenModel>>* models_;
};
std::vector<Case>* ModelGolden::cases_ = nullptr;
std::map<std::string, std::unique_ptr<GoldenModel>>* ModelGolden::models_ = nullptr;

TEST_F(ModelGolden, LogitsOfWholePromptsMatch) {
  for (const Case& c : *cases_) {
    GoldenModel& model = ModelOf(c);
    const AdapterLease adapter = model.Adapter(c.adapter);
    Lane lane{c.prompt, 0, adapter};
    const auto logits = model.harness.Run(&lane);
    ASSERT_EQ(logits.size(), c.logits.size());
    for (size_t t = 0; t < logits.size(); ++t) {
      ExpectClose(c, model.harness.source().config(), t, c.logits[t], logits[t]);
    }
  }
}

TEST_F(ModelGolden, GreedyTokensMatch) {
  for (const Case& c : *cases_) {
    GoldenModel& model = ModelOf(c);
    const AdapterLease adapter = model.Adapter(c.adapter);
    Lane lane{c.prompt, 0, adapter};
    for (size_t i = 0; i < c.greedy.size(); ++i) {
      const int32_t token = ArgMax(model.harness.Run(&lane).back());
      ASSERT_EQ(token, c.greedy[i]) << c.model << " adapter '" << c.adapter << "' prompt of "
                                    << c.prompt.size() << ", generated token " << i;
      lane.tokens.push_back(token);
    }
  }
}

// What the share of the roofline is made of: a step of one row reads so much and no less.
TEST_F(ModelGolden, WeightBytesAreThoseThatEveryStepReads) {
  const int64_t attention = 2 * 64 * 64 + 2 * 32 * 64;
  const int64_t two_of_four_experts = 4 * 64 + 2 * 3 * 48 * 64;
  EXPECT_EQ(models_->at("models/mixtral")->harness.weight_bytes(),
            4 * (320 * 64 + 2 * (attention + two_of_four_experts)));
}

// All cases of a model in one batch, prompts cut into uneven chunks: every row as if it were alone.
TEST_F(ModelGolden, MixedChunkedBatchMatches) {
  for (auto& [name, model] : *models_) {
    std::vector<const Case*> cases;
    for (const Case& c : *cases_) {
      if (c.model == name && cases.size() < 16) cases.push_back(&c);
    }
    std::vector<Lane> lanes;
    for (const Case* c : cases) {
      lanes.push_back({c->prompt, 0, model->Adapter(c->adapter)});
    }
    std::vector<Lane*> pointers;
    for (Lane& lane : lanes) pointers.push_back(&lane);
    std::vector<size_t> checked(cases.size(), 0);
    for (int32_t step = 0; step < 64; ++step) {
      std::vector<int32_t> rows;
      for (size_t i = 0; i < lanes.size(); ++i) {
        const int32_t left = static_cast<int32_t>(lanes[i].tokens.size()) - lanes[i].computed;
        rows.push_back(std::min<int32_t>(left, 1 + (step * 7 + i * 3) % 6));
      }
      if (std::count(rows.begin(), rows.end(), 0) == static_cast<int32_t>(rows.size())) break;
      const auto logits = model->harness.Step(pointers, rows);
      for (size_t i = 0; i < cases.size(); ++i) {
        for (const std::vector<float>& row : logits[i]) {
          const size_t position = checked[i]++;
          ExpectClose(*cases[i], model->harness.source().config(), position,
                      cases[i]->logits[position], row);
        }
      }
    }
    for (size_t i = 0; i < cases.size(); ++i) EXPECT_EQ(checked[i], cases[i]->prompt.size());
  }
}

}  // namespace
}  // namespace lorikeet
