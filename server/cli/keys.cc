// `lorikeet keys`: makes API keys.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/auth/keys_file.h"
#include "server/cli/client.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;

constexpr char kUsage[] =
    "lorikeet keys add FILE ID [flags]\n\n"
    "Makes a new key, adds its hash to the keys file FILE, which is made if it is not there, and\n"
    "prints the key, which is kept nowhere else. A server with this file takes the key at once.\n";

// A file that was there keeps its owner and mode, as far as this user may give them.
void KeepOwner(const std::string& file, int fd) {
  struct stat there{};
  if (stat(file.c_str(), &there) != 0) return;
  if (fchown(fd, there.st_uid, there.st_gid) == 0) fchmod(fd, there.st_mode & 07777);
}

// Whoever opens FILE sees all of the old one or all of the new one.
absl::Status Replace(const std::string& file, const std::string& content) {
  const std::string scratch = absl::StrCat(file, ".", getpid());
  const int fd = open(scratch.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  bool written = fd >= 0 && write(fd, content.data(), content.size()) ==
                                static_cast<ssize_t>(content.size());
  if (written) KeepOwner(file, fd);
  written = written && fsync(fd) == 0;
  if (fd >= 0) close(fd);
  std::error_code error;
  if (written) fs::rename(scratch, file, error);
  if (written && !error) return absl::OkStatus();
  fs::remove(scratch, error);
  return absl::UnavailableError(absl::StrCat("cannot write '", file, "'"));
}

absl::Status Add(const std::string& file, KeyEntry entry) {
  LK_RETURN_IF_ERROR(ValidateKeyId(entry.identity.id));
  std::string content;
  if (fs::exists(file)) {
    LK_ASSIGN_OR_RETURN(content, ReadTextFile(file));
    LK_RETURN_IF_ERROR(ParseKeys(content).status());
    if (!content.empty() && content.back() != '\n') content += '\n';
  }
  const std::string key = MakeKey(entry.identity.id);
  entry.sha256 = HashKey(key);
  content += FormatKey(entry);
  LK_RETURN_IF_ERROR(ParseKeys(content).status());
  LK_RETURN_IF_ERROR(Replace(file, content));
  std::printf("%s\n", key.c_str());
  return absl::OkStatus();
}

}  // namespace

absl::Status RunKeys(Arguments args) {
  KeyEntry entry;
  std::vector<std::string> roles, adapters;
  OptionTable table;
  table.List("role", "ROLE",
             "generate, adapters:read, adapters:write or metrics; may be repeated "
             "(default: generate)",
             &roles);
  table.List("adapter", "NAME",
             "an adapter it may use, or the beginning of names and a '*'; may be repeated "
             "(default: all)",
             &adapters);
  table.Text("tenant", "NAME", "whose key it is (default: ID)", &entry.identity.tenant);
  table.Int("requests-per-minute", 0, kMaxRequestsPerMinute, "", "0: as many as come",
            &entry.requests_per_minute);
  if (PrintedHelp(args, kUsage, table)) return absl::OkStatus();
  if (args.empty() || args[0] != "add") {
    return absl::InvalidArgumentError("keys: the verb is 'add'; see --help");
  }
  LK_ASSIGN_OR_RETURN(const std::vector<std::string> rest,
                      ParseClientFlags(args.subspan(1), table, 2, 2));
  if (roles.empty()) roles.push_back(RoleName(Role::kGenerate));
  for (const std::string& name : roles) {
    LK_ASSIGN_OR_RETURN(const Role role, ParseRole(name));
    entry.identity.roles.insert(role);
  }
  if (!adapters.empty()) entry.identity.adapters = adapters;
  entry.identity.id = rest[1];
  if (entry.identity.tenant.empty()) entry.identity.tenant = entry.identity.id;
  return Add(rest[0], std::move(entry));
}

}  // namespace lorikeet
