// What adapters have in common is in host memory once: by bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/merged_weights.h"
#include "adapters_cache/mixer.h"
#include "adapters_cache/normalise.h"
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

// The golden adapts q and v of two layers at rank 8: each reads the same 8 x 64 floats of vera_A and
// 64 x 8 of vera_B. Its own are two vectors a linear.
TEST_F(SharedBlobsTest, VerasProjectionsAreThereOnceForAllAdapters) {
  constexpr int64_t kProjection = 2 * 8 * 64 * 4;
  Open(1 << 20);
  const int64_t own = Load("vera", "a");
  EXPECT_EQ(own, 4 * (8 + 64) * 4);
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

// With what is an adapter's own beside the factors, folded into them where a device has to have it so, and
// in a sum: the same weights.
TEST_F(SharedBlobsTest, WhatStandsBesideFactorsMayBeFolded) {
  const ModuleId q = LayerModule(1, Linear::kQ);
  for (const std::string golden : {"vera", "pvera", "lora_xs", "tinylora"}) {
    auto files = ReadAdapterFiles("tests/golden/variants/" + golden, {});
    ASSERT_TRUE(files.ok()) << files.status();
    Problems problems;
    const RawAdapter raw = ParseAdapter(*std::move(files), &problems);
    const auto beside = Normalise(raw, *base_, {}), folded = Normalise(raw, *base_, {.on_host = false});
    ASSERT_TRUE(beside.ok() && folded.ok()) << beside.status() << folded.status();
    const WeightedAdapter half{golden, 0.5f};
    const std::vector<WeightedAdapter> terms = {half, half};
    const std::vector<AdapterLease> leases = {AdapterLease(*beside), AdapterLease(*folded)};
    const auto sum = SumAdapters(*base_, terms, leases);
    ASSERT_TRUE(sum.ok()) << sum.status();
    const LowRank& pair = (*beside)->module(q).low_rank;
    EXPECT_TRUE(pair.delta_scale || pair.rank_mix) << golden;
    const LowRank& plain = (*folded)->module(q).low_rank;
    EXPECT_FALSE(plain.rank_mix) << golden;
    EXPECT_EQ(plain.shares_a, pair.rank_mix == nullptr) << golden;
    std::vector<float> expected(64), row(64);
    float bias = 0, changed = 0;
    for (int32_t o = 0; o < 64; ++o) {
      MergedLinear(*base_, q, **folded).Row(o, expected.data(), &bias);
      base_->ReadRows(q, o, 1, row.data());
      for (int i = 0; i < 64; ++i) changed = std::max(changed, std::abs(row[i] - expected[i]));
      for (const Adapter* adapter : {beside->get(), static_cast<const Adapter*>(sum->get())}) {
        MergedLinear(*base_, q, *adapter).Row(o, row.data(), &bias);
        for (int i = 0; i < 64; ++i) EXPECT_NEAR(row[i], expected[i], 1e-6) << golden;
      }
    }
    EXPECT_GT(changed, 1e-3) << golden;
  }
}

// Adapters for a device point to one object with what they have in common, which has an image there.
TEST_F(SharedBlobsTest, OnADeviceAdaptersHaveOneObjectInCommon) {
  SharedBlobs blobs;
  const auto load = [&](const std::string& golden) {
    auto files = ReadAdapterFiles("tests/golden/variants/" + golden, {});
    LK_CHECK(files.ok());
    Problems problems;
    const RawAdapter raw = ParseAdapter(*std::move(files), &problems);
    auto adapter = Normalise(raw, *base_, {.on_host = false, .blobs = &blobs});
    LK_CHECK_MSG(adapter.ok(), adapter.status().ToString());
    return *std::move(adapter);
  };
  EXPECT_EQ(load("lora")->shared, nullptr);
  auto one = load("vera");
  auto other = load("vera");
  ASSERT_NE(one->shared, nullptr);
  EXPECT_EQ(one->shared, other->shared);
  EXPECT_EQ(one->shared->shared_rows.size(), 2u);  // vera_A, vera_B
  EXPECT_NE(load("miss")->shared, one->shared);
  auto random = load("randlora");
  ASSERT_NE(random->shared, nullptr);
  EXPECT_EQ(random->shared->shared_rows.size(), 1u);  // its bases
  EXPECT_EQ(random->shared, load("randlora")->shared);
  random.reset();
  const std::weak_ptr<const Adapter> shared = one->shared;
  one.reset();
  EXPECT_FALSE(shared.expired());
  other.reset();
  EXPECT_TRUE(shared.expired());
  EXPECT_EQ(blobs.bytes(), 0);
}

// MiSS sums its inputs by a factor that is the same for all adapters of a rank.
TEST_F(SharedBlobsTest, WhatSumsInputsIsThereOnce) {
  Open(1 << 20);
  const int64_t own = Load("miss", "a");
  const int64_t shared = host_bytes() - own;
  EXPECT_GT(shared, 0);
  EXPECT_EQ(Load("miss", "b"), own);
  EXPECT_EQ(host_bytes(), 2 * own + shared);
}

// RandLoRA's second factor is its bases, of rank 16 x 4 on 64 x 64; what an adapter trains is in the first.
TEST_F(SharedBlobsTest, RandomBasesAreThereOnce) {
  Open(1 << 20);
  constexpr int64_t kFactor = 64 * 64 * sizeof(float);
  EXPECT_EQ(Load("randlora", "a"), 2 * kFactor);  // q of two layers
  EXPECT_EQ(host_bytes(), 3 * kFactor);
  EXPECT_EQ(Load("randlora", "b"), 2 * kFactor);
  EXPECT_EQ(host_bytes(), 5 * kFactor);
}

// VB-LoRA's vectors are mixed into factors of the adapter's rank, 2 on q and v of two layers, and not kept.
TEST_F(SharedBlobsTest, ABankOfVectorsIsNotKept) {
  Open(1 << 20);
  constexpr int64_t kFactors = 4 * 2 * (64 + 64) * sizeof(float);
  for (const char* golden : {"vblora", "vblora_topk"}) {
    EXPECT_EQ(Load(golden, golden), kFactors);
    EXPECT_EQ(host_bytes(), kFactors);
    ASSERT_TRUE(registry_->Unload(golden, kDrain).ok());
  }
}

// Rank 4 (LoRA-XS) and 2 on q, o and down of two layers: an adapter's own is what lies between the
// factors. PVeRA's are its vectors, as VeRA's.
TEST_F(SharedBlobsTest, FrozenFactorsAreThereOnceToo) {
  const std::map<std::string, int64_t> own_bytes = {
      {"lora_xs", 6 * 4 * 4 * 4}, {"tinylora", 6 * 2 * 2 * 4}, {"pvera", 4 * (8 + 64) * 4}};
  Open(1 << 20);
  for (const auto& [golden, own] : own_bytes) {
    EXPECT_EQ(Load(golden, golden + "1"), own) << golden;
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
  Open(2 * own - 1 + shared);
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
