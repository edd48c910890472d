#include "server/sources/disk_cache.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;

constexpr char kPartial[] = "partial-";

int64_t BytesOf(const fs::path& directory) {
  int64_t bytes = 0;
  std::error_code error;
  for (const auto& file : fs::directory_iterator(directory, error)) {
    bytes += static_cast<int64_t>(file.file_size(error));
  }
  return bytes;
}

absl::Status Failure(const char* what, const fs::path& path, const std::error_code& error) {
  return absl::UnavailableError(
      absl::StrCat("cannot ", what, " ", path.string(), ": ", error.message()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<DiskCache>> DiskCache::Open(fs::path directory, int64_t max_bytes) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) return Failure("make", directory, error);
  directory = fs::canonical(directory, error);
  if (error) return Failure("read", directory, error);
  std::unique_ptr<DiskCache> cache(new DiskCache(std::move(directory), max_bytes));
  LK_RETURN_IF_ERROR(cache->Scan());
  return cache;
}

// Oldest first, so that the order of use goes on where it was.
absl::Status DiskCache::Scan() {
  std::error_code error;
  std::vector<std::pair<fs::file_time_type, fs::path>> found;
  for (const auto& entry : fs::directory_iterator(directory_, error)) {
    if (entry.path().filename().string().starts_with(kPartial)) {
      fs::remove_all(entry.path(), error);
    } else {
      found.emplace_back(entry.last_write_time(error), entry.path());
    }
  }
  if (error) return Failure("read", directory_, error);
  std::sort(found.begin(), found.end());
  std::lock_guard lock(mutex_);
  for (const auto& [time, path] : found) {
    Entry& entry = entries_[path.filename().string()];
    entry.bytes = BytesOf(path);
    entry.last_use = ++now_;
    stats_.bytes += entry.bytes;
  }
  MakeRoom();
  return absl::OkStatus();
}

std::optional<FetchedAdapter> DiskCache::Find(const fs::path& directory) {
  std::lock_guard lock(mutex_);
  if (directory.parent_path() != directory_) return std::nullopt;
  const auto entry = entries_.find(directory.filename().string());
  if (entry == entries_.end()) return std::nullopt;
  std::error_code error;
  fs::last_write_time(directory, fs::file_time_type::clock::now(), error);
  if (!error) return Hold(entry);
  stats_.bytes -= entry->second.bytes;  // somebody else removed it
  entries_.erase(entry);
  return std::nullopt;
}

FetchedAdapter DiskCache::Hold(Entries::iterator entry) {
  entry->second.last_use = ++now_;
  std::shared_ptr<const void> hold = entry->second.hold.lock();
  if (hold == nullptr) {
    hold = std::make_shared<char>();
    entry->second.hold = hold;
  }
  return {directory_ / entry->first, std::move(hold)};
}

absl::StatusOr<fs::path> DiskCache::Scratch() const {
  std::error_code ignored;
  fs::create_directories(directory_, ignored);
  std::string pattern = (directory_ / absl::StrCat(kPartial, "XXXXXX")).string();
  if (mkdtemp(pattern.data()) == nullptr) {
    return Failure("write below", directory_, {errno, std::generic_category()});
  }
  return fs::path(pattern);
}

absl::StatusOr<FetchedAdapter> DiskCache::Keep(const fs::path& scratch, const std::string& name) {
  const int64_t bytes = BytesOf(scratch);
  if (bytes > max_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the adapter has ", bytes, " bytes; the disk cache of adapters has ", max_bytes_));
  }
  std::lock_guard lock(mutex_);
  auto entry = entries_.find(name);
  std::error_code error;
  if (entry == entries_.end() || !fs::exists(directory_ / name, error)) {
    fs::rename(scratch, directory_ / name, error);
    if (error) return Failure("keep", directory_ / name, error);
    if (entry == entries_.end()) {
      entry = entries_.emplace(name, Entry{.bytes = bytes}).first;
      stats_.bytes += bytes;
    }
  } else {
    fs::remove_all(scratch, error);
  }
  FetchedAdapter kept = Hold(entry);
  MakeRoom();
  return kept;
}

void DiskCache::MakeRoom() {
  while (stats_.bytes > max_bytes_) {
    auto oldest = entries_.end();
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (!it->second.hold.expired()) continue;
      if (oldest == entries_.end() || it->second.last_use < oldest->second.last_use) oldest = it;
    }
    if (oldest == entries_.end()) return;  // all are held; the next Keep tries again
    std::error_code error;
    fs::remove_all(directory_ / oldest->first, error);
    stats_.bytes -= oldest->second.bytes;
    ++stats_.evictions;
    entries_.erase(oldest);
  }
}

DiskCache::Stats DiskCache::stats() const {
  std::lock_guard lock(mutex_);
  Stats stats = stats_;
  stats.adapters = static_cast<int64_t>(entries_.size());
  return stats;
}

}  // namespace lorikeet
