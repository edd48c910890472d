// Folders of uploads stay while a name, a request or a load has use of them, and go after it.
#include "server/uploads.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/registry.h"
#include "adapters_cache/registry_file.h"
#include "engine/base/directory_bytes.h"
#include "tests/unit/adapters_support.h"

namespace lorikeet {
namespace {

using testing::TempDir;
using testing::TestAdapter;
using testing::TestBase;
using ::testing::AllOf;
using ::testing::HasSubstr;
using std::chrono::hours;
using std::chrono::microseconds;
using std::chrono::milliseconds;
namespace fs = std::filesystem;

class UploadsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    options_.base_name = "the-base";
    options_.state_file = dir_.path() / "registry";
    fs::create_directories(Folders());
    Write(dir_.path() / "probe", 0);
    each_ = DirectoryBytes(dir_.path() / "probe");
    Open();
  }
  void TearDown() override { registry_.reset(); }

  void Open() {
    registry_.reset();
    uploads_ = std::make_unique<Uploads>(Folders());
    options_.owned = uploads_->directory();
    options_.on_unused = [this](const fs::path& folder) {
      EXPECT_FALSE(InStateFile(folder)) << folder << " would be missed after a crash";
      uploads_->Remove(folder);
    };
    auto registry = AdapterRegistry::Create(base_, options_);
    ASSERT_TRUE(registry.ok()) << registry.status();
    registry_ = *std::move(registry);
  }
  fs::path Folders() const { return dir_.path() / "uploads"; }
  bool InStateFile(const fs::path& folder) const {
    const auto records = ReadRegistryFile(options_.state_file);
    return !records.ok() || std::ranges::any_of(records->names, [&](const auto& name) {
      return name.second.location == folder;
    });
  }
  void Write(const fs::path& folder, uint32_t seed) const {
    TestAdapter::Lora(base_, {"q_proj"}, 4, seed).Write(folder);
  }
  // What UploadAdapter does, of the adapter made from `seed`.
  absl::Status Upload(const std::string& name, uint32_t seed, bool replace = true,
                      const std::string& tenant = "") {
    const auto room = registry_->DiskRoomFor(name, tenant);
    const absl::Status fits = room->Take(each_);
    return fits.ok() ? Send(name, seed, room.get(), replace, tenant) : fits;
  }
  absl::Status Send(const std::string& name, uint32_t seed, AdapterRegistry::DiskRoom* room,
                    bool replace, const std::string& tenant) {
    const auto scratch = uploads_->Scratch();
    if (!scratch.ok()) return scratch.status();
    Write(*scratch, seed);
    const auto place = uploads_->Keep(*scratch, FolderName(seed));
    if (!place.ok()) return place.status();
    std::promise<absl::Status> loaded;
    registry_->LoadAsync(name, *place,
                         {.origin = AdapterRegistry::Origin::kOperator,
                          .replace = replace,
                          .tenant = tenant,
                          .room = room},
                         [&](const absl::StatusOr<AdapterInfo>& info) {
                           uploads_->LoadEnded(*place);
                           registry_->TellIfUnused(*place);
                           loaded.set_value(info.status());
                         });
    return loaded.get_future().get();
  }
  static std::string FolderName(uint32_t seed) { return absl::StrCat("hash-", seed); }
  bool Kept(uint32_t seed) const { return fs::exists(Folders() / FolderName(seed)); }
  int Count() const {
    return static_cast<int>(
        std::distance(fs::directory_iterator(Folders()), fs::directory_iterator()));
  }
  // Folders go on a thread of the registry.
  static bool Soon(const std::function<bool()>& holds) {
    for (int i = 0; i < 2000 && !holds(); ++i) std::this_thread::sleep_for(milliseconds(5));
    return holds();
  }
  bool Unload(const std::string& name) { return registry_->Unload(name, hours(1)).ok(); }

  const TestBase base_ = TestBase::Random(1);
  const TempDir dir_;
  int64_t each_ = 0;  // bytes of every upload
  AdapterRegistry::Options options_;
  std::unique_ptr<Uploads> uploads_;
  std::unique_ptr<AdapterRegistry> registry_;
};

TEST_F(UploadsTest, GoWithTheLastNameWhereverItsBytesWereLoadedFrom) {
  ASSERT_TRUE(Upload("a", 1).ok());
  Write(dir_.path() / "elsewhere", 1);
  ASSERT_TRUE(registry_->Load("b", dir_.path() / "elsewhere",
                              AdapterRegistry::Origin::kOperator).ok());
  ASSERT_TRUE(Unload("a"));
  ASSERT_TRUE(Upload("c", 2).ok() && Unload("c"));
  EXPECT_TRUE(Soon([&] { return !Kept(2); }));
  EXPECT_TRUE(Kept(1)) << "b's version is read from there";
  ASSERT_TRUE(Unload("b"));
  EXPECT_TRUE(Soon([&] { return Count() == 0; }));
}

TEST_F(UploadsTest, GoWithTheAliasThatLedToThem) {
  ASSERT_TRUE(Upload("a", 1).ok() && Upload("b", 2).ok());
  ASSERT_TRUE(registry_->SetAlias("both", {{"a", 1}, {"b", 1}}).ok());
  ASSERT_TRUE(Unload("a") && Unload("b"));
  ASSERT_TRUE(Upload("c", 3).ok() && Unload("c"));
  EXPECT_TRUE(Soon([&] { return !Kept(3); }));
  EXPECT_TRUE(Kept(1) && Kept(2));
  ASSERT_TRUE(Unload("both"));
  EXPECT_TRUE(Soon([&] { return Count() == 0; }));
}

TEST_F(UploadsTest, GoWhenAnotherTakesTheirPlaceOrTheyAreRefused) {
  ASSERT_TRUE(Upload("a", 1).ok());
  EXPECT_EQ(Upload("a", 2, /*replace=*/false).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(Soon([&] { return !Kept(2); }));
  EXPECT_EQ(Upload("the-base", 3).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Soon([&] { return !Kept(3); }));
  ASSERT_TRUE(Upload("a", 4).ok());
  EXPECT_TRUE(Soon([&] { return !Kept(1); }));
  EXPECT_TRUE(Kept(4));
}

TEST_F(UploadsTest, StayForARequestThatWaitsToReadThem) {
  ASSERT_TRUE(Upload("a", 1).ok());
  options_.host_bytes = registry_->Get("a")->bytes;
  Open();
  ASSERT_TRUE(Upload("b", 2).ok());
  std::optional<AdapterLease> full = *registry_->Acquire("b");
  ASSERT_FALSE(registry_->Get("a")->in_host);
  auto waiting = std::async(std::launch::async, [&] { return registry_->Acquire("a"); });
  ASSERT_TRUE(Soon([&] { return registry_->stats().host_misses == 1; }));
  EXPECT_EQ(registry_->Unload("a", microseconds(0)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  ASSERT_TRUE(Upload("c", 3).ok() && Unload("c"));
  ASSERT_TRUE(Soon([&] { return !Kept(3); })) << "what could be removed was";
  full.reset();
  absl::StatusOr<AdapterLease> lease = waiting.get();
  ASSERT_TRUE(lease.ok()) << lease.status();
  lease = absl::CancelledError();
  EXPECT_TRUE(Soon([&] { return !Kept(1); }));
}

TEST_F(UploadsTest, SentAgainReplaceFilesThatWereDamaged) {
  ASSERT_TRUE(Upload("a", 1).ok());
  const std::string version = registry_->Get("a")->version;
  const fs::path weights = Folders() / FolderName(1) / "adapter_model.safetensors";
  std::fstream(weights, std::ios::in | std::ios::out | std::ios::binary).seekp(-1, std::ios::end)
      << '\x7e';
  ASSERT_TRUE(registry_->Reload("a").ok());
  ASSERT_NE(registry_->Get("a")->version, version);
  ASSERT_TRUE(Upload("a", 1).ok());
  EXPECT_EQ(registry_->Get("a")->version, version);
  EXPECT_EQ(Count(), 1);
}

class TenantUploadsTest : public UploadsTest {
 protected:
  void SetUp() override {
    UploadsTest::SetUp();
    options_.tenant_disk_bytes = 2 * each_ + each_ / 2;
    Open();
  }
  absl::Status UploadAs(const std::string& tenant, const std::string& name, uint32_t seed) {
    return Upload(name, seed, /*replace=*/true, tenant);
  }
  void ExpectFull(const absl::Status& status, int others = 2) const {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("tenant 'x'"), HasSubstr(absl::StrCat(others * each_)),
                      HasSubstr(absl::StrCat(options_.tenant_disk_bytes))));
  }
};

TEST_F(TenantUploadsTest, HaveABoundThatAnotherTenantDoesNotFeel) {
  ASSERT_TRUE(UploadAs("x", "x1", 1).ok() && UploadAs("x", "x2", 2).ok());
  ExpectFull(UploadAs("x", "x3", 3));
  EXPECT_TRUE(UploadAs("y", "y1", 1).ok()) << "the same files count for it as well";
  EXPECT_TRUE(UploadAs("y", "y3", 3).ok());
  for (uint32_t i = 4; i < 8; ++i) EXPECT_TRUE(UploadAs("", absl::StrCat("n", i), i).ok());
  EXPECT_TRUE(UploadAs("x", "x2", 8).ok()) << "what is replaced makes room";
  EXPECT_TRUE(UploadAs("", "x2", 9).ok()) << "and stays its tenant's";
  ExpectFull(UploadAs("x", "x3", 3));
  Open();
  ExpectFull(UploadAs("x", "x3", 3));
  EXPECT_EQ(registry_->stats().disk_bytes, (1 + 1 + 4 + 1) * each_);
  ASSERT_TRUE(Unload("x2"));
  EXPECT_TRUE(UploadAs("x", "again", 1).ok());
  EXPECT_TRUE(UploadAs("x", "x3", 3).ok()) << "the same files are there once";
}

TEST_F(TenantUploadsTest, CountForAsLongAsAnyNameKeepsThem) {
  ASSERT_TRUE(UploadAs("x", "x1", 1).ok() && UploadAs("x", "x2", 2).ok());
  ASSERT_TRUE(registry_->SetAlias("alias", {{"x1", 1}}, "x").ok());
  ASSERT_TRUE(Unload("x1"));
  ExpectFull(UploadAs("x", "x3", 3));
  ASSERT_TRUE(UploadAs("y", "y4", 4).ok());
  ExpectFull(registry_->SetAlias("other", {{"y4", 1}}, "x").status());
  ASSERT_TRUE(Unload("alias"));
  EXPECT_TRUE(registry_->SetAlias("other", {{"y4", 1}}, "x").ok());
  ExpectFull(UploadAs("x", "x3", 3));
}

TEST_F(TenantUploadsTest, AreCountedFromTheirFirstByteUntilTheyFail) {
  ASSERT_TRUE(UploadAs("x", "x1", 1).ok());
  {
    const auto first = registry_->DiskRoomFor("x2", "x");
    const auto second = registry_->DiskRoomFor("x3", "x");
    ASSERT_TRUE(first->Take(each_).ok());
    ExpectFull(second->Take(each_));
    EXPECT_TRUE(second->Take(each_ / 4).ok());
    ASSERT_TRUE(Send("x2", 2, first.get(), true, "x").ok());
    ExpectFull(second->Take(each_));  // what is loaded counts
  }
  EXPECT_EQ(Upload("x2", 3, /*replace=*/false, "x").code(), absl::StatusCode::kAlreadyExists);
  ASSERT_TRUE(Unload("x2"));
  EXPECT_TRUE(UploadAs("x", "x3", 3).ok()) << "what failed is given back, what was loaded not twice";
  {
    const auto first = registry_->DiskRoomFor("x3", "x");
    const auto second = registry_->DiskRoomFor("x3", "x");
    EXPECT_TRUE(first->Take(each_).ok());
    ExpectFull(second->Take(each_), 3);  // one at a time has the room of what it replaces
  }
}

TEST_F(UploadsTest, UnderChangesOfEveryKindNoNameMissesItsFilesAndNoneAreLeft) {
  ASSERT_TRUE(Upload("n0", 1).ok());
  options_.host_bytes = registry_->Get("n0")->bytes;
  Open();
  const auto run = [&](uint32_t seed) {
    std::mt19937 random(seed);
    for (int i = 0; i < 150; ++i) {
      const std::string name = absl::StrCat("n", random() % 3);
      const uint32_t which = random() % 4;
      switch (random() % 5) {
        case 0:
          registry_->Unload(name, microseconds(0)).IgnoreError();
          break;
        case 1:
          registry_->Reload(name).IgnoreError();
          break;
        case 2: {
          const absl::Status status = registry_->Acquire(name).status();
          EXPECT_TRUE(status.ok() || status.ToString().ends_with("is not loaded")) << status;
          break;
        }
        default: {
          const absl::Status status = Upload(name, which, true, name);
          EXPECT_TRUE(status.ok()) << status << " seed " << seed;
        }
      }
    }
  };
  std::vector<std::thread> threads;
  for (uint32_t seed = 0; seed < 4; ++seed) threads.emplace_back(run, seed);
  for (std::thread& thread : threads) thread.join();
  for (const bool again : {false, true}) {
    if (again) Open();
    for (const AdapterInfo& info : registry_->List({})) {
      EXPECT_TRUE(fs::exists(info.path)) << info.name;
      EXPECT_TRUE(registry_->Acquire(info.name).ok()) << info.name;
    }
  }
  for (const AdapterInfo& info : registry_->List({})) EXPECT_TRUE(Unload(info.name));
  EXPECT_TRUE(Soon([&] { return Count() == 0; })) << Count();
}

}  // namespace
}  // namespace lorikeet
