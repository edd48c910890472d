// What adapters have in common is in host memory once: by bytes.
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "adapters_cache/registry.h"
#include "engine/model/base_model_view.h"
#include "nlohmann/json.hpp"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
constexpr auto kDrain = std::chrono::hours(1);

class SharedBlobsTest : public ::testing::Test {
 protected:
  void Open(int64_t host_bytes) {
    auto registry = AdapterRegistry::Create(
        *base_, {.base_name = "base", .allowed_roots = {directory_.path()}, .host_bytes = host_bytes});
    ASSERT_TRUE(registry.ok()) << registry.status();
    registry_ = *std::move(registry);
  }
  // A golden with the same tensors and another version.
  fs::path Copy(const std::string& golden, const std::string& name) {
    const fs::path to = directory_.path() / name;
    fs::copy(fs::path("tests/golden/variants") / golden, to);
    auto config = nlohmann::ordered_json::parse(std::ifstream(to / "adapter_config.json"));
    config["revision"] = name;
    std::ofstream(to / "adapter_config.json") << config;
    return to;
  }
  int64_t Load(const std::string& golden, const std::string& name) {
    const auto info = registry_->Load(name, Copy(golden, name), AdapterRegistry::Origin::kClient);
    EXPECT_TRUE(info.ok()) << info.status();
    return info.ok() ? info->bytes : 0;
  }
  int64_t host_bytes() const { return registry_->stats().host_bytes; }

  const testing::TempDir directory_;
  const std::unique_ptr<BaseModelView> base_ = [] {
    auto source = ModelSource::Open("tests/golden/models/llama");
    LK_CHECK_MSG(source.ok(), source.status().ToString());
    return std::make_unique<BaseModelView>(std::shared_ptr<const ModelSource>(*std::move(source)));
  }();
  std::unique_ptr<AdapterRegistry> registry_;
};

// The golden adapts q and v of two layers at rank 8: each reads the same 8 x 64 floats of vera_A.
TEST_F(SharedBlobsTest, VerasProjectionIsThereOnceForAllAdapters) {
  constexpr int64_t kProjection = 8 * 64 * 4;
  Open(1 << 20);
  const int64_t own = Load("vera", "a");
  EXPECT_GT(own, 0);
  EXPECT_EQ(host_bytes(), own + kProjection);
  for (const char* name : {"b", "c", "d"}) EXPECT_EQ(Load("vera", name), own);
  EXPECT_EQ(host_bytes(), 4 * own + kProjection);
  // Others have none of it.
  const int64_t lora = Load("lora", "lora");
  EXPECT_EQ(host_bytes(), 4 * own + kProjection + lora);
  for (const char* name : {"a", "b", "c", "lora"}) {
    ASSERT_TRUE(registry_->Unload(name, kDrain).ok());
  }
  EXPECT_EQ(host_bytes(), own + kProjection);
  ASSERT_TRUE(registry_->Unload("d", kDrain).ok());
  EXPECT_EQ(host_bytes(), 0);
}

TEST_F(SharedBlobsTest, FrozenFactorsOfTinyLoraAndLoraXsAreSharedToo) {
  Open(1 << 20);
  for (const std::string golden : {"tinylora", "lora_xs", "pvera"}) {
    const int64_t own = Load(golden, golden + "1");
    const int64_t one = host_bytes();
    EXPECT_GT(one, own) << golden;
    EXPECT_EQ(Load(golden, golden + "2"), own);
    EXPECT_EQ(host_bytes(), one + own) << golden;
    ASSERT_TRUE(registry_->Unload(golden + "1", kDrain).ok());
    ASSERT_TRUE(registry_->Unload(golden + "2", kDrain).ok());
    EXPECT_EQ(host_bytes(), 0) << golden;
  }
}

// What is shared takes room: with it, a second adapter no longer fits beside the first.
TEST_F(SharedBlobsTest, WhatIsSharedCountsAgainstTheBound) {
  Open(1 << 20);
  const int64_t own = Load("vera", "probe");
  const int64_t shared = host_bytes() - own;
  ASSERT_TRUE(registry_->Unload("probe", kDrain).ok());
  Open(2 * own + shared / 2);
  Load("vera", "first");
  Load("vera", "second");
  EXPECT_EQ(registry_->stats().in_host, 1);
  Open(2 * own + shared);
  Load("vera", "third");
  Load("vera", "fourth");
  EXPECT_EQ(registry_->stats().in_host, 2);
}

// HiRA's golden is dense on q and v of two layers, 64 x 64 and in float32.
TEST_F(SharedBlobsTest, DenseDeltasAreRefusedWithTheBytesOfAllOfThem) {
  Open(1 << 20);
  const auto info =
      registry_->Load("hira", Copy("hira", "hira"), AdapterRegistry::Origin::kClient);
  EXPECT_EQ(info.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(info.status().message(),
            "this adapter is a dense delta, which takes 65536 bytes; a server started with "
            "--allow-dense loads it");
  EXPECT_EQ(host_bytes(), 0);
}

}  // namespace
}  // namespace lorikeet
