// Adapters from HTTP servers, object stores and the hub, over local servers that behave and that do
// not; and directories that are watched.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <chrono>
#include <csignal>
#include <fstream>
#include <future>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/registry.h"
#include "adapters_cache/sha256.h"
#include "server/sources/directory_watch.h"
#include "server/sources/remote_sources.h"
#include "tests/support/http_peer.h"
#include "tests/unit/adapters_support.h"

namespace lorikeet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;
using testing::HttpPeer;
using testing::TempDir;
using testing::TestAdapter;
using testing::TestBase;
namespace fs = std::filesystem;

std::string Read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

std::string HashOf(const std::string& bytes) {
  Sha256 hash;
  hash.Add(bytes);
  return hash.Hex();
}

void WaitFor(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

TEST(Locations, AreOneUrlPerService) {
  const SourceEndpoints endpoints{.s3 = "http://store", .hub = "http://hub"};
  const auto url = [&](const char* location) {
    const auto adapter = ParseLocation(location, endpoints);
    return adapter.ok() ? adapter->base_url : std::string(adapter.status().message());
  };
  EXPECT_EQ(url("https://h.example:8443/a/b/"), "https://h.example:8443/a/b");
  EXPECT_EQ(url("https://h/a:b@c+d"), "https://h/a%3Ab%40c%2Bd");
  EXPECT_EQ(url("s3://bucket/some/prefix"), "http://store/bucket/some/prefix");
  EXPECT_EQ(url("hf://org/repo"), "http://hub/org/repo/resolve/main");
  EXPECT_EQ(url("hf://org/repo@refs/pr/1"), "http://hub/org/repo/resolve/refs%2Fpr%2F1");
  EXPECT_THAT(url("hf://repo"), HasSubstr("REVISION"));
  EXPECT_THAT(url("ftp://h/a"), HasSubstr("none of http"));
  EXPECT_THAT(url("https://h/a/../b"), HasSubstr("upwards"));
  EXPECT_THAT(url("https://h/a?key=secret"), AllOf(HasSubstr("none of A-Z"), Not(HasSubstr("secret"))));
  EXPECT_THAT(url("https://user:secret@h/a"), AllOf(HasSubstr("password"), Not(HasSubstr("secret"))));
}

TEST(Locations, AreOfTheFirstSourceByWholeParts) {
  const std::vector<std::string> allowed = {"https://h/a/", "hf://org", "s3://", "https://h/a/b"};
  const auto source = [&](const char* location) { return SourceOf(location, allowed); };
  for (const char* below : {"https://h/a", "https://h/a/b"}) EXPECT_EQ(source(below), 0u) << below;
  EXPECT_EQ(source("hf://org/x@main"), 1u);
  EXPECT_EQ(source("s3://b/c"), 2u);
  for (const char* none : {"https://h/ab", "https://h.evil/a", "http://h/a", "hf://organisation/x"}) {
    EXPECT_EQ(source(none), allowed.size()) << none;
  }
  EXPECT_EQ(SourceOf("s3://b", {}), 0u);
}

// A registry over sources over a peer that serves `files_` by path.
class Sources : public ::testing::Test {
 protected:
  void SetUp() override {
    setenv("no_proxy", "127.0.0.1", 1);
    setenv("NO_PROXY", "127.0.0.1", 1);
    options_.allowed = {peer_.url(), "s3://bucket", "hf://org"};
    options_.directory = dir_.path() / "fetched";
    options_.disk_bytes = 1 << 20;
    options_.endpoints = {.s3 = peer_.url(), .hub = peer_.url()};
    options_.retry_after = std::chrono::milliseconds(1);
    options_.stall_s = 1;
    registry_options_.base_name = "the-base";
    registry_options_.state_file = dir_.path() / "registry";
    Put("/a", 1);
    Open();
  }
  void TearDown() override { Close(); }
  void Close() {
    registry_.reset();
    sources_.reset();
  }
  void Open() {
    Close();
    auto sources = RemoteSources::Create(options_);
    ASSERT_TRUE(sources.ok()) << sources.status();
    sources_ = *std::move(sources);
    registry_options_.sources = sources_.get();
    auto registry = AdapterRegistry::Create(base_, registry_options_);
    ASSERT_TRUE(registry.ok()) << registry.status();
    registry_ = *std::move(registry);
  }
  void Put(const std::string& path, uint32_t seed) {
    const fs::path scratch = dir_.path() / "scratch";
    TestAdapter::Lora(base_, {"q_proj"}, 4, seed).Write(scratch);
    std::lock_guard lock(mutex_);
    for (const char* file : {"adapter_config.json", "adapter_model.safetensors"}) {
      files_[absl::StrCat(path, "/", file)] = Read(scratch / file);
    }
  }
  std::string Answer(const std::string& request) {
    std::lock_guard lock(mutex_);
    const std::string path = request.substr(4, request.find(' ', 4) - 4);
    if (const auto special = special_.find(path); special != special_.end()) {
      return special->second();
    }
    const auto file = files_.find(path);
    return file == files_.end() ? HttpPeer::Reply(404, "no such file")
                                : HttpPeer::Reply(200, file->second);
  }
  absl::StatusOr<AdapterInfo> Load(const std::string& name, const std::string& location,
                                   AdapterRegistry::LoadOptions options = {}) {
    return registry_->Load(name, location, options);
  }
  absl::Status Status(const std::string& location) { return Load("x", location).status(); }
  int Directories() const {
    int count = 0;
    for (const auto& entry : fs::directory_iterator(options_.directory)) count += entry.exists();
    return count;
  }

  const TestBase base_ = TestBase::Random(1);
  const TempDir dir_;
  std::mutex mutex_;
  std::map<std::string, std::string> files_;
  std::map<std::string, std::function<std::string()>> special_;
  HttpPeer peer_{[this](const std::string& request) { return Answer(request); }};
  RemoteSources::Options options_;
  AdapterRegistry::Options registry_options_;
  std::unique_ptr<RemoteSources> sources_;
  std::unique_ptr<AdapterRegistry> registry_;
};

TEST_F(Sources, AnAdapterIsFetchedOnceAndIsThereAfterARestart) {
  const auto info = Load("a", peer_.url() + "/a");
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->path, peer_.url() + "/a");
  const size_t asked = peer_.requests().size();
  EXPECT_EQ(asked, 2u);
  Open();
  EXPECT_EQ(registry_->Acquire("a")->version(), info->version);
  EXPECT_EQ(peer_.requests().size(), asked) << "it is on disk";
  EXPECT_EQ(sources_->stats().disk.adapters, 1);

  Close();
  fs::remove_all(options_.directory);
  Open();
  const auto again = registry_->Acquire("a");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->version(), info->version);
  EXPECT_EQ(peer_.requests().size(), asked + 2) << "it left the disk";
}

TEST_F(Sources, AReloadFetchesAgainAndOtherBytesAreAnotherVersion) {
  const auto first = Load("a", peer_.url() + "/a");
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(registry_->Reload("a")->version, first->version);
  Put("/a", 2);
  const auto second = registry_->Reload("a");
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_NE(second->version, first->version);
  EXPECT_EQ(Load("pinned", peer_.url() + "/a", {.version = first->version}).status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_TRUE(Load("pinned", peer_.url() + "/a", {.version = second->version}).ok());
}

TEST_F(Sources, TheHubsLayoutTokenAndChecksums) {
  options_.credentials.hub_token = "hub-secret";
  Open();
  Put("/org/repo/resolve/main", 1);
  Put("/org/repo/resolve/v2", 2);
  const auto main = Load("main", "hf://org/repo");
  ASSERT_TRUE(main.ok()) << main.status();
  EXPECT_THAT(peer_.requests().back(), HasSubstr("Authorization: Bearer hub-secret"));
  EXPECT_NE(Load("v2", "hf://org/repo@v2")->version, main->version);

  // Weights lie elsewhere, behind a redirect that says what they hash to.
  const std::string file = "/adapter_model.safetensors";
  const std::string weights = files_["/org/repo/resolve/main" + file];
  HttpPeer store([&](const std::string&) { return HttpPeer::Reply(200, weights); });
  std::string hash = HashOf(weights);
  special_["/org/repo/resolve/main" + file] = [&] {
    return HttpPeer::Reply(302, "", absl::StrCat("Location: ", store.url(), "/blob\r\n",
                                                 "X-Linked-Etag: \"", hash, "\"\r\n"));
  };
  EXPECT_TRUE(registry_->Reload("main").ok());
  ASSERT_THAT(store.requests(), SizeIs(1));
  EXPECT_THAT(store.requests()[0], HasSubstr("GET /blob"));
  hash[0] = hash[0] == '0' ? '1' : '0';
  const absl::Status damaged = registry_->Reload("main").status();
  EXPECT_EQ(damaged.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(damaged.message()), AllOf(HasSubstr(hash), Not(HasSubstr("hub-secret"))));
}

TEST_F(Sources, S3RequestsAreSigned) {
  options_.credentials = {.s3_key = "KEY", .s3_secret = "s3-secret", .s3_session = "session"};
  Open();
  Put("/bucket/some/prefix", 1);
  const auto info = Load("a", "s3://bucket/some/prefix");
  ASSERT_TRUE(info.ok()) << info.status();
  const std::string request = peer_.requests().back();
  EXPECT_THAT(request, AllOf(HasSubstr("AWS4-HMAC-SHA256 Credential=KEY/"),
                             HasSubstr("/us-east-1/s3/aws4_request"),
                             HasSubstr("SignedHeaders=host;x-amz-content-sha256;x-amz-date;"
                                       "x-amz-security-token"),
                             HasSubstr("x-amz-security-token: session"),
                             Not(HasSubstr("s3-secret"))));
}

TEST_F(Sources, WhatASourceDoesWrongHasAStatusAndLeavesNothing) {
  const std::string weights = "/w/adapter_model.safetensors";
  Put("/w", 5);
  const std::string good = files_[weights];
  const auto with = [&](std::function<std::string()> answer) {
    special_[weights] = std::move(answer);
    return Status(peer_.url() + "/w");
  };
  const auto code = [&](int status) {
    return with([status] { return HttpPeer::Reply(status, "page"); }).code();
  };
  EXPECT_EQ(code(401), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(code(403), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(code(404), absl::StatusCode::kNotFound);
  EXPECT_EQ(code(418), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(302), absl::StatusCode::kFailedPrecondition) << "only the hub redirects";
  EXPECT_EQ(code(500), absl::StatusCode::kUnavailable);
  EXPECT_EQ(with([] { return "STALL"; }).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(with([] { return "no HTTP at all\r\n\r\n"; }).code(), absl::StatusCode::kUnavailable);
  const auto cut = with([&] { return HttpPeer::Reply(200, good).substr(0, good.size() / 2); });
  EXPECT_EQ(cut.code(), absl::StatusCode::kUnavailable) << cut;
  const auto half = with([&] { return HttpPeer::Reply(200, good.substr(0, good.size() / 2)); });
  EXPECT_EQ(half.code(), absl::StatusCode::kDataLoss) << "whole, but no whole adapter";
  const std::string large(2 << 20, 'x');
  EXPECT_EQ(with([&] { return HttpPeer::Reply(200, large); }).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(with([&] { return "HTTP/1.1 200 OK\r\n\r\n" + large; }).code(),
            absl::StatusCode::kResourceExhausted)
      << "without a length";
  int attempts = 0;
  EXPECT_TRUE(with([&] { return HttpPeer::Reply(++attempts < 3 ? 503 : 200, good); }).ok());
  EXPECT_EQ(attempts, 3);
  EXPECT_EQ(Status("https://elsewhere.example/a").code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(Status("ftp://h/a").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(registry_->stats().names, 1);
  for (const auto& left : fs::directory_iterator(options_.directory)) {
    EXPECT_THAT(left.path().filename().string(), Not(HasSubstr("partial")));
  }
}

// A file that may not grow stands for a disk that is full.
class SmallFiles {
 public:
  explicit SmallFiles(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit tight{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &tight);
  }
  ~SmallFiles() {
    setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_;
  void (*const handler_)(int);
};

TEST_F(Sources, AFullDiskIsSaidAndLeavesNothing) {
  const int64_t weights = files_["/a/adapter_model.safetensors"].size();
  {
    const SmallFiles full(weights / 2);
    const absl::Status status = Status(peer_.url() + "/a");
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("is the disk full?"));
  }
  EXPECT_EQ(registry_->stats().names, 0);
  EXPECT_EQ(Directories(), 0);
  EXPECT_EQ(sources_->stats().disk.bytes, 0);
  EXPECT_TRUE(Status(peer_.url() + "/a").ok()) << "once there is room";
}

TEST_F(Sources, ACacheThatCannotBeWrittenIsSaidAndTriedAgain) {
  ASSERT_TRUE(Load("a", peer_.url() + "/a").ok());
  Put("/b", 2);
  fs::rename(options_.directory, dir_.path() / "away");
  std::ofstream(options_.directory) << "no directory";
  const absl::Status status = Status(peer_.url() + "/b");
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(options_.directory.string()));
  EXPECT_TRUE(registry_->Acquire("a").ok()) << "it is in host memory";
  fs::remove(options_.directory);
  fs::rename(dir_.path() / "away", options_.directory);
  EXPECT_TRUE(Status(peer_.url() + "/b").ok());
  EXPECT_EQ(Directories(), 2);
}

// However many of its adapters are asked for.
TEST_F(Sources, AStalledSourceHoldsUpNobodyElse) {
  std::counting_semaphore<> asked(0), ended(0);
  options_.allowed = {peer_.url() + "/stalled", peer_.url()};
  options_.stall_s = 3600;
  Open();
  const int loads = 2 * options_.threads;
  for (int i = 0; i < loads; ++i) {
    const std::string path = absl::StrCat("/stalled/", i);
    special_[path + "/adapter_config.json"] = [&] {
      asked.release();
      return "STALL";
    };
    registry_->LoadAsync(absl::StrCat("stalled", i), peer_.url() + path, {},
                         [&](const absl::StatusOr<AdapterInfo>& info) {
                           EXPECT_EQ(info.status().code(), absl::StatusCode::kCancelled);
                           ended.release();
                         });
  }
  for (int i = 0; i < options_.threads; ++i) asked.acquire();
  EXPECT_TRUE(Load("a", peer_.url() + "/a").ok());
  EXPECT_FALSE(asked.try_acquire()) << "more of it at a time than others have threads";
  sources_->Cancel();
  for (int i = 0; i < loads; ++i) ended.acquire();
  EXPECT_EQ(Status(peer_.url() + "/a").code(), absl::StatusCode::kCancelled);
}

TEST_F(Sources, TheDiskHasABudgetAndWhatIsLeftOverGoes) {
  const auto probe = Load("a", peer_.url() + "/a");
  ASSERT_TRUE(probe.ok());
  const int64_t each = sources_->stats().disk.bytes;
  options_.disk_bytes = 2 * each + each / 2;
  fs::create_directory(options_.directory / "partial-left");
  Open();
  EXPECT_EQ(Directories(), 1) << "the partial one is gone";
  for (int i = 0; i < 4; ++i) {
    const std::string name = absl::StrCat("n", i);
    Put("/" + name, 10 + i);
    ASSERT_TRUE(Load(name, peer_.url() + "/" + name).ok());
  }
  EXPECT_EQ(Directories(), 2);
  EXPECT_EQ(sources_->stats().disk.evictions, 3);
  EXPECT_LE(sources_->stats().disk.bytes, options_.disk_bytes);
  options_.disk_bytes = each / 2;
  Open();
  EXPECT_EQ(Directories(), 0);
  EXPECT_EQ(Status(peer_.url() + "/a").code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(Sources, ATenantsAdaptersMakeRoomForOneAnotherOnDisk) {
  ASSERT_TRUE(Load("nobodys", peer_.url() + "/a").ok());
  const int64_t each = sources_->stats().disk.bytes;
  options_.disk_bytes = 10 * each;
  options_.tenant_disk_bytes = 2 * each + each / 2;
  Open();
  const auto load = [&](const std::string& name, const std::string& tenant) {
    Put("/" + name, 10 * name[0] + name[1]);
    return Load(name, peer_.url() + "/" + name, {.tenant = tenant}).status();
  };
  for (const char* name : {"y1", "y2"}) ASSERT_TRUE(load(name, "y").ok());
  for (const char* name : {"x1", "x2", "x3", "x4"}) ASSERT_TRUE(load(name, "x").ok());
  EXPECT_EQ(sources_->stats().disk.adapters, 1 + 2 + 2);
  EXPECT_EQ(sources_->stats().disk.evictions, 2);

  registry_options_.host_bytes = 0;  // so that files are needed again
  Open();
  const size_t before = peer_.requests().size();
  for (const char* name : {"x3", "x4", "y1", "y2", "nobodys"}) {
    EXPECT_EQ(registry_->Acquire(name).status().code(), absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(peer_.requests().size(), before) << "they are there after a restart";
  EXPECT_FALSE(registry_->Acquire("x1").ok());
  EXPECT_EQ(peer_.requests().size(), before + 2) << "it had to go";
  EXPECT_EQ(sources_->stats().disk.evictions, 1) << "whose they are is known again";

  options_.tenant_disk_bytes = each / 2;
  Open();
  const absl::Status alone = load("x5", "x");
  EXPECT_EQ(alone.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(alone.message()), HasSubstr(absl::StrCat(each / 2)));
}

TEST_F(Sources, UnknownNamesAreLookedForWhereThatIsAllowed) {
  fs::create_directories(dir_.path() / "folders");
  registry_options_.allowed_roots = {dir_.path() / "folders"};
  registry_options_.on_demand = {(dir_.path() / "folders").string(), peer_.url()};
  Open();
  TestAdapter::Lora(base_, {"q_proj"}, 2, 9).Write(dir_.path() / "folders/local");
  EXPECT_TRUE(registry_->MayAppear("local"));
  EXPECT_FALSE(registry_->MayAppear("../local"));
  EXPECT_FALSE(registry_->MayAppear("a/../../local"));
  EXPECT_TRUE(registry_->Acquire("local").ok());
  std::vector<std::future<absl::StatusOr<AdapterLease>>> all;
  for (int i = 0; i < 10; ++i) {
    all.push_back(std::async(std::launch::async, [&] { return registry_->Acquire("a"); }));
  }
  for (auto& lease : all) {
    const auto got = lease.get();
    EXPECT_TRUE(got.ok()) << got.status();
  }
  EXPECT_THAT(peer_.requests(), SizeIs(2)) << "one fetch for all";
  EXPECT_EQ(registry_->Get("a")->hits, 10);
  EXPECT_EQ(registry_->Acquire("nobody").status().code(), absl::StatusCode::kNotFound);
  const size_t asked = peer_.requests().size();
  EXPECT_EQ(registry_->Acquire("nobody").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(peer_.requests().size(), asked) << "not again so soon";
  registry_options_.on_demand = {};
  Open();
  EXPECT_EQ(registry_->Acquire("a").status().code(), absl::StatusCode::kNotFound)
      << "what was found on demand is not in the state file";
}

class Watching : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(root_);
    options_.allowed_roots = {root_};
    registry_ = *AdapterRegistry::Create(base_, options_);
    watch_ = std::make_unique<DirectoryWatch>(
        registry_.get(), std::vector<fs::path>{root_},
        [this](const DirectoryWatch::Loaded& loaded) {
          std::lock_guard lock(mutex_);
          told_.push_back(loaded.status);
        },
        std::chrono::milliseconds(5));
  }
  // As careful people copy: elsewhere, then into place.
  void Write(const std::string& name, const TestAdapter& adapter) {
    adapter.Write(root_ / ".copying");
    fs::remove_all(root_ / name);
    fs::rename(root_ / ".copying", root_ / name);
  }
  void Write(const std::string& name, uint32_t seed) {
    Write(name, TestAdapter::Lora(base_, {"q_proj"}, 2, seed));
  }
  std::string VersionOf(const std::string& name) {
    const auto info = registry_->Get(name);
    return info.ok() ? info->version : "";
  }
  std::vector<absl::Status> told() {
    std::lock_guard lock(mutex_);
    return told_;
  }

  const TestBase base_ = TestBase::Random(1);
  const TempDir dir_;
  const fs::path root_ = dir_.path() / "root";
  AdapterRegistry::Options options_{.base_name = "the-base"};
  std::unique_ptr<AdapterRegistry> registry_;
  std::mutex mutex_;
  std::vector<absl::Status> told_;
  std::unique_ptr<DirectoryWatch> watch_;
};

TEST_F(Watching, FoldersComeChangeAndGo) {
  Write("a", 1);
  WaitFor([&] { return VersionOf("a") != ""; });
  const std::string first = VersionOf("a");
  Write("a", 2);
  WaitFor([&] { return VersionOf("a") != first && VersionOf("a") != ""; });
  fs::remove_all(root_ / "a");
  WaitFor([&] { return VersionOf("a") == ""; });
  Write("a", 1);
  WaitFor([&] { return VersionOf("a") == first; });
}

TEST_F(Watching, WhatCannotBeLoadedIsToldOnceAndTriedAgainWhenItChanges) {
  TestAdapter broken = TestAdapter::Lora(base_, {"q_proj"}, 2, 1);
  broken.config["peft_type"] = "SOMETHING";
  Write("a", broken);
  WaitFor([&] { return !told().empty(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(told().size(), 1u);
  Write("a", 1);
  WaitFor([&] { return VersionOf("a") != ""; });
  WaitFor([&] { return told().back().ok(); });  // a moment later
}

TEST_F(Watching, AnUnreadableDirectoryUnloadsNothing) {
  Write("a", 1);
  WaitFor([&] { return VersionOf("a") != ""; });
  fs::rename(root_, dir_.path() / "away");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_NE(VersionOf("a"), "");
  fs::rename(dir_.path() / "away", root_);
  Write("b", 2);
  WaitFor([&] { return VersionOf("b") != ""; });
  EXPECT_NE(VersionOf("a"), "");
}

TEST_F(Watching, AClientsNameStaysTheClients) {
  TestAdapter::Lora(base_, {"q_proj"}, 2, 3).Write(root_ / ".client");
  const auto mine = registry_->Load("a", root_ / ".client", AdapterRegistry::Origin::kClient);
  ASSERT_TRUE(mine.ok()) << mine.status();
  Write("a", 1);
  WaitFor([&] { return !told().empty(); });
  EXPECT_EQ(told().front().code(), absl::StatusCode::kAlreadyExists);
  fs::remove_all(root_ / "a");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(VersionOf("a"), mine->version);
}

}  // namespace
}  // namespace lorikeet
