#include "server/sources/disk_cache.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/directory_bytes.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;

constexpr char kPartial[] = "partial-";

absl::Status Failure(const char* what, const fs::path& path, const std::error_code& error) {
  return absl::UnavailableError(
      absl::StrCat("cannot ", what, " ", path.string(), ": ", error.message()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<DiskCache>> DiskCache::Open(fs::path directory, int64_t max_bytes,
                                                           int64_t tenant_max_bytes) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) return Failure("make", directory, error);
  directory = fs::canonical(directory, error);
  if (error) return Failure("read", directory, error);
  std::unique_ptr<DiskCache> cache(new DiskCache(std::move(directory), max_bytes, tenant_max_bytes));
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
    entry.bytes = DirectoryBytes(path);
    entry.last_use = ++now_;
    Count(entry, 1);
  }
  MakeRoom();
  return absl::OkStatus();
}

void DiskCache::Count(const Entry& entry, int sign) {
  stats_.bytes += sign * entry.bytes;
  if (entry.tenant && !entry.tenant->empty()) tenant_bytes_[*entry.tenant] += sign * entry.bytes;
}

std::optional<FetchedAdapter> DiskCache::Find(const fs::path& directory,
                                              const std::string& tenant) {
  std::lock_guard lock(mutex_);
  if (directory.parent_path() != directory_) return std::nullopt;
  const auto entry = entries_.find(directory.filename().string());
  if (entry == entries_.end()) return std::nullopt;
  std::error_code error;
  fs::last_write_time(directory, fs::file_time_type::clock::now(), error);
  if (!error) return Hold(entry, tenant);
  Count(entry->second, -1);  // somebody else removed it
  entries_.erase(entry);
  return std::nullopt;
}

FetchedAdapter DiskCache::Hold(Entries::iterator entry, const std::string& tenant) {
  entry->second.last_use = ++now_;
  if (!entry->second.tenant) {
    Count(entry->second, -1);
    entry->second.tenant = tenant;
    Count(entry->second, 1);
  }
  std::shared_ptr<const void> hold = entry->second.hold.lock();
  if (hold == nullptr) {
    hold = std::make_shared<char>();
    entry->second.hold = hold;
  }
  return {directory_ / entry->first, std::move(hold)};
}

int64_t DiskCache::MostFor(const std::string& tenant) const {
  return tenant.empty() ? max_bytes_ : std::min(max_bytes_, tenant_max_bytes_);
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

absl::StatusOr<FetchedAdapter> DiskCache::Keep(const fs::path& scratch, const std::string& name,
                                               const std::string& tenant) {
  const int64_t bytes = DirectoryBytes(scratch);
  const int64_t most = MostFor(tenant);
  if (bytes > most) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the adapter has ", bytes, " bytes; the disk cache of adapters has ", most,
                     most < max_bytes_ ? absl::StrCat(" for tenant '", tenant, "'") : ""));
  }
  std::lock_guard lock(mutex_);
  auto entry = entries_.find(name);
  std::error_code error;
  if (entry == entries_.end() || !fs::exists(directory_ / name, error)) {
    fs::rename(scratch, directory_ / name, error);
    if (error) return Failure("keep", directory_ / name, error);
    if (entry == entries_.end()) {
      entry = entries_.emplace(name, Entry{.bytes = bytes}).first;
      Count(entry->second, 1);
    }
  } else {
    fs::remove_all(scratch, error);
  }
  FetchedAdapter kept = Hold(entry, tenant);
  MakeTenantRoom(tenant);
  MakeRoom();
  return kept;
}

// Where all are held the next Keep tries again.
void DiskCache::MakeRoom() {
  while (stats_.bytes > max_bytes_ && DropOldest([](const Entry&) { return true; })) {
  }
}

void DiskCache::MakeTenantRoom(const std::string& tenant) {
  const auto has = tenant_bytes_.find(tenant);
  if (has == tenant_bytes_.end()) return;
  while (has->second > tenant_max_bytes_ &&
         DropOldest([&](const Entry& entry) { return entry.tenant == tenant; })) {
  }
}

// Of those that may go. False: there is none.
template <typename May>
bool DiskCache::DropOldest(const May& may) {
  auto oldest = entries_.end();
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    if (!it->second.hold.expired() || !may(it->second)) continue;
    if (oldest == entries_.end() || it->second.last_use < oldest->second.last_use) oldest = it;
  }
  if (oldest == entries_.end()) return false;
  std::error_code error;
  fs::remove_all(directory_ / oldest->first, error);
  Count(oldest->second, -1);
  ++stats_.evictions;
  entries_.erase(oldest);
  return true;
}

DiskCache::Stats DiskCache::stats() const {
  std::lock_guard lock(mutex_);
  Stats stats = stats_;
  stats.adapters = static_cast<int64_t>(entries_.size());
  return stats;
}

}  // namespace lorikeet
