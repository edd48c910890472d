// The registry's promises: names, versions, roots, leases and memory, alone and under concurrency.
#include "adapters_cache/registry.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <filesystem>
#include <future>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "tests/unit/adapters_support.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::TempDir;
using testing::TestAdapter;
using testing::TestBase;
using Origin = AdapterRegistry::Origin;
using std::chrono::hours;
using std::chrono::microseconds;
namespace fs = std::filesystem;

constexpr microseconds kNow{0};

// A base whose weights cannot be read before Open(): a DoRA load of it is under way until then.
class GatedBase final : public BaseModel {
 public:
  explicit GatedBase(const TestBase& base) : base_(base) {}
  int layers() const override { return base_.layers(); }
  int32_t vocab_size() const override { return base_.vocab_size(); }
  LinearShape shape(ModuleId id) const override { return base_.shape(id); }
  void ReadRows(ModuleId id, int32_t first_row, int32_t rows, float* out) const override {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
    base_.ReadRows(id, first_row, rows, out);
  }
  void WaitUntilRead(int readers = 1) const {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this, readers] { return waiting_ >= readers; });
  }
  void Open() {
    std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  const TestBase& base_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable int waiting_ = 0;
  bool open_ = false;
};

class Registry : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(Root());
    registry_ = Make({Root()}, base_);
  }

  static std::unique_ptr<AdapterRegistry> Make(std::vector<fs::path> roots, const BaseModel& base,
                                               int loader_threads = 2) {
    auto registry = AdapterRegistry::Create(base, {.base_name = "the-base",
                                                   .allowed_roots = std::move(roots),
                                                   .loader_threads = loader_threads});
    EXPECT_TRUE(registry.ok()) << registry.status();
    return *std::move(registry);
  }

  fs::path Root() const { return dir_.path() / "root"; }

  // A LoRA directory below the root; other seeds, other bytes.
  fs::path Write(const std::string& name, uint32_t seed, bool dora = false) const {
    TestAdapter adapter = TestAdapter::Lora(base_, {"q_proj", "up_proj"}, 4, seed);
    if (dora) adapter.MakeDora();
    adapter.Write(Root() / name);
    return Root() / name;
  }

  absl::StatusOr<AdapterInfo> Load(const std::string& name, const fs::path& path) {
    return registry_->Load(name, path, Origin::kClient);
  }

  const TestBase base_ = TestBase::Random(2);
  const TempDir dir_;
  std::unique_ptr<AdapterRegistry> registry_;
};

// A page a rank.
class RankImages final : public AdapterImages {
 public:
  absl::StatusOr<ImageSize> Size(const Adapter& adapter) const override { return ImageSize{adapter.max_rank, 0}; }
  void SetWake(std::function<void()>) override {}
  void Move(AdapterMoves) override {}
  std::vector<AdapterLoaded> TakeLoaded() override { return {}; }
};

TEST_F(Registry, AnImageBeyondItsTenantsPagesIsRefusedAndOthersAreItsOwn) {
  const RankImages images;
  const fs::path path = Write("a", 1), other = Write("b", 2);
  const auto load = [&](const std::string& name, const fs::path& from, const std::string& tenant) {
    return registry_->Load(name, from, {.tenant = tenant}).status();
  };
  for (const int32_t pages : {3, 4}) {
    auto registry = AdapterRegistry::Create(
        base_, {.allowed_roots = {Root()}, .tenant_image_pages = pages, .images = &images});
    ASSERT_TRUE(registry.ok()) << registry.status();
    registry_ = *std::move(registry);
    if (pages == 4) break;
    const absl::Status refused = load("x", path, "x");
    EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(refused.message()), HasSubstr("4 pages of the device; its tenant 'x' has 3"));
    EXPECT_TRUE(load("n", path, "").ok()) << "nobody has a bound";
    EXPECT_EQ(registry_->Acquire("n")->tenant(), "");
  }
  EXPECT_TRUE(load("x", path, "x").ok() && load("y", path, "y").ok() && load("z", other, "z").ok());
  EXPECT_EQ(registry_->Acquire("x")->tenant(), "x");
  EXPECT_EQ(registry_->Acquire("y")->tenant(), "x") << "who loaded it first";
  EXPECT_EQ(registry_->Acquire("z")->tenant(), "z");
}

TEST_F(Registry, LoadsServesListsAndUnloads) {
  const auto loaded = Load("one", Write("a", 1));
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->variant, "lora");
  EXPECT_EQ(loaded->path, (Root() / "a").string());
  EXPECT_EQ(loaded->modules, 4);
  EXPECT_EQ(loaded->min_rank, 4);
  EXPECT_EQ(loaded->max_rank, 4);
  EXPECT_GT(loaded->loaded_at_unix_us, 0);
  EXPECT_EQ(loaded->last_used_unix_us, 0);

  {
    const auto lease = registry_->Acquire("one");
    ASSERT_TRUE(lease.ok()) << lease.status();
    EXPECT_EQ(lease->version(), loaded->version);
    const AdapterLease copy = *lease;
    const auto info = registry_->Get("one");
    EXPECT_EQ(info->leases, 1);
    EXPECT_EQ(info->hits, 1);
    EXPECT_GE(info->last_used_unix_us, loaded->loaded_at_unix_us);
  }
  EXPECT_EQ(registry_->Get("one")->leases, 0);
  ASSERT_EQ(registry_->List({}).size(), 1);

  const auto unloaded = registry_->Unload("one", kNow);
  ASSERT_TRUE(unloaded.ok()) << unloaded.status();
  EXPECT_EQ(unloaded->version, loaded->version);
  EXPECT_EQ(unloaded->host_bytes_freed, loaded->bytes);
  EXPECT_THAT(registry_->List({}), IsEmpty());
  for (const absl::Status& status :
       {registry_->Acquire("one").status(), registry_->Get("one").status(),
        registry_->Unload("one", kNow).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
    EXPECT_THAT(std::string(status.message()), HasSubstr("'one'"));
  }
}

TEST_F(Registry, NamesOfOneVersionAreReloadedEachFromItsOwnDirectory) {
  const auto a = Load("a", Write("a", 1));
  const auto b = Load("b", Write("b", 1));
  ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
  EXPECT_EQ(a->version, b->version);
  EXPECT_EQ(b->path, (Root() / "b").string());
  Write("b", 2);
  EXPECT_EQ(registry_->Reload("a")->version, a->version);
  EXPECT_NE(registry_->Reload("b")->version, b->version);
}

TEST_F(Registry, ATakenNameKeepsItsAdapterAndTheSameBytesAreFine) {
  const fs::path a = Write("a", 1), copy = Write("copy", 1), b = Write("b", 2);
  const auto first = Load("one", a);
  ASSERT_TRUE(first.ok()) << first.status();
  const auto again = Load("one", copy);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->version, first->version);
  EXPECT_EQ(again->path, copy.string()) << "where a reload reads from";

  const absl::Status taken = Load("one", b).status();
  EXPECT_EQ(taken.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(taken.message()), HasSubstr("'one'"));
  EXPECT_THAT(std::string(taken.message()), HasSubstr(first->version));
  EXPECT_EQ(registry_->Acquire("one")->version(), first->version);
  EXPECT_EQ(registry_->List({}).size(), 1);
}

TEST_F(Registry, TheSameBytesUnderTwoNamesAreStoredOnceAndFreedWithTheLast) {
  const auto one = Load("one", Write("a", 1));
  const auto two = Load("two", Write("copy", 1));
  ASSERT_TRUE(one.ok() && two.ok()) << one.status() << two.status();
  EXPECT_EQ(registry_->Acquire("one")->get(), registry_->Acquire("two")->get());
  const AdapterLease lease = *registry_->Acquire("two");
  EXPECT_EQ(registry_->Get("one")->leases, 1) << "of the version, through any name";
  EXPECT_EQ(registry_->Get("two")->leases, 1);
  EXPECT_EQ(registry_->Unload("one", kNow)->host_bytes_freed, 0);
  EXPECT_EQ(registry_->Acquire("two")->version(), one->version);
}

TEST_F(Registry, UnloadWaitsForLeasesAndNewRequestsGetNotFound) {
  const auto info = Load("one", Write("a", 1));
  ASSERT_TRUE(info.ok()) << info.status();
  std::optional<AdapterLease> lease = *registry_->Acquire("one");
  auto unload = std::async(std::launch::async, [&] { return registry_->Unload("one", hours(1)); });
  while (!registry_->List({}).empty()) std::this_thread::yield();
  EXPECT_EQ(registry_->Acquire("one").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(lease->get()->version, info->version);  // still there

  const auto next = Load("one", Write("b", 2));  // the name is free at once
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(unload.wait_for(microseconds(1)), std::future_status::timeout);
  lease.reset();
  const auto result = unload.get();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->version, info->version);
  EXPECT_EQ(result->host_bytes_freed, info->bytes);
  EXPECT_EQ(registry_->Acquire("one")->version(), next->version);
}

TEST_F(Registry, ADrainPastItsDeadlineGivesUpTheNameAllTheSame) {
  ASSERT_TRUE(Load("one", Write("a", 1)).ok());
  const AdapterLease lease = *registry_->Acquire("one");
  const absl::Status late = registry_->Unload("one", microseconds(1000)).status();
  EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(late.message()), HasSubstr("'one'"));
  EXPECT_EQ(registry_->Acquire("one").status().code(), absl::StatusCode::kNotFound);
  EXPECT_NE(lease.get()->modules[0].low_rank.a, nullptr);
  // Loading the same bytes again finds the adapter that the lease keeps.
  ASSERT_TRUE(Load("again", Root() / "a").ok());
  EXPECT_EQ(registry_->Acquire("again")->get(), lease.get());
}

TEST_F(Registry, LeasesOutliveTheRegistry) {
  const auto info = Load("one", Write("a", 1));
  ASSERT_TRUE(info.ok()) << info.status();
  const AdapterLease lease = *registry_->Acquire("one");
  registry_.reset();
  EXPECT_EQ(lease.version(), info->version);
  EXPECT_EQ(lease.get()->storage.size(), info->bytes);
}

TEST_F(Registry, PathsOutsideTheRootsAreRefusedByName) {
  TestAdapter::Lora(base_, {"q_proj"}, 2, 1).Write(dir_.path() / "outside");
  TestAdapter::Lora(base_, {"q_proj"}, 2, 1).Write(dir_.path() / "root-not");
  Write("inside", 1);
  fs::create_directory_symlink(dir_.path() / "outside", Root() / "link");
  fs::create_directories(Root() / "files");
  for (const char* file : {"adapter_config.json", "adapter_model.safetensors"}) {
    fs::create_symlink(dir_.path() / "outside" / file, Root() / "files" / file);
  }
  for (const fs::path& path :
       {dir_.path() / "outside", dir_.path() / "root-not", Root() / ".." / "outside",
        Root() / "link", Root() / "files", fs::path("/etc"), fs::path("../outside"),
        fs::path("/proc/self/fd"), dir_.path() / "does-not-exist"}) {
    const absl::Status status = Load("one", path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << path << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(path.filename().string()));
    EXPECT_THAT(std::string(status.message()), HasSubstr(Root().string()));
  }
  EXPECT_EQ(Load("one", Root() / "nothing").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Load("one", "").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(registry_->List({}), IsEmpty());

  EXPECT_TRUE(Load("relative", "inside").ok());
  EXPECT_TRUE(Load("dots", Root() / "inside" / ".." / "inside" / "").ok());
  // Links that stay below the root, as a hub's cache has them.
  fs::create_directory_symlink(Root() / "inside", Root() / "link2");
  EXPECT_TRUE(Load("link", Root() / "link2").ok());
  EXPECT_TRUE(registry_->Load("operator", dir_.path() / "outside", Origin::kOperator).ok());
}

// A directory may become a link between the look at it and the reading: what was read decides.
TEST_F(Registry, ADirectoryThatTurnsIntoALinkLeadsNowhereElse) {
  const fs::path inside = Write("inside", 1), link = Root() / "link";
  TestAdapter::Lora(base_, {"q_proj", "up_proj"}, 4, 2).Write(dir_.path() / "outside");
  fs::create_directory_symlink(dir_.path() / "outside", link);
  const std::string allowed = Load("one", inside)->version;
  std::atomic<bool> stop = false;
  std::thread turner([&] {
    while (!stop) renameat2(AT_FDCWD, inside.c_str(), AT_FDCWD, link.c_str(), RENAME_EXCHANGE);
  });
  std::map<absl::StatusCode, int> ends;
  while (ends[absl::StatusCode::kOk] < 300 || ends[absl::StatusCode::kPermissionDenied] < 300) {
    const auto info = Load("one", inside);
    ++ends[info.status().code()];
    EXPECT_TRUE(info.ok() || absl::IsPermissionDenied(info.status())) << info.status();
    if (info.ok()) {
      EXPECT_EQ(info->version, allowed);
    }
  }
  stop = true;
  turner.join();
}

// As someone types it who stands where the server was started.
TEST_F(Registry, ARelativePathMayLeadToARootFromTheWorkingDirectory) {
  const fs::path inside = Write("inside", 1);
  const auto info = Load("one", fs::relative(inside, fs::current_path()));
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->path, inside.string());
}

TEST_F(Registry, WithoutRootsOnlyTheOperatorLoads) {
  registry_ = Make({}, base_);
  const fs::path path = Write("a", 1);
  EXPECT_EQ(Load("one", path).status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_TRUE(registry_->Load("one", path, Origin::kOperator).ok());
}

TEST_F(Registry, ARootMustBeADirectory) {
  const auto registry = AdapterRegistry::Create(
      base_, {.base_name = "the-base", .allowed_roots = {dir_.path() / "none"}});
  EXPECT_EQ(registry.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(registry.status().message()), HasSubstr("none"));
}

TEST_F(Registry, NamesFollowTheRules) {
  const fs::path path = Write("a", 1);
  const std::string longest(AdapterRegistry::kMaxNameBytes, 'x');
  for (const std::string& name :
       {std::string("a"), std::string("9"), longest, std::string("org/name:v1.2@x+y_z-0")}) {
    EXPECT_TRUE(Load(name, path).ok()) << name;
  }
  for (const std::string& name :
       {std::string(), longest + "x", std::string("-a"), std::string("a b"), std::string("a\nb"),
        std::string("caf\xc3\xa9"), std::string("a\0b", 3), std::string("the-base")}) {
    EXPECT_EQ(Load(name, path).status().code(), absl::StatusCode::kInvalidArgument) << name;
  }
}

TEST_F(Registry, AFailingLoadChangesNothing) {
  const auto info = Load("one", Write("a", 1));
  ASSERT_TRUE(info.ok()) << info.status();
  const fs::path bad = Write("bad", 2);
  fs::resize_file(bad / "adapter_model.safetensors", 200);
  EXPECT_EQ(Load("two", bad).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(Load("one", bad).status().code(), absl::StatusCode::kDataLoss);
  ASSERT_EQ(registry_->List({}).size(), 1);
  EXPECT_EQ(registry_->Acquire("one")->version(), info->version);
}

TEST_F(Registry, AcquireAndUnloadDoNotWaitForALoad) {
  GatedBase gated(base_);
  registry_ = Make({Root()}, gated);
  ASSERT_TRUE(Load("one", Write("a", 1)).ok());
  auto done = std::make_shared<std::promise<absl::StatusOr<AdapterInfo>>>();
  registry_->LoadAsync("dora", Write("d", 2, /*dora=*/true), {},
                       [done](auto info) { done->set_value(std::move(info)); });
  gated.WaitUntilRead();
  EXPECT_TRUE(registry_->Acquire("one").ok());
  EXPECT_EQ(registry_->Acquire("dora").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(registry_->List({}).size(), 1);
  EXPECT_TRUE(Load("two", Root() / "a").ok());
  EXPECT_TRUE(registry_->Unload("one", kNow).ok());
  gated.Open();
  EXPECT_TRUE(done->get_future().get().ok());
  EXPECT_TRUE(registry_->Acquire("dora").ok());
}

TEST_F(Registry, TheSameBytesLoadedAtTheSameTimeAreStoredOnce) {
  GatedBase gated(base_);
  registry_ = Make({Root()}, gated, /*loader_threads=*/2);
  const fs::path path = Write("d", 2, /*dora=*/true);
  auto one = std::async(std::launch::async, [&] { return Load("one", path).status(); });
  auto two = std::async(std::launch::async, [&] { return Load("two", path).status(); });
  gated.WaitUntilRead(2);
  gated.Open();
  EXPECT_TRUE(one.get().ok());
  EXPECT_TRUE(two.get().ok());
  EXPECT_EQ(registry_->Acquire("one")->get(), registry_->Acquire("two")->get());
  EXPECT_EQ(registry_->Unload("one", kNow)->host_bytes_freed, 0);
  EXPECT_GT(registry_->Unload("two", kNow)->host_bytes_freed, 0);
}

TEST_F(Registry, LoadsBeyondTheQueueAreRefusedAndEveryLoadEndsOnce) {
  constexpr int kSurplus = 3;
  GatedBase gated(base_);
  registry_ = Make({Root()}, gated, /*loader_threads=*/1);
  const fs::path path = Write("d", 2, /*dora=*/true);
  std::atomic<int> full = 0, calls = 0;
  const auto count = [&](absl::StatusOr<AdapterInfo> info) {
    full += info.status().code() == absl::StatusCode::kResourceExhausted;
    ++calls;
  };
  registry_->LoadAsync("first", path, {}, count);
  gated.WaitUntilRead();
  for (int i = 0; i < AdapterRegistry::kMaxPendingLoads + kSurplus; ++i) {
    registry_->LoadAsync("n" + std::to_string(i), path, {}, count);
  }
  EXPECT_EQ(full, kSurplus);
  EXPECT_EQ(calls, kSurplus);
  std::thread opener([&gated] { gated.Open(); });
  registry_.reset();
  opener.join();
  EXPECT_EQ(calls, 1 + AdapterRegistry::kMaxPendingLoads + kSurplus);
}

TEST_F(Registry, HoldsUnderConcurrentLoadsUnloadsAndLeases) {
  constexpr int kNames = 3, kRounds = 150;
  std::vector<fs::path> paths;
  for (uint32_t seed = 0; seed < 3; ++seed)
    paths.push_back(Write("s" + std::to_string(seed), seed));
  std::atomic<int64_t> loads = 0, unloads = 0, acquired = 0;
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kRounds; ++i) {
        const auto status = Load("n" + std::to_string((i + t) % kNames), paths[i % 3]).status();
        loads += status.ok();
        EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kAlreadyExists) << status;
      }
      stop = true;
    });
    threads.emplace_back([&] {
      for (int i = 0; !stop; ++i) {
        const auto status = registry_->Unload("n" + std::to_string(i % kNames), hours(1)).status();
        unloads += status.ok();
        EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kNotFound) << status;
      }
    });
    threads.emplace_back([&] {
      std::vector<AdapterLease> held;
      for (int i = 0; !stop; ++i) {
        auto lease = registry_->Acquire("n" + std::to_string(i % kNames));
        if (lease.ok()) {
          ++acquired;
          EXPECT_EQ(lease->get()->modules.size(), ModuleCount(2));
          held.push_back(*std::move(lease));
        }
        if (held.size() > 8 || i % 7 == 0) held.clear();
        for (const AdapterInfo& info : registry_->List({})) EXPECT_GE(info.leases, 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(loads, 0);
  EXPECT_GT(unloads, 0);
  EXPECT_GT(acquired, 0);
  for (const AdapterInfo& info : registry_->List({})) {
    EXPECT_EQ(info.leases, 0);
    EXPECT_TRUE(registry_->Unload(info.name, kNow).ok());
  }
  EXPECT_THAT(registry_->List({}), IsEmpty());
}

}  // namespace
}  // namespace lorikeet
