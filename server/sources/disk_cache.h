// Directories of fetched adapters, as many as fit a budget of bytes, and of each tenant's as many as fit a
// smaller one; the one used longest ago goes first, and never one that is held.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/adapter_sources.h"

namespace lorikeet {

// Thread-safe. What was under way when a process ended is removed by the next.
class DiskCache {
 public:
  // UNAVAILABLE: `directory` cannot be made or read.
  static absl::StatusOr<std::unique_ptr<DiskCache>> Open(std::filesystem::path directory,
                                                         int64_t max_bytes,
                                                         int64_t tenant_max_bytes);

  // The directory, if it is one of these and still there. `tenant`, empty: nobody, has it from now on if
  // no one asked for it before in this process.
  std::optional<FetchedAdapter> Find(const std::filesystem::path& directory,
                                     const std::string& tenant);

  // Bytes of the largest adapter that may be kept for `tenant`.
  int64_t MostFor(const std::string& tenant) const;

  // An empty directory to fill, then to Keep or to remove. UNAVAILABLE.
  absl::StatusOr<std::filesystem::path> Scratch() const;

  // Moves it to its place as `name`, unless one of that name is there, and makes room. `tenant` as for Find.
  // RESOURCE_EXHAUSTED: it alone has more than a budget; UNAVAILABLE: it cannot be moved.
  absl::StatusOr<FetchedAdapter> Keep(const std::filesystem::path& scratch, const std::string& name,
                                      const std::string& tenant);

  struct Stats {
    int64_t adapters = 0;
    int64_t bytes = 0;
    int64_t evictions = 0;
  };
  Stats stats() const;

 private:
  struct Entry {
    int64_t bytes = 0;
    int64_t last_use = 0;
    std::weak_ptr<const void> hold;
    std::optional<std::string> tenant;  // nullopt: nobody asked for it in this process
  };
  using Entries = std::map<std::string, Entry>;  // by the directory's name

  DiskCache(std::filesystem::path directory, int64_t max_bytes, int64_t tenant_max_bytes)
      : directory_(std::move(directory)),
        max_bytes_(max_bytes),
        tenant_max_bytes_(tenant_max_bytes) {}

  absl::Status Scan();
  FetchedAdapter Hold(Entries::iterator entry, const std::string& tenant);
  void MakeRoom();
  void MakeTenantRoom(const std::string& tenant);
  template <typename May>
  bool DropOldest(const May& may);
  void Count(const Entry& entry, int sign);

  const std::filesystem::path directory_;
  const int64_t max_bytes_;
  const int64_t tenant_max_bytes_;
  mutable std::mutex mutex_;  // everything below
  Entries entries_;
  std::map<std::string, int64_t> tenant_bytes_;  // but nobody's
  int64_t now_ = 0;  // counts uses
  Stats stats_;
};

}  // namespace lorikeet
