// Keys: the file, what a key may do, rates, and that what is refused is written down.
#include <gmock/gmock.h>

#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/clock.h"
#include "nlohmann/json.hpp"
#include "server/auth/access.h"
#include "server/auth/keys_file.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;

const std::string kHash = HashKey("lk.a.secret");

std::string Entry(const std::string& rest) {
  return absl::StrCat("- {id: a, sha256: ", kHash, ", roles: [generate], ", rest, "}\n");
}

TEST(KeysFileTest, AnEntryIsReadInFull) {
  const auto keys = ParseKeys(absl::StrCat(
      "- id: bot\n  sha256: ", kHash,
      "\n  certificate: bot.example.com\n  tenant: support\n  roles: [generate, adapters:read]\n"
      "  adapters: [support-*, sql]\n  requests_per_minute: 600\n"));
  ASSERT_TRUE(keys.ok()) << keys.status();
  ASSERT_THAT(*keys, SizeIs(1));
  const KeyEntry& key = keys->front();
  EXPECT_EQ(key.identity.id, "bot");
  EXPECT_EQ(key.identity.tenant, "support");
  EXPECT_EQ(key.sha256, kHash);
  EXPECT_EQ(key.certificate, "bot.example.com");
  EXPECT_EQ(key.requests_per_minute, 600);
  EXPECT_TRUE(key.identity.Has(Role::kGenerate) && key.identity.Has(Role::kAdaptersRead));
  EXPECT_FALSE(key.identity.Has(Role::kAdaptersWrite) || key.identity.Has(Role::kMetrics));
  EXPECT_TRUE(key.identity.Sees("support-de") && key.identity.Sees("support-"));
  EXPECT_TRUE(key.identity.Sees("sql"));
  EXPECT_FALSE(key.identity.Sees("sql2") || key.identity.Sees("support"));
  EXPECT_FALSE(key.identity.SeesAll());
}

TEST(KeysFileTest, WhatIsNotSaid) {
  const auto keys = ParseKeys(Entry(""));
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_EQ(keys->front().identity.tenant, "a");
  EXPECT_TRUE(keys->front().identity.SeesAll());
  EXPECT_TRUE(ParseKeys("").ok());
  const auto none = ParseKeys(Entry("adapters: []"));
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_FALSE(none->front().identity.Sees("x"));
}

TEST(KeysFileTest, AWrongEntryIsNamed) {
  const std::pair<std::string, const char*> cases[] = {
      {Entry("rols: [x]"), "unknown field 'rols'; did you mean 'roles'"},
      {Entry("tenant: [x]"), "tenant: expected one value"},
      {Entry("requests_per_minute: 0"), "requests_per_minute: 0"},
      {Entry("adapters: [a*b]"), "'a*b' is neither a name"},
      {Entry("") + Entry(""), "line 2: key 'a': id 'a' is in two entries"},
      {"- {id: a, roles: [generate]}", "neither sha256 nor certificate"},
      {"- {id: a, tenant: \xff}", "tenant is not valid UTF-8 at byte 0"},
      {"- {id: a, sha256: abc, roles: [generate]}", "sha256: not 64"},
      {"- {id: a b, sha256: abc}", "id 'a b' is not 1 to 64"},
      {"- {id: a, certificate: x, roles: [admin]}", "role 'admin' is none of generate"},
      {"- {id: a, certificate: x}", "roles: missing"},
      {"- {certificate: x, roles: [generate]}", "id: missing"},
      {"- {id: a, certificate: x, roles: [metrics], adapters: [b]}", "every adapter's name"},
      {"keys: 1", "expected a sequence"},
      {"- [a", "line"},
  };
  for (const auto& [yaml, message] : cases) {
    const auto keys = ParseKeys(yaml);
    ASSERT_EQ(keys.status().code(), absl::StatusCode::kInvalidArgument) << yaml;
    EXPECT_THAT(std::string(keys.status().message()), HasSubstr(message)) << yaml;
  }
}

TEST(KeysFileTest, AMadeKeyIsFoundAgain) {
  KeyEntry entry{.sha256 = HashKey(MakeKey("web")), .requests_per_minute = 7};
  entry.identity = {.id = "web", .tenant = "t \"x\"", .roles = {Role::kAdaptersWrite}};
  entry.identity.adapters = {"a-*", "no"};
  const auto keys = ParseKeys(FormatKey(entry));
  ASSERT_TRUE(keys.ok()) << keys.status();
  const KeyEntry& read = keys->front();
  EXPECT_EQ(read.identity.id, "web");
  EXPECT_EQ(read.identity.tenant, entry.identity.tenant);
  EXPECT_EQ(read.identity.roles, entry.identity.roles);
  EXPECT_THAT(read.identity.adapters, ElementsAre("a-*", "no"));
  EXPECT_EQ(read.sha256, entry.sha256);
  EXPECT_EQ(read.requests_per_minute, 7);
  EXPECT_NE(MakeKey("web"), MakeKey("web"));
  EXPECT_EQ(IdOfKey(MakeKey("web")), "web");
  EXPECT_EQ(IdOfKey("sk-123"), "");
}

class AccessTest : public ::testing::Test {
 protected:
  std::unique_ptr<Access> Open(const std::string& keys) {
    audit_ = *AuditLog::Open((dir_.path() / "audit").string());
    auto access = Access::Open({.keys_file = dir_.Write("keys", keys).string()}, &clock_,
                               audit_.get());
    EXPECT_TRUE(access.ok()) << access.status();
    return *std::move(access);
  }
  static absl::StatusCode Code(const absl::StatusOr<Client>& client) {
    return client.status().code();
  }
  static Credentials With(const std::string& key) { return {.authorization = "Bearer " + key}; }

  testing::TempDir dir_;
  FakeClock clock_;
  std::unique_ptr<AuditLog> audit_;
};

TEST_F(AccessTest, AKeyIsAdmittedForItsRoles) {
  const auto access = Open(Entry(""));
  const auto client = access->Admit(With("lk.a.secret"), Role::kGenerate);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ(client->caller->id, "a");
  EXPECT_TRUE(access->Admit({.authorization = "bearer lk.a.secret"}, std::nullopt).ok());
  EXPECT_EQ(Code(access->Admit(With("lk.a.secret"), Role::kMetrics)),
            absl::StatusCode::kPermissionDenied);
  for (const char* wrong : {"lk.a.secres", "lk.b.secret", "lk.a.", "lk.a", "", "lk.a.secret "}) {
    const auto refused = access->Admit(With(wrong), std::nullopt);
    EXPECT_EQ(Code(refused), absl::StatusCode::kUnauthenticated) << wrong;
    EXPECT_THAT(std::string(refused.status().message()), Not(HasSubstr("lk.a"))) << wrong;
  }
  EXPECT_EQ(Code(access->Admit({}, std::nullopt)), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(Code(access->Admit({.authorization = "Basic abc"}, std::nullopt)),
            absl::StatusCode::kUnauthenticated);
}

TEST_F(AccessTest, ACertificateIsKnownByAnyOfItsNames) {
  const auto access = Open("- {id: a, certificate: bot, roles: [generate]}\n");
  EXPECT_TRUE(access->Admit({.certificate_names = {"x", "bot"}}, Role::kGenerate).ok());
  EXPECT_EQ(Code(access->Admit({.certificate_names = {"bo"}}, std::nullopt)),
            absl::StatusCode::kUnauthenticated);
  // A wrong key is not made good by a certificate, and the entry has no key.
  EXPECT_EQ(Code(access->Admit({.authorization = "Bearer lk.a.", .certificate_names = {"bot"}},
                               std::nullopt)),
            absl::StatusCode::kUnauthenticated);
}

TEST_F(AccessTest, ARateIsAMinutesRequests) {
  const auto access = Open(Entry("requests_per_minute: 6"));
  const auto admitted = [&] {
    return access->Admit(With("lk.a.secret"), std::nullopt).ok();
  };
  for (int i = 0; i < 6; ++i) EXPECT_TRUE(admitted()) << i;
  EXPECT_EQ(Code(access->Admit(With("lk.a.secret"), std::nullopt)),
            absl::StatusCode::kResourceExhausted);
  clock_.Advance(10'000'000);  // one is back
  EXPECT_TRUE(admitted());
  EXPECT_FALSE(admitted());
  ASSERT_TRUE(access->Reload().ok());  // what was spent stays spent
  EXPECT_FALSE(admitted());
  clock_.Advance(600'000'000);  // no more than a minute's
  for (int i = 0; i < 6; ++i) EXPECT_TRUE(admitted()) << i;
  EXPECT_FALSE(admitted());
}

TEST_F(AccessTest, ARateHoldsAcrossThreads) {
  const auto access = Open(Entry("requests_per_minute: 100"));
  std::atomic<int> admitted{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 100; ++i) {
        admitted += access->Admit(With("lk.a.secret"), std::nullopt).ok();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(admitted, 100);
}

TEST_F(AccessTest, ABadFileLeavesTheKeysFromBefore) {
  const auto access = Open(Entry(""));
  dir_.Write("keys", "- nonsense");
  const absl::Status bad = access->Reload();
  EXPECT_THAT(std::string(bad.message()), HasSubstr("line 1"));
  EXPECT_TRUE(access->Admit(With("lk.a.secret"), std::nullopt).ok());
  dir_.Write("keys", "");
  ASSERT_TRUE(access->Reload().ok());
  EXPECT_EQ(Code(access->Admit(With("lk.a.secret"), std::nullopt)),
            absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(Access::Open({.keys_file = "/nowhere"}, &clock_, audit_.get()).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(AccessTest, WithoutKeysOnlyTrustedCallersChangeAdapters) {
  audit_ = *AuditLog::Open("");
  for (const bool trusted : {false, true}) {
    const auto access = *Access::Open({.trusted_callers = trusted}, &clock_, audit_.get());
    EXPECT_TRUE(access->Admit({}, Role::kGenerate).ok());
    EXPECT_TRUE(access->Admit(With("whatever"), Role::kMetrics).ok());
    EXPECT_EQ(access->Admit({}, Role::kAdaptersWrite).ok(), trusted);
  }
}

TEST_F(AccessTest, RefusedChangesAreWrittenDownWithoutTheKey) {
  const auto access = Open(Entry(""));
  EXPECT_FALSE(access->Admit({.authorization = "Bearer lk.a.secret", .peer = "10.0.0.1"},
                             Role::kAdaptersWrite).ok());
  EXPECT_FALSE(access->Admit(With("lk.a.wrong"), Role::kAdaptersWrite).ok());
  const std::string log = testing::ReadFile(dir_.path() / "audit");
  EXPECT_THAT(log, Not(HasSubstr("secret")));
  EXPECT_THAT(log, Not(HasSubstr("wrong")));
  const auto line = nlohmann::json::parse(log.substr(0, log.find('\n')));
  EXPECT_EQ(line["action"], "refused");
  EXPECT_EQ(line["outcome"], "PERMISSION_DENIED");
  EXPECT_EQ(line["key"], "a");
  EXPECT_EQ(line["peer"], "10.0.0.1");
  EXPECT_EQ(std::count(log.begin(), log.end(), '\n'), 2);
}

}  // namespace
}  // namespace lorikeet
