// Damaged copies of every golden adapter: each gets a Status or an adapter that fits its base.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "engine/model/base_model_view.h"
#include "nlohmann/json.hpp"
#include "tests/fuzz/adapters.h"
#include "tests/fuzz/mutator.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
const fs::path kRoot = "tests/golden";
constexpr uint32_t kSeeds = 300;  // for each adapter and each of its files

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void TryBytes(const BaseModel& base, const std::string& config, const std::string& weights) {
  const std::vector<char> bytes(weights.begin(), weights.end());  // the sanitizer guards both ends
  testing::FuzzAdapter(base, config, testing::AsBytes({bytes.data(), bytes.size()}));
}

TEST(AdapterMutations, GetAStatusOrAnAdapterThatFits) {
  std::map<std::string, std::unique_ptr<BaseModelView>> bases;
  int adapters = 0;
  for (const auto& entry : fs::directory_iterator(kRoot / "variants")) {
    if (!entry.is_directory()) continue;
    SCOPED_TRACE(entry.path());
    ++adapters;
    const std::string config = ReadFile(entry.path() / "adapter_config.json");
    const auto json = nlohmann::json::parse(config);
    const bool hub = !json.contains("peft_type");
    const std::string weights =
        ReadFile(entry.path() / (hub ? "adapter.safetensors" : "adapter_model.safetensors"));
    const std::string name = json[hub ? "model_name" : "base_model_name_or_path"];
    auto& base = bases[name];
    if (!base) {
      auto source = ModelSource::Open(kRoot / "models" / name);
      ASSERT_TRUE(source.ok()) << source.status();
      base = std::make_unique<BaseModelView>(std::shared_ptr<const ModelSource>(*std::move(source)));
    }
    uint64_t header = 0;
    ASSERT_GT(weights.size(), sizeof(header));
    std::memcpy(&header, weights.data(), sizeof(header));
    for (uint32_t seed = 0; seed < kSeeds; ++seed) {
      TryBytes(*base, testing::Mutator(seed).Mutate(config), weights);
      // The header keeps its length, so that more than the length is tried.
      std::string damaged = testing::Mutator(seed).Mutate(weights.substr(8, header));
      damaged.resize(header, ' ');
      TryBytes(*base, config, weights.substr(0, 8) + damaged + weights.substr(8 + header));
      TryBytes(*base, config, testing::Mutator(seed).Mutate(weights));
    }
  }
  EXPECT_GT(adapters, 60);
}

}  // namespace
}  // namespace lorikeet
