// The keys file: who may do what. YAML (and so JSON), a sequence of entries:
//
//   - id: support-bot                 # letters, digits, '_' and '-'; in logs, and within the key
//     sha256: 9f86d0...               # of the key, 64 hexadecimal digits
//     certificate: bot.example.com    # instead or as well: a name of a verified client certificate
//     tenant: support                 # whose it is; absent: the id. Cached prompts are shared within
//     roles: [generate, adapters:read]
//     adapters: [support-*, sql]      # names or beginnings; absent: all; []: the base model alone
//     requests_per_minute: 600        # optional
//
// A key is "lk.ID.SECRET" with 256 random bits, so that its plain hash can be kept: there is nothing
// to guess. `lorikeet keys` makes them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/auth/identity.h"

namespace lorikeet {

struct KeyEntry {
  Identity identity;
  std::string sha256;       // 64 lower-case hexadecimal digits; empty: no key
  std::string certificate;  // empty: no certificate
  int32_t requests_per_minute = 0;  // 0: as many as come
};

constexpr int32_t kMaxKeys = 10'000;
constexpr int32_t kMaxRequestsPerMinute = 1'000'000;

// INVALID_ARGUMENT names the line and the entry: an unknown or missing field, a role that is none,
// an id, hash or certificate name given twice, `metrics`, which shows every adapter's name, with
// `adapters` that do not have them all.
absl::StatusOr<std::vector<KeyEntry>> ParseKeys(const std::string& yaml);

// The entry as a line or more of the file.
std::string FormatKey(const KeyEntry& entry);

// A new random key for `id`. The hash goes into the file and the key to whom it is for.
std::string MakeKey(std::string_view id);
std::string HashKey(std::string_view key);
// The id within a key; empty: it does not have a key's form.
std::string_view IdOfKey(std::string_view key);

const char* RoleName(Role role);
// INVALID_ARGUMENT lists what there is.
absl::StatusOr<Role> ParseRole(const std::string& name);
absl::Status ValidateKeyId(std::string_view id);

}  // namespace lorikeet
