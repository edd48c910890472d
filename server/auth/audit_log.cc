#include "server/auth/audit_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "nlohmann/json.hpp"
#include "server/log.h"

namespace lorikeet {

absl::StatusOr<std::unique_ptr<AuditLog>> AuditLog::Open(const std::string& path) {
  if (path.empty()) return std::unique_ptr<AuditLog>(new AuditLog(-1));
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd >= 0) return std::unique_ptr<AuditLog>(new AuditLog(fd));
  return absl::InvalidArgumentError(
      absl::StrCat("audit-log: cannot open '", path, "': ", std::strerror(errno)));
}

AuditLog::~AuditLog() {
  if (fd_ >= 0) close(fd_);
}

void AuditLog::Write(const Entry& entry) {
  if (fd_ < 0) return;
  using Json = nlohmann::ordered_json;
  Json line = {{"time", absl::FormatTime(absl::RFC3339_full, absl::Now(), absl::UTCTimeZone())},
               {"action", entry.action},
               {"outcome", absl::StatusCodeToString(entry.outcome.code())}};
  if (!entry.call.empty()) line["call"] = entry.call;
  if (!entry.adapter.empty()) line["adapter"] = entry.adapter;
  if (!entry.path.empty()) line["path"] = entry.path;
  if (!entry.level.empty()) line["level"] = entry.level;
  if (entry.caller != nullptr && !entry.caller->id.empty()) {
    line["key"] = entry.caller->id;
    line["tenant"] = entry.caller->tenant;
  }
  line["peer"] = entry.peer;
  if (!entry.outcome.ok()) line["message"] = std::string(entry.outcome.message());
  // One write a line: lines of several threads do not mix.
  const std::string text = line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  if (write(fd_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    Log(LogLevel::kError, absl::StrCat("cannot write to the audit log: ", std::strerror(errno)));
  }
}

}  // namespace lorikeet
