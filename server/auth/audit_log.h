// Who changed which adapter or the log's level, and who tried: one JSON object a line, appended to a
// file.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/auth/identity.h"

namespace lorikeet {

// Thread-safe. Lines have no key and nothing of a prompt.
class AuditLog {
 public:
  // An empty path: nothing is written. INVALID_ARGUMENT: the file cannot be opened.
  static absl::StatusOr<std::unique_ptr<AuditLog>> Open(const std::string& path);
  ~AuditLog();

  struct Entry {
    const Identity* caller = nullptr;  // nullptr: nobody known
    std::string_view peer;             // address
    std::string_view action;           // "LoadAdapter"
    std::string_view call;             // that was refused: "POST /v1/adapters"
    std::string_view adapter;
    std::string_view path;             // of a load
    std::string_view level;            // of the log
    absl::Status outcome;
  };
  void Write(const Entry& entry);

 private:
  explicit AuditLog(int fd) : fd_(fd) {}

  const int fd_;  // -1: none
};

}  // namespace lorikeet
