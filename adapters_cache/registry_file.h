// The names and versions of a registry in a file, so that they outlive the process.
//
// The file is one version byte, the SHA-256 of what follows in hexadecimal and a newline, then JSON.
// It is replaced as a whole: a new file is written beside it, synced and renamed over it, and the
// directory is synced; a crash at any point leaves the old file or the new one.
//
// Changes since are lines of a log beside it, PATH.log-DIGITS, each synced before it counts: the
// SHA-256 of the JSON that follows. What a crash left without its newline is no line. The digits are
// the beginning of the file's hash, so that a log that outlived its file, by a crash, is not read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lorikeet {

// What is known of a version besides its weights.
struct VersionRecord {
  std::string id;  // 64 hexadecimal digits
  std::string variant;
  std::string path;          // resolved directory
  std::string source;        // URL that it was fetched from; empty: the directory is the original
  bool any_path = false;     // else it must lie under an allowed root
  int32_t min_rank = 0;
  int32_t max_rank = 0;
  int32_t modules = 0;
  int64_t bytes = 0;
  std::vector<std::string> warnings;

  const std::string& location() const { return source.empty() ? path : source; }
  // What is read by a loader without the lock, the id, stays as it is.
  void MoveTo(std::string new_path, std::string new_source, bool new_any_path) {
    path = std::move(new_path);
    source = std::move(new_source);
    any_path = new_any_path;
  }
};

struct NameRecord {
  std::vector<std::pair<std::string, int32_t>> targets;  // version and weight
  std::string location;  // directory or URL that a reload reads
  bool any_path = false;  // of that reload
  bool pinned = false;
  int64_t loaded_at_unix_us = 0;
  int64_t hits = 0;  // requests that asked for it
  std::string tenant;
};

struct RegistryRecords {
  std::map<std::string, VersionRecord> versions;
  std::map<std::string, NameRecord> names;
};

// Records of an absent file are empty. DATA_LOSS: not such a file, or it or its log is damaged;
// UNIMPLEMENTED: of a later version.
absl::StatusOr<RegistryRecords> ReadRegistryFile(const std::filesystem::path& path);

// UNAVAILABLE names the file and the system's reason; the old file is then still there. Ends the log.
absl::Status WriteRegistryFile(const std::filesystem::path& path, const RegistryRecords& records);

// A line of the log: `changed` names with their versions, and names that are gone. UNAVAILABLE as
// above: the line does not count.
absl::Status AppendToRegistryLog(const std::filesystem::path& path, const RegistryRecords& changed,
                                 const std::vector<std::string>& gone);

}  // namespace lorikeet
