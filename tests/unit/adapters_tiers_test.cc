// Versions between disk and host memory, names that lead to them, and what outlives the process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/resource.h>

#include <atomic>
#include <csignal>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "adapters_cache/registry.h"
#include "adapters_cache/registry_file.h"
#include "tests/support/sanitized.h"
#include "tests/unit/adapters_support.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::TempDir;
using testing::TestAdapter;
using testing::TestBase;
using std::chrono::hours;
using std::chrono::microseconds;
namespace fs = std::filesystem;

constexpr microseconds kNow{0};

class Tiers : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(Root());
    options_.base_name = "the-base";
    options_.allowed_roots = {Root()};
    Write("probe", 99);
    Open();
    each_ = Load("probe", "probe")->bytes;  // all have this size
    ASSERT_TRUE(registry_->Unload("probe", hours(1)).ok());
  }
  void Open() {
    registry_.reset();
    auto registry = AdapterRegistry::Create(base_, options_);
    ASSERT_TRUE(registry.ok()) << registry.status();
    registry_ = *std::move(registry);
  }
  fs::path Root() const { return dir_.path() / "root"; }
  void Write(const std::string& name, uint32_t seed) const {
    TestAdapter::Lora(base_, {"q_proj", "up_proj"}, 4, seed).Write(Root() / name);
  }
  absl::StatusOr<AdapterInfo> Load(const std::string& name, const fs::path& path,
                                   AdapterRegistry::LoadOptions options = {}) {
    return registry_->Load(name, path, options);
  }
  // `count` adapters a0, a1, ... with other bytes each.
  void LoadMany(int count) {
    for (int i = 0; i < count; ++i) {
      const std::string name = "a" + std::to_string(i);
      Write(name, static_cast<uint32_t>(i));
      const auto info = Load(name, name);
      ASSERT_TRUE(info.ok()) << info.status();
    }
  }
  bool InHost(const std::string& name) { return registry_->Get(name)->in_host; }

  const TestBase base_ = TestBase::Random(2);
  const TempDir dir_;
  AdapterRegistry::Options options_;
  std::unique_ptr<AdapterRegistry> registry_;
  int64_t each_ = 0;
};

TEST_F(Tiers, WhatWasUsedLongestAgoMakesRoomAndComesBackWhenAskedFor) {
  options_.host_bytes = 2 * each_ + each_ / 2;
  Open();
  LoadMany(3);
  EXPECT_FALSE(InHost("a0"));
  EXPECT_TRUE(InHost("a1") && InHost("a2"));
  EXPECT_EQ(registry_->stats().host_bytes, 2 * each_);
  ASSERT_TRUE(registry_->Acquire("a1").ok());
  const auto lease = registry_->Acquire("a0");
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_EQ(lease->version(), registry_->Get("a0")->version);
  EXPECT_NE(lease->get()->modules[0].low_rank.a, nullptr);
  EXPECT_TRUE(InHost("a0") && InHost("a1"));
  EXPECT_FALSE(InHost("a2")) << "a1 was used after it";
  const RegistryStats stats = registry_->stats();
  EXPECT_EQ(stats.names, 3);
  EXPECT_EQ(stats.in_host, 2);
  EXPECT_EQ(stats.host_hits, 1);
  EXPECT_EQ(stats.host_misses, 1);
  EXPECT_EQ(stats.evictions, 2);
}

TEST_F(Tiers, AReadWaitsForRoomThatRequestsHold) {
  options_.host_bytes = each_;
  Open();
  LoadMany(2);
  std::optional<AdapterLease> held = *registry_->Acquire("a0");
  auto other = std::async(std::launch::async, [&] { return registry_->Acquire("a1"); });
  EXPECT_EQ(other.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  EXPECT_TRUE(registry_->Acquire("a0").ok()) << "what is there waits for nobody";
  Write("b", 7);
  EXPECT_TRUE(Load("b", "b").ok()) << "registering needs no room";
  held.reset();
  const auto lease = other.get();
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_LE(registry_->stats().host_bytes, options_.host_bytes);
}

TEST_F(Tiers, AnAdapterLargerThanHostMemoryIsRefused) {
  options_.host_bytes = each_ - 1;
  Open();
  Write("a", 1);
  const absl::Status status = Load("a", "a").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(each_)));
}

TEST_F(Tiers, PinnedOnesStayAndWhatCannotFitBesideThemSaysSo) {
  options_.host_bytes = 2 * each_;
  Open();
  LoadMany(3);
  ASSERT_TRUE(registry_->SetPinned("a1", true).ok());
  ASSERT_TRUE(registry_->Acquire("a0").ok());
  ASSERT_TRUE(registry_->Acquire("a2").ok());
  EXPECT_TRUE(InHost("a1"));
  ASSERT_TRUE(registry_->SetPinned("a2", true).ok());
  ASSERT_TRUE(registry_->SetAlias("both", {{"a1", 1}, {"a0", 1}}).ok());
  Write("b", 7);
  for (const absl::Status& full :
       {registry_->Acquire("a0").status(), registry_->SetPinned("a0", true).status(),
        registry_->SetPinned("both", true).status(), Load("b", "b", {.pin = true}).status(),
        Load("c", "a0", {.pin = true}).status()}) {
    EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted) << full;
    EXPECT_THAT(std::string(full.message()), HasSubstr("pinned"));
  }
  EXPECT_EQ(registry_->List({}).size(), 4u) << "what cannot be pinned is not loaded";
  EXPECT_TRUE(Load("a2", "a2", {.pin = true}).ok()) << "it is pinned already";
  ASSERT_TRUE(registry_->SetPinned("a1", false).ok());
  EXPECT_TRUE(registry_->Acquire("a0").ok());
  EXPECT_TRUE(registry_->SetPinned("nobody", true).status().code() == absl::StatusCode::kNotFound);
}

TEST_F(Tiers, PrefetchBringsItAndPinningDoesToo) {
  options_.host_bytes = each_;
  Open();
  LoadMany(2);
  EXPECT_FALSE(InHost("a0"));
  EXPECT_TRUE(registry_->Prefetch("a0").ok());
  EXPECT_TRUE(InHost("a0"));
  EXPECT_TRUE(registry_->Prefetch("a0").ok());
  EXPECT_EQ(registry_->Prefetch("nobody").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(registry_->Get("a0")->leases, 0);
}

TEST_F(Tiers, FilesThatChangedOrWentSinceTheLoadFailTheirRequestsAlone) {
  options_.host_bytes = each_;
  Open();
  LoadMany(2);
  Write("a0", 50);  // other bytes
  const absl::Status changed = registry_->Acquire("a0").status();
  EXPECT_EQ(changed.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(changed.message()), HasSubstr("reload"));
  EXPECT_TRUE(registry_->Acquire("a1").ok());
  fs::remove_all(Root() / "a0");
  EXPECT_EQ(registry_->Acquire("a0").status().code(), absl::StatusCode::kNotFound);
  fs::create_directory_symlink("/etc", Root() / "a0");
  EXPECT_EQ(registry_->Acquire("a0").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(registry_->stats().host_bytes, 0) << "a failed read gives its room back";
  Write("elsewhere", 0);  // a0's bytes
  ASSERT_TRUE(Load("a0", "elsewhere").ok());
  EXPECT_TRUE(registry_->Acquire("a0").ok());
}

TEST_F(Tiers, AVersionIsReadFromWhereverANameStillHasItsBytes) {
  options_.host_bytes = each_;
  options_.state_file = dir_.path() / "registry";
  Open();
  LoadMany(2);
  for (const char* twin : {"twin", "uploaded"}) Write(twin, 0);  // a0's bytes
  fs::rename(Root() / "uploaded", dir_.path() / "uploaded");
  ASSERT_TRUE(registry_->Load("uploaded", dir_.path() / "uploaded",
                              {.origin = AdapterRegistry::Origin::kOperator}).ok());
  ASSERT_TRUE(Load("twin", "twin").ok());
  Write("twin", 50);  // other bytes
  fs::remove_all(Root() / "a0");
  for (int restart = 0; restart < 2; ++restart) {
    for (const char* name : {"a0", "twin", "uploaded"}) {
      ASSERT_TRUE(registry_->Acquire("a1").ok()) << "a0's bytes made room";
      const auto lease = registry_->Acquire(name);
      ASSERT_TRUE(lease.ok()) << name << ": " << lease.status();
      EXPECT_EQ(lease->version(), registry_->Get(name)->version);
    }
    Open();
  }
  EXPECT_EQ(registry_->Reload("a0").status().code(), absl::StatusCode::kNotFound)
      << "a name's own place stays its own";
  fs::remove_all(dir_.path() / "uploaded");
  ASSERT_TRUE(registry_->Acquire("a1").ok());
  EXPECT_FALSE(registry_->Acquire("a0").ok());
  EXPECT_FALSE(InHost("a0"));
  Write("a0", 0);
  // The first may join a read ahead that began before the file was there.
  EXPECT_TRUE(registry_->Acquire("uploaded").ok() || registry_->Acquire("uploaded").ok())
      << "the read that failed keeps no room";
}

// What a client loads stays within the roots, whatever another name of the same bytes may do.
TEST_F(Tiers, ARestartGivesNoNameAnothersRights) {
  options_.state_file = dir_.path() / "registry";
  Open();
  Write("a", 1);
  fs::copy(Root() / "a", dir_.path() / "outside");
  ASSERT_TRUE(registry_->Load("uploaded", dir_.path() / "outside",
                              {.origin = AdapterRegistry::Origin::kOperator}).ok());
  ASSERT_TRUE(Load("client", "a").ok());
  Open();
  EXPECT_TRUE(registry_->Reload("uploaded").ok());
  fs::remove_all(Root() / "a");
  fs::create_directory_symlink(dir_.path() / "outside", Root() / "a");
  EXPECT_EQ(registry_->Reload("client").status().code(), absl::StatusCode::kPermissionDenied);
}

TEST_F(Tiers, ManyRequestsForOneColdAdapterReadItOnce) {
  options_.host_bytes = each_;
  Open();
  LoadMany(2);
  std::vector<std::future<absl::StatusOr<AdapterLease>>> asked;
  for (int i = 0; i < 20; ++i) {
    asked.push_back(std::async(std::launch::async, [&] { return registry_->Acquire("a0"); }));
  }
  std::set<const Adapter*> objects;
  std::vector<AdapterLease> leases;
  for (auto& future : asked) {
    leases.push_back(*future.get());
    objects.insert(leases.back().get());
  }
  EXPECT_EQ(objects.size(), 1);
  EXPECT_EQ(registry_->Get("a0")->leases, 20);
}

TEST_F(Tiers, AReloadLeadsTheNameToOtherBytesAndRunningRequestsKeepTheirs) {
  Write("a", 1);
  const auto first = Load("a", "a");
  const AdapterLease running = *registry_->Acquire("a");
  EXPECT_EQ(registry_->Reload("a")->version, first->version) << "the same bytes";
  Write("a", 2);
  const auto second = registry_->Reload("a");
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_NE(second->version, first->version);
  EXPECT_EQ(registry_->Acquire("a")->version(), second->version);
  EXPECT_EQ(running.version(), first->version);
  EXPECT_NE(running.get()->modules[0].low_rank.a, nullptr);
  EXPECT_EQ(registry_->stats().versions, 2);
  Write("b", 3);
  EXPECT_EQ(Load("a", "b").status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(Load("a", "b", {.replace = true}).ok());
  EXPECT_EQ(registry_->Reload("nobody").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(Tiers, TheOldVersionOfAReloadIsFreedWithItsLastRequest) {
  Write("a", 1);
  ASSERT_TRUE(Load("a", "a").ok());
  std::optional<AdapterLease> running = *registry_->Acquire("a");
  Write("a", 2);
  ASSERT_TRUE(registry_->Reload("a").ok());
  EXPECT_EQ(registry_->stats().host_bytes, 2 * each_);
  running.reset();
  EXPECT_EQ(registry_->stats().host_bytes, each_);
  EXPECT_EQ(registry_->stats().versions, 1);
}

TEST_F(Tiers, AnAliasSplitsRequestsByWeightAndChangesInOneStep) {
  LoadMany(2);
  const std::string v0 = registry_->Get("a0")->version, v1 = registry_->Get("a1")->version;
  ASSERT_TRUE(registry_->SetAlias("prod", {{"a0", 9}, {v1, 1}}).ok());
  std::map<std::string, int> asked;
  for (int i = 0; i < 1000; ++i) ++asked[std::string(registry_->Acquire("prod")->version())];
  EXPECT_NEAR(asked[v0], 900, 30);
  EXPECT_EQ(asked[v0] + asked[v1], 1000);
  EXPECT_EQ(registry_->Get("prod")->hits, 1000);

  EXPECT_EQ(registry_->Unload("a0", kNow)->host_bytes_freed, 0) << "prod leads there";
  EXPECT_EQ(registry_->Reload("prod").status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(registry_->SetAlias("prod", {{"a1", 1}}).ok());
  EXPECT_EQ(registry_->Acquire("prod")->version(), v1);
  EXPECT_EQ(registry_->stats().host_bytes, each_) << "nothing leads to the other any more";

  const auto code = [&](const std::vector<AdapterTarget>& targets) {
    return registry_->SetAlias("x", targets).status().code();
  };
  EXPECT_EQ(code({}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({{"a1", 0}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({{"nobody", 1}}), absl::StatusCode::kNotFound);
  EXPECT_EQ(code(std::vector<AdapterTarget>(9, {"a1", 1})), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(registry_->SetAlias("the-base", {{"a1", 1}}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(registry_->Get("x").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(Tiers, ListsByPageAndFilter) {
  LoadMany(5);
  ASSERT_TRUE(registry_->SetAlias("b", {{"a3", 1}}).ok());
  const auto names = [&](const AdapterFilter& filter) {
    std::string all;
    for (const AdapterInfo& info : registry_->List(filter)) all += info.name + " ";
    return all;
  };
  EXPECT_EQ(names({}), "a0 a1 a2 a3 a4 b ");
  EXPECT_EQ(names({.limit = 2}), "a0 a1 ");
  EXPECT_EQ(names({.after = "a1", .limit = 2}), "a2 a3 ");
  EXPECT_EQ(names({.name_prefix = "a", .after = "a3"}), "a4 ");
  EXPECT_EQ(names({.name_prefix = "b"}), "b ");
  EXPECT_EQ(names({.version = registry_->Get("a3")->version}), "a3 b ");
  EXPECT_EQ(names({.name_prefix = "c"}), "");
}

TEST_F(Tiers, AWatcherSeesEveryChangeInOrder) {
  std::atomic<int> wakes = 0;
  const auto watch = registry_->Watch([&] { ++wakes; });
  Write("a", 1);
  ASSERT_TRUE(Load("a", "a").ok());
  Write("a", 2);
  ASSERT_TRUE(registry_->Reload("a").ok());
  ASSERT_TRUE(registry_->Unload("a", hours(1)).ok());
  std::vector<AdapterEvent::Kind> kinds;
  AdapterEvent event;
  while (*watch->Next(&event)) {
    kinds.push_back(event.kind);
    EXPECT_EQ(event.version.size(), 64);
  }
  using Kind = AdapterEvent::Kind;
  EXPECT_THAT(kinds, ::testing::ElementsAre(Kind::kInHost, Kind::kRegistered, Kind::kInHost,
                                            Kind::kRegistered, Kind::kFreed, Kind::kUnloaded,
                                            Kind::kFreed));
  EXPECT_EQ(wakes, 7);
}

TEST_F(Tiers, NamesAreThereAfterARestartAndTheirFilesAreChecked) {
  options_.state_file = dir_.path() / "registry";
  Open();
  LoadMany(3);
  Write("twin", 0);  // a0's bytes
  ASSERT_TRUE(Load("twin", "twin").ok());
  ASSERT_TRUE(registry_->SetAlias("prod", {{"a0", 3}, {"a1", 1}}).ok());
  ASSERT_TRUE(registry_->SetPinned("a2", true).ok());
  ASSERT_TRUE(registry_->Unload("a1", hours(1)).ok());
  TestAdapter::Lora(base_, {"q_proj"}, 2, 5).Write(dir_.path() / "outside");
  ASSERT_TRUE(
      registry_->Load("operator", dir_.path() / "outside", AdapterRegistry::Origin::kOperator)
          .ok());
  const auto before = *registry_->Get("prod");
  Open();
  EXPECT_EQ(registry_->Get("a1").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(registry_->Get("operator").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(registry_->Get("prod")->targets, before.targets);
  EXPECT_EQ(registry_->Get("twin")->path, (Root() / "twin").string());
  EXPECT_TRUE(registry_->Get("a2")->pinned);
  EXPECT_FALSE(InHost("a0"));
  EXPECT_EQ(registry_->Acquire("a0")->version(), registry_->Get("a0")->version);
  Write("a2", 77);
  Open();
  EXPECT_EQ(registry_->Acquire("a2").status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(Tiers, WhatWasAskedForMostOftenIsReadAheadAfterARestart) {
  options_.state_file = dir_.path() / "registry";
  Open();
  LoadMany(4);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(registry_->Acquire("a2").ok());
  ASSERT_TRUE(registry_->Acquire("a1").ok());
  registry_.reset();
  options_.host_bytes = each_;
  Open();
  EXPECT_EQ(registry_->Get("a2")->hits, 3) << "they outlive the process";
  while (!InHost("a2")) std::this_thread::yield();
  EXPECT_FALSE(InHost("a1")) << "nothing goes for what may never be asked for";
  ASSERT_TRUE(registry_->Unload("a2", hours(1)).ok());
  while (!InHost("a1")) std::this_thread::yield();
  EXPECT_FALSE(InHost("a0") || InHost("a3")) << "nobody asked for them";
}

TEST_F(Tiers, ATenantHasItsShareOfNamesAndHostMemory) {
  options_.state_file = dir_.path() / "registry";
  options_.tenant_max_adapters = 2;
  options_.tenant_host_bytes = each_;
  options_.host_bytes = 4 * each_;
  Open();
  LoadMany(1);  // nobody's
  const auto load = [&](const std::string& name, uint32_t seed, const std::string& tenant) {
    Write(name, seed);
    return Load(name, name, {.tenant = tenant}).status();
  };
  ASSERT_TRUE(load("x1", 11, "x").ok());
  ASSERT_TRUE(load("x2", 12, "x").ok());
  const absl::Status third = load("x3", 13, "x");
  EXPECT_EQ(third.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(third.message()), HasSubstr("tenant 'x' has 2"));
  EXPECT_EQ(registry_->SetAlias("x3", {{"x1", 1}}, "x").status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(InHost("x2") && InHost("a0")) << "its own makes room, not others'";
  EXPECT_FALSE(InHost("x1"));
  ASSERT_TRUE(load("y1", 21, "y").ok()) << "others have shares of their own";

  std::optional<AdapterLease> held = *registry_->Acquire("x2");
  auto waits = std::async(std::launch::async, [&] { return registry_->Acquire("x1"); });
  EXPECT_EQ(waits.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  ASSERT_TRUE(load("z1", 31, "z").ok());
  ASSERT_TRUE(load("z2", 32, "z").ok());
  ASSERT_TRUE(registry_->Acquire("z1").ok()) << "nobody else waits behind it";
  held.reset();
  EXPECT_TRUE(waits.get().ok());

  ASSERT_TRUE(registry_->SetPinned("x2", true).ok());
  ASSERT_TRUE(registry_->Prefetch("x2").ok());  // until it is there x1 may stay
  EXPECT_EQ(registry_->Acquire("x1").status().code(), absl::StatusCode::kResourceExhausted)
      << "what is pinned fills its share";
  Open();
  EXPECT_EQ(load("x3", 13, "x").code(), absl::StatusCode::kResourceExhausted)
      << "whose name it is survives";
  ASSERT_TRUE(registry_->Unload("x1", hours(1)).ok());
  EXPECT_TRUE(load("x3", 13, "x").ok());
}

TEST_F(Tiers, ADamagedStateFileIsRefused) {
  options_.state_file = dir_.path() / "registry";
  Open();
  LoadMany(1);
  registry_.reset();
  std::fstream file(options_.state_file, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(100);
  file.put('#');
  file.close();
  EXPECT_EQ(AdapterRegistry::Create(base_, options_).status().code(), absl::StatusCode::kDataLoss);
  testing::WriteFile(options_.state_file, "2");
  EXPECT_EQ(AdapterRegistry::Create(base_, options_).status().code(), absl::StatusCode::kDataLoss);
  testing::WriteFile(options_.state_file, "2" + std::string(70, '0'));
  EXPECT_EQ(AdapterRegistry::Create(base_, options_).status().code(),
            absl::StatusCode::kUnimplemented);
}

TEST_F(Tiers, AStormOfReloadsEndsWellAndLeavesOneVersion) {
  options_.state_file = dir_.path() / "registry";
  Open();
  Write("a", 1);
  ASSERT_TRUE(Load("a", "a").ok());
  std::vector<std::promise<absl::Status>> ends(300);
  for (size_t i = 0; i < ends.size(); ++i) {
    if (i % 50 == 0) Write("a", static_cast<uint32_t>(i));
    registry_->ReloadAsync("a", [&ends, i](const absl::StatusOr<AdapterInfo>& info) {
      ends[i].set_value(info.status());
    });
  }
  // Some may read files that are half written: they are refused, and nothing changes.
  for (auto& end : ends) end.get_future().wait();
  EXPECT_TRUE(registry_->Reload("a").ok());
  EXPECT_EQ(registry_->stats().names, 1);
  EXPECT_EQ(registry_->stats().versions, 1);
  EXPECT_EQ(registry_->stats().host_bytes, each_);
  Open();
  EXPECT_TRUE(registry_->Acquire("a").ok());
}

// What a disk without room does, as a limit on the size of files does it.
TEST_F(Tiers, WhatCannotBeSavedIsSaidAndSavedTheNextTime) {
  options_.state_file = dir_.path() / "registry";
  Open();
  LoadMany(2);
  Write("b", 7);
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const rlimit tight{100, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &tight);
  const absl::Status loaded = Load("b", "b").status();
  const absl::Status unloaded = registry_->Unload("a1", hours(1)).status();
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(loaded.code(), absl::StatusCode::kUnavailable) << loaded;
  EXPECT_EQ(unloaded.code(), absl::StatusCode::kUnavailable) << unloaded;
  const auto names = [this] {
    std::vector<std::string> found;
    const RegistryRecords records = *ReadRegistryFile(options_.state_file);
    for (const auto& [name, record] : records.names) found.push_back(name);
    return found;
  };
  EXPECT_THAT(names(), ::testing::ElementsAre("a0", "a1")) << "the file is whole";
  ASSERT_TRUE(registry_->SetPinned("a0", true).ok());
  EXPECT_THAT(names(), ::testing::ElementsAre("a0", "b"));
}

TEST_F(Tiers, ARegisteredAdapterThatIsNotLoadedTakesLessThan4KiB) {
  if (kSanitized) GTEST_SKIP() << "memory is the sanitizer's";
  constexpr int kAdapters = 2000;
  RegistryRecords records;
  for (int i = 0; i < kAdapters; ++i) {
    const std::string id = std::string(56, 'a') + std::to_string(10'000'000 + i);
    records.versions[id] = {.id = id,
                            .variant = "lora",
                            .path = "/a/path/as/long/as/paths/usually/are/adapter-" + id,
                            .warnings = {"a key of the configuration that changes nothing"}};
    records.names["tenant/adapter-" + std::to_string(i)].targets = {{id, 1}};
  }
  options_.state_file = dir_.path() / "registry";
  ASSERT_TRUE(WriteRegistryFile(options_.state_file, records).ok());
  records = {};
  registry_.reset();
  malloc_trim(0);
  const auto in_use = [] { return mallinfo2().uordblks + mallinfo2().hblkhd; };
  const size_t before = in_use();
  Open();
  ASSERT_EQ(registry_->stats().names, kAdapters);
  const size_t each = (in_use() - before) / kAdapters;
  RecordProperty("bytes_per_registered_adapter", static_cast<int>(each));
  EXPECT_LT(each, 4096u);
  EXPECT_GT(each, 100u) << "the measure is broken";
}

TEST_F(Tiers, HoldsUnderConcurrentChangesOfEveryKind) {
  options_.host_bytes = 3 * each_;  // each reader holds one adapter while it asks for another
  options_.state_file = dir_.path() / "registry";
  Open();
  constexpr int kNames = 4;
  for (uint32_t i = 0; i < 4; ++i) Write("s" + std::to_string(i), i);
  std::atomic<bool> stop = false;
  std::atomic<int64_t> leases = 0;
  std::vector<std::thread> threads;
  const auto name = [](int i) { return "n" + std::to_string(i % kNames); };
  threads.emplace_back([&] {
    for (int i = 0; i < 150; ++i) {
      const auto info = Load(name(i), "s" + std::to_string(i % 3), {.replace = true});
      EXPECT_TRUE(info.ok()) << info.status();
    }
    stop = true;
  });
  threads.emplace_back([&] {
    for (int i = 0; !stop; ++i) {
      const auto done = registry_->Unload(name(i * 3), microseconds(100)).status();
      EXPECT_TRUE(done.ok() || done.code() == absl::StatusCode::kNotFound ||
                  done.code() == absl::StatusCode::kDeadlineExceeded)
          << done;
    }
  });
  threads.emplace_back([&] {
    for (int i = 0; !stop; ++i) {
      const auto alias = registry_->SetAlias("alias", {{name(i), 1}, {name(i + 1), 2}}).status();
      EXPECT_TRUE(alias.ok() || alias.code() == absl::StatusCode::kNotFound) << alias;
      registry_->SetPinned(name(i), i % 2 == 0).IgnoreError();
      registry_->SetPinned(name(i), false).IgnoreError();
    }
  });
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      std::vector<AdapterLease> held;
      for (int i = t; !stop; ++i) {
        auto lease = registry_->Acquire(i % 5 == 0 ? "alias" : name(i));
        if (lease.ok()) {
          ++leases;
          EXPECT_EQ(lease->get()->version.size(), 64);
          held = {*std::move(lease)};
        }
        EXPECT_LE(registry_->stats().host_bytes, options_.host_bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(leases, 0);
  for (const AdapterInfo& info : registry_->List({})) {
    EXPECT_TRUE(registry_->Unload(info.name, hours(1)).ok());
  }
  EXPECT_EQ(registry_->stats().host_bytes, 0);
  EXPECT_EQ(registry_->stats().versions, 0);
  EXPECT_THAT(ReadRegistryFile(options_.state_file)->names, IsEmpty());
}

}  // namespace
}  // namespace lorikeet
