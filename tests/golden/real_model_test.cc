// The demo model and its adapters, dequantised to float32, against Transformers + PEFT
// (tests/golden/make_goldens.py real): 40 greedy tokens and the distributions they came from.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "adapters_cache/registry.h"
#include "engine/model/base_model_view.h"
#include "nlohmann/json.hpp"
#include "tests/support/model_harness.h"

namespace lorikeet {
namespace {

std::filesystem::path DemoModel() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::filesystem::path folder =
      cache && *cache ? std::filesystem::path(cache)
                      : std::filesystem::path(home ? home : "") / ".cache";
  return folder / "lorikeet" / "SmolLM2-135M-Instruct.Q4_1.gguf";
}

double LogSumExp(const std::vector<float>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float v : logits) sum += std::exp(v - top);
  return top + std::log(sum);
}

TEST(RealModel, GreedyTokensAndDistributionsMatch) {
  ASSERT_TRUE(std::filesystem::exists(DemoModel()))
      << DemoModel() << " is missing: scripts/test brings it";
  std::ifstream file("tests/golden/real.json");
  ASSERT_TRUE(file.good()) << "run from the source root";
  const nlohmann::json golden = nlohmann::json::parse(file);

  ModelHarness harness(DemoModel(), Precision::kExact, 1, 256);
  BaseModelView base(harness.shared_source());
  absl::StatusOr<std::unique_ptr<AdapterRegistry>> registry =
      AdapterRegistry::Create(base, {.base_name = "base", .allowed_roots = {}});
  ASSERT_TRUE(registry.ok()) << registry.status();
  std::set<std::string> adapters;
  for (const nlohmann::json& c : golden["cases"]) {
    AdapterLease lease;
    std::string name = "base";
    if (!c["adapter"].is_null()) {
      name = c["adapter"];
      const absl::StatusOr<AdapterInfo> info =
          (*registry)->Load(name, std::filesystem::absolute("demo/adapters/" + name),
                            AdapterRegistry::Origin::kOperator);
      ASSERT_TRUE(info.ok()) << info.status();
      lease = *(*registry)->Acquire(name);
    }
    adapters.insert(name);
    const std::vector<int32_t> greedy = c["greedy_ids"];
    ASSERT_GE(greedy.size(), 32u);
    // Each token given those before it: the same tokens as generating them one by one.
    Lane lane{c["prompt_ids"].get<std::vector<int32_t>>(), 0, lease};
    const size_t prompt = lane.tokens.size();
    lane.tokens.insert(lane.tokens.end(), greedy.begin(), greedy.end() - 1);
    const std::vector<std::vector<float>> rows = harness.Run(&lane);
    for (size_t i = 0; i < greedy.size(); ++i) {
      const std::vector<float>& logits = rows[prompt - 1 + i];
      ASSERT_EQ(ArgMax(logits), greedy[i]) << name << ": " << c["question"] << " token " << i;
      const double norm = LogSumExp(logits);
      for (const nlohmann::json& best : c["top"][i]) {
        // Float32 sums of up to 1,536 terms over 30 layers, logits up to about 30.
        EXPECT_NEAR(logits[best[0].get<int32_t>()] - norm, best[1].get<double>(), 2e-3)
            << name << ": " << c["question"] << " token " << i << " id " << best[0];
      }
    }
  }
  EXPECT_GE(adapters.size(), 5u) << "base and at least four adapters";
}

}  // namespace
}  // namespace lorikeet
