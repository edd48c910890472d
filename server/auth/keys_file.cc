#include "server/auth/keys_file.h"

#include <openssl/rand.h>
#include <yaml-cpp/yaml.h>

#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "adapters_cache/sha256.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "server/options.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

constexpr std::string_view kKeyPrefix = "lk.";
constexpr size_t kSecretBytes = 32;
constexpr size_t kHashDigits = 64;
constexpr size_t kMaxIdBytes = 64;
constexpr size_t kMaxTextBytes = 256;

constexpr std::pair<const char*, Role> kRoles[] = {
    {"generate", Role::kGenerate},
    {"adapters:read", Role::kAdaptersRead},
    {"adapters:write", Role::kAdaptersWrite},
    {"metrics", Role::kMetrics},
};

absl::Status Invalid(const std::string& what) { return absl::InvalidArgumentError(what); }

absl::StatusOr<std::string> Text(const YAML::Node& node, const std::string& field) {
  if (!node.IsScalar()) return Invalid(field + ": expected one value");
  LK_RETURN_IF_ERROR(ValidateUtf8(node.Scalar(), field));
  if (node.Scalar().size() > kMaxTextBytes) {
    return Invalid(absl::StrCat(field, ": ", node.Scalar().size(), " bytes; at most ",
                                kMaxTextBytes));
  }
  return node.Scalar();
}

absl::StatusOr<std::vector<std::string>> Texts(const YAML::Node& node, const std::string& field) {
  if (!node.IsSequence()) return Invalid(field + ": expected a sequence");
  std::vector<std::string> texts;
  for (const YAML::Node& item : node) {
    LK_ASSIGN_OR_RETURN(texts.emplace_back(), Text(item, field));
  }
  return texts;
}

absl::StatusOr<std::vector<std::string>> Patterns(const YAML::Node& node) {
  LK_ASSIGN_OR_RETURN(std::vector<std::string> patterns, Texts(node, "adapters"));
  for (const std::string& pattern : patterns) {
    if (pattern.empty() || pattern.find('*') < pattern.size() - 1) {
      return Invalid(absl::StrCat("adapters: '", pattern,
                                  "' is neither a name nor a beginning followed by '*'"));
    }
  }
  return patterns;
}

absl::StatusOr<std::string> Hash(const YAML::Node& node) {
  LK_ASSIGN_OR_RETURN(std::string hash, Text(node, "sha256"));
  if (hash.size() == kHashDigits &&
      hash.find_first_not_of("0123456789abcdef") == std::string::npos) {
    return hash;
  }
  return Invalid(absl::StrCat("sha256: not ", kHashDigits, " lower-case hexadecimal digits"));
}

absl::StatusOr<std::set<Role>> Roles(const YAML::Node& node) {
  LK_ASSIGN_OR_RETURN(const std::vector<std::string> names, Texts(node, "roles"));
  std::set<Role> roles;
  for (const std::string& name : names) {
    LK_ASSIGN_OR_RETURN(const Role role, ParseRole(name));
    roles.insert(role);
  }
  return roles;
}

absl::Status SetField(const std::string& name, const YAML::Node& node, KeyEntry* entry) {
  Identity& who = entry->identity;
  if (name == "id") {
    LK_ASSIGN_OR_RETURN(who.id, Text(node, name));
    return ValidateKeyId(who.id);
  }
  if (name == "sha256") {
    LK_ASSIGN_OR_RETURN(entry->sha256, Hash(node));
  } else if (name == "certificate") {
    LK_ASSIGN_OR_RETURN(entry->certificate, Text(node, name));
  } else if (name == "tenant") {
    LK_ASSIGN_OR_RETURN(who.tenant, Text(node, name));
  } else if (name == "roles") {
    LK_ASSIGN_OR_RETURN(who.roles, Roles(node));
  } else if (name == "adapters") {
    LK_ASSIGN_OR_RETURN(who.adapters, Patterns(node));
  } else if (name == "requests_per_minute") {
    LK_ASSIGN_OR_RETURN(const std::string text, Text(node, name));
    LK_ASSIGN_OR_RETURN(entry->requests_per_minute, ParseInt(text, 1, kMaxRequestsPerMinute, name));
  } else {
    const std::vector<std::string> known = {"id",    "sha256",   "certificate",        "tenant",
                                            "roles", "adapters", "requests_per_minute"};
    return Invalid(absl::StrCat("unknown field '", name, "'; did you mean '",
                                NearestName(name, known), "'?"));
  }
  return absl::OkStatus();
}

absl::Status Complete(KeyEntry& entry) {
  if (entry.identity.id.empty()) return Invalid("id: missing");
  if (entry.identity.tenant.empty()) entry.identity.tenant = entry.identity.id;
  if (entry.sha256.empty() && entry.certificate.empty()) {
    return Invalid("neither sha256 nor certificate: nobody could use it");
  }
  if (entry.identity.roles.empty()) return Invalid("roles: missing; it could do nothing");
  if (entry.identity.Has(Role::kMetrics) && !entry.identity.SeesAll()) {
    return Invalid("role metrics shows every adapter's name, so `adapters` must have '*'");
  }
  return absl::OkStatus();
}

absl::Status ReadEntry(const YAML::Node& node, KeyEntry* entry) {
  if (!node.IsMap()) return Invalid("expected a map of fields to values");
  std::set<std::string> seen;
  for (const auto& item : node) {
    if (!item.first.IsScalar()) return Invalid("a field is not a plain word");
    const std::string& name = item.first.Scalar();
    if (!seen.insert(name).second) return Invalid(name + " is given twice");
    LK_RETURN_IF_ERROR(SetField(name, item.second, entry));
  }
  return Complete(*entry);
}

absl::StatusOr<std::vector<KeyEntry>> ReadEntries(const YAML::Node& root) {
  std::vector<KeyEntry> entries;
  if (root.IsNull()) return entries;
  if (!root.IsSequence()) return Invalid("expected a sequence of keys");
  if (root.size() > kMaxKeys) {
    return Invalid(absl::StrCat(root.size(), " keys; at most ", kMaxKeys));
  }
  std::set<std::string> names;
  for (const YAML::Node& node : root) {
    KeyEntry& entry = entries.emplace_back();
    absl::Status status = ReadEntry(node, &entry);
    for (const std::string& name :
         {"id '" + entry.identity.id + "'", "sha256 " + entry.sha256,
          "certificate '" + entry.certificate + "'"}) {
      const bool absent = name == "sha256 " || name == "certificate ''";
      if (status.ok() && !absent && !names.insert(name).second) {
        status = Invalid(name + " is in two entries");
      }
    }
    if (!status.ok()) {
      return Invalid(absl::StrCat("line ", node.Mark().line + 1, ": key '", entry.identity.id,
                                  "': ", status.message()));
    }
  }
  return entries;
}

std::string Quoted(const std::string& text) {
  YAML::Emitter out;
  out << YAML::DoubleQuoted << text;
  return out.c_str();
}

std::string Line(const char* field, const std::string& value) {
  return value.empty() ? "" : absl::StrCat("  ", field, ": ", value, "\n");
}

}  // namespace

const char* RoleName(Role role) {
  for (const auto& [name, value] : kRoles) {
    if (value == role) return name;
  }
  LK_CHECK(false);
  return nullptr;
}

absl::StatusOr<Role> ParseRole(const std::string& name) {
  std::vector<std::string> names;
  for (const auto& [known, role] : kRoles) {
    if (name == known) return role;
    names.push_back(known);
  }
  return Invalid(absl::StrCat("role '", name, "' is none of ", absl::StrJoin(names, ", ")));
}

absl::StatusOr<std::vector<KeyEntry>> ParseKeys(const std::string& yaml) {
  try {
    return ReadEntries(YAML::Load(yaml));
  } catch (const YAML::Exception& error) {
    return Invalid(absl::StrCat("line ", error.mark.line + 1, ", column ", error.mark.column + 1,
                                ": ", error.msg));
  }
}

std::string FormatKey(const KeyEntry& entry) {
  const Identity& who = entry.identity;
  std::vector<std::string> adapters;
  for (const std::string& pattern : who.adapters) adapters.push_back(Quoted(pattern));
  std::vector<std::string> roles;
  for (const Role role : who.roles) roles.push_back(Quoted(RoleName(role)));
  return absl::StrCat(
      "- id: ", Quoted(who.id), "\n", Line("sha256", Quoted(entry.sha256)),
      Line("tenant", Quoted(who.tenant)),
      Line("roles", "[" + absl::StrJoin(roles, ", ") + "]"),
      Line("adapters", who.SeesAll() ? "" : "[" + absl::StrJoin(adapters, ", ") + "]"),
      Line("requests_per_minute",
           entry.requests_per_minute > 0 ? absl::StrCat(entry.requests_per_minute) : ""));
}

std::string MakeKey(std::string_view id) {
  unsigned char secret[kSecretBytes];
  LK_CHECK(RAND_bytes(secret, sizeof secret) == 1);
  const std::string text(reinterpret_cast<const char*>(secret), sizeof secret);
  return std::string(kKeyPrefix) + std::string(id) + "." + absl::WebSafeBase64Escape(text);
}

std::string HashKey(std::string_view key) {
  Sha256 hash;
  hash.Add(key);
  return hash.Hex();
}

std::string_view IdOfKey(std::string_view key) {
  if (!key.starts_with(kKeyPrefix)) return {};
  key.remove_prefix(kKeyPrefix.size());
  const size_t end = key.find('.');
  return end == std::string_view::npos ? std::string_view() : key.substr(0, end);
}

absl::Status ValidateKeyId(std::string_view id) {
  const bool plain =
      id.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") ==
      std::string_view::npos;
  if (plain && !id.empty() && id.size() <= kMaxIdBytes) return absl::OkStatus();
  return Invalid(absl::StrCat("id '", absl::CHexEscape({id.data(), id.size()}),
                              "' is not 1 to ", kMaxIdBytes, " of A-Z a-z 0-9 _ -"));
}

}  // namespace lorikeet
