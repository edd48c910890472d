#include "server/auth/access.h"

#include <openssl/crypto.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

constexpr int64_t kMinuteMicros = 60'000'000;

// The key of "Bearer KEY".
absl::StatusOr<std::string_view> BearerKey(std::string_view authorization) {
  constexpr size_t kSchemeBytes = 7;
  const std::string scheme(authorization.substr(0, kSchemeBytes));
  if (absl::AsciiStrToLower(scheme) == "bearer ") return authorization.substr(kSchemeBytes);
  return absl::UnauthenticatedError("the Authorization header is not 'Bearer KEY'");
}

bool Equal(const std::string& a, const std::string& b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

Caller MakeAnyone(bool trusted) {
  auto anyone = std::make_shared<Identity>();
  anyone->roles = {Role::kGenerate, Role::kAdaptersRead, Role::kMetrics};
  if (trusted) anyone->roles.insert(Role::kAdaptersWrite);
  return anyone;
}

absl::Status LacksRole(const Identity& who, Role role) {
  if (!who.id.empty()) {
    return absl::PermissionDeniedError(
        absl::StrCat("key '", who.id, "' does not have the role ", RoleName(role)));
  }
  return absl::PermissionDeniedError(
      "a server without keys that listens beyond loopback lets nobody change its adapters; start "
      "it with --keys, or with --open-admin if all who can reach it may");
}

}  // namespace

struct Access::Keys {
  std::map<std::string, Key, std::less<>> by_id;
  std::map<std::string, std::string> id_by_certificate;
};

absl::StatusOr<std::unique_ptr<Access>> Access::Open(const Options& options, const Clock* clock,
                                                     AuditLog* audit) {
  std::unique_ptr<Access> access(new Access(options, clock, audit));
  access->anyone_ = MakeAnyone(options.trusted_callers);
  if (!options.keys_file.empty()) LK_RETURN_IF_ERROR(access->Reload());
  return access;
}

absl::Status Access::Reload() {
  std::ifstream file(options_.keys_file, std::ios::binary);
  std::ostringstream content;
  if (file && file.peek() != std::ifstream::traits_type::eof()) content << file.rdbuf();
  if (file.bad() || !file.is_open()) {
    return absl::NotFoundError(absl::StrCat("keys: cannot read '", options_.keys_file, "'"));
  }
  absl::StatusOr<std::vector<KeyEntry>> entries = ParseKeys(content.str());
  if (!entries.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("keys: ", options_.keys_file, ": ", entries.status().message()));
  }
  auto now = std::make_shared<Keys>();
  for (KeyEntry& entry : *entries) {
    const std::string id = entry.identity.id;
    Key key{.sha256 = entry.sha256, .requests_per_minute = entry.requests_per_minute};
    key.caller = std::make_shared<const Identity>(std::move(entry.identity));
    key.bucket = BucketOf(id);
    if (!entry.certificate.empty()) now->id_by_certificate[entry.certificate] = id;
    now->by_id.emplace(id, std::move(key));
  }
  std::lock_guard lock(mutex_);
  keys_ = std::move(now);
  return absl::OkStatus();
}

// What a key has spent outlives a change of the file.
std::shared_ptr<Access::Bucket> Access::BucketOf(const std::string& id) const {
  const std::shared_ptr<const Keys> before = keys();
  if (before != nullptr) {
    const auto found = before->by_id.find(id);
    if (found != before->by_id.end()) return found->second.bucket;
  }
  return std::make_shared<Bucket>();
}

std::shared_ptr<const Access::Keys> Access::keys() const {
  std::lock_guard lock(mutex_);
  return keys_;
}

absl::StatusOr<const Access::Key*> Access::Find(const Keys& keys,
                                                const Credentials& credentials) const {
  if (!credentials.authorization.empty()) {
    LK_ASSIGN_OR_RETURN(const std::string_view text, BearerKey(credentials.authorization));
    const auto found = keys.by_id.find(IdOfKey(text));
    const std::string hash = HashKey(text);
    if (found != keys.by_id.end() && Equal(hash, found->second.sha256)) return &found->second;
    return absl::UnauthenticatedError("the API key is not known here");
  }
  for (const std::string& name : credentials.certificate_names) {
    const auto found = keys.id_by_certificate.find(name);
    if (found != keys.id_by_certificate.end()) return &keys.by_id.at(found->second);
  }
  return absl::UnauthenticatedError("no API key: send 'Authorization: Bearer KEY'");
}

// The bucket is a moment in time: taking one moves it on by what refilling one takes, and it is
// empty a minute ahead of now.
absl::Status Access::TakeOne(const Key& key) {
  if (key.requests_per_minute == 0) return absl::OkStatus();
  const int64_t each_us = kMinuteMicros / key.requests_per_minute;
  const int64_t now_us = clock_->NowMicros();
  int64_t until = key.bucket->spent_until_us;
  while (true) {
    const int64_t next = std::max(until, now_us) + each_us;
    if (next > now_us + kMinuteMicros) {
      return absl::ResourceExhaustedError(
          absl::StrCat("key '", key.caller->id, "' has made its ", key.requests_per_minute,
                       " requests a minute; try again later"));
    }
    if (key.bucket->spent_until_us.compare_exchange_weak(until, next)) return absl::OkStatus();
  }
}

absl::StatusOr<Caller> Access::Identify(const Credentials& credentials, bool counts) {
  const std::shared_ptr<const Keys> keys = this->keys();
  if (keys == nullptr) return anyone_;
  LK_ASSIGN_OR_RETURN(const Key* key, Find(*keys, credentials));
  if (counts) LK_RETURN_IF_ERROR(TakeOne(*key));
  return key->caller;
}

absl::StatusOr<Client> Access::Admit(const Credentials& credentials, std::optional<Role> role) {
  return Decide(credentials, role, /*counts=*/true);
}

absl::Status Access::Check(const Credentials& credentials, std::optional<Role> role) {
  return Decide(credentials, role, /*counts=*/false).status();
}

absl::StatusOr<Client> Access::Decide(const Credentials& credentials, std::optional<Role> role,
                                      bool counts) {
  if (role == Role::kMetrics && options_.open_metrics) return Client{anyone_, credentials.peer};
  const absl::StatusOr<Caller> caller = Identify(credentials, counts);
  absl::Status status = caller.status();
  if (status.ok() && role && !(*caller)->Has(*role)) status = LacksRole(**caller, *role);
  if (status.ok()) return Client{*caller, credentials.peer};
  if (role == Role::kAdaptersWrite) {
    NoteRefusal(credentials, caller.ok() ? caller->get() : nullptr, status);
  }
  return status;
}

void Access::NoteRefusal(const Credentials& credentials, const Identity* who,
                         const absl::Status& why) {
  audit_->Write({.caller = who,
                 .peer = credentials.peer,
                 .action = "refused",
                 .call = credentials.call,
                 .outcome = why});
}

}  // namespace lorikeet
