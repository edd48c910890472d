// Where uploaded adapters are kept: a folder each, named by what its files hash to.
#pragma once

#include <filesystem>
#include <map>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lorikeet {

// Thread-safe. Which folders are used the registry knows (AdapterRegistry::Options::owned).
class Uploads {
 public:
  // What was being sent when a process ended is removed; whole folders never
  // are, since the file that lists them may have been lost.
  explicit Uploads(const std::filesystem::path& directory);

  const std::filesystem::path& directory() const { return directory_; }  // its real path

  // An empty folder to fill. UNAVAILABLE: the directory cannot be written to.
  absl::StatusOr<std::filesystem::path> Scratch() const;

  // Moves a filled folder to its place, on disk for good. Another of that name makes room: its files
  // were the same when they came. It stays at least until LoadEnded. UNAVAILABLE.
  absl::StatusOr<std::filesystem::path> Keep(const std::filesystem::path& scratch,
                                             const std::string& name);
  void LoadEnded(const std::filesystem::path& place);

  // Nothing uses it any more. Does nothing while a load is to come.
  void Remove(const std::filesystem::path& place);

 private:
  const std::filesystem::path directory_;
  std::mutex mutex_;  // everything below, and what becomes of folders
  std::map<std::filesystem::path, int> loading_;  // loads to come or under way, by place
};

}  // namespace lorikeet
