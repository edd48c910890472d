// Where uploaded adapters are kept: a folder each, named by what its files hash to.
#pragma once

#include <filesystem>
#include <map>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/registry.h"

namespace lorikeet {

// Thread-safe. A folder stays while a name or the version that it leads to has its files there.
class Uploads {
 public:
  // `registry` outlives it. `directory` is empty: none are taken. What was being sent when a process
  // ended is removed; whole folders never are, since the file that lists them may have been lost.
  Uploads(const std::filesystem::path& directory, const AdapterRegistry* registry);

  // An empty folder to fill. FAILED_PRECONDITION: there is no directory; UNAVAILABLE: it cannot be
  // written to.
  absl::StatusOr<std::filesystem::path> Scratch() const;

  // Moves a filled folder to its place, on disk for good, unless the same files are there already.
  // It stays at least until LoadEnded. UNAVAILABLE.
  absl::StatusOr<std::filesystem::path> Keep(const std::filesystem::path& scratch,
                                             const std::string& name);
  void LoadEnded(const std::filesystem::path& place);

  // Removes `path` if it is a folder of these that nothing uses any more.
  void RemoveUnused(const std::filesystem::path& path);

 private:
  void RemoveUnusedLocked(const std::filesystem::path& path);

  const std::filesystem::path directory_;
  const AdapterRegistry* const registry_;
  std::mutex mutex_;  // everything below, and removing
  std::map<std::filesystem::path, int> loading_;  // loads under way, by place
};

}  // namespace lorikeet
