// Disk: the directories of `owned` that names keep, whose they are, and room for files that come.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/registry_core.h"
#include "engine/base/directory_bytes.h"

namespace lorikeet {

namespace fs = std::filesystem;

bool AdapterRegistry::Core::IsOwned(const std::string& directory) const {
  return options_.on_unused && fs::path(directory).parent_path() == options_.owned;
}

// Before a name may keep it. REQUIRES: a load is about to read it, or nobody can yet.
void AdapterRegistry::Core::Measure(const std::string& directory) {
  if (!IsOwned(directory)) return;
  const int64_t bytes = DirectoryBytes(directory);
  std::lock_guard lock(mutex_);
  if (folders_.try_emplace(directory, Folder{.bytes = bytes}).second) stats_.disk_bytes += bytes;
}

// Nothing uses it any more.
void AdapterRegistry::Core::Forget(const std::string& directory) {
  const auto folder = folders_.find(directory);
  if (folder == folders_.end()) return;
  stats_.disk_bytes -= folder->second.bytes;
  folders_.erase(folder);
}

// Where a reload of a name reads from, and where what it leads to is read again.
std::set<std::string> AdapterRegistry::Core::DirectoriesOf(const std::vector<Target>& targets,
                                                           const std::string& location) {
  std::set<std::string> directories{location};
  for (const Target& target : targets) directories.insert(target.version->record.path);
  return directories;
}

std::vector<AdapterRegistry::Core::FolderAt> AdapterRegistry::Core::FoldersOf(
    const std::set<std::string>& directories) {
  std::vector<FolderAt> folders;
  for (const std::string& directory : directories) {
    if (IsOwned(directory)) folders.push_back(folders_.try_emplace(directory).first);
  }
  return folders;
}

// Counts what the name keeps now, in place of what it kept before.
void AdapterRegistry::Core::KeepFolders(Name* entry) {
  const auto before = std::exchange(
      entry->folders, FoldersOf(DirectoriesOf(entry->targets, entry->location)));
  for (const FolderAt& folder : entry->folders) {
    if (++folder->second.names[entry->tenant] > 1) continue;
    tenants_[entry->tenant].disk_bytes += folder->second.bytes;
  }
  LeaveFolders(before, entry->tenant);
}

void AdapterRegistry::Core::LeaveFolders(const std::vector<FolderAt>& folders,
                                         const std::string& tenant) {
  for (const FolderAt& folder : folders) {
    auto& names = folder->second.names;
    if (--names[tenant] == 0) {
      names.erase(tenant);
      tenants_[tenant].disk_bytes -= folder->second.bytes;
    }
    Left(folder->first);
  }
}

// Of what `entry` alone of its tenant's names keeps, but for `others`.
int64_t AdapterRegistry::Core::BytesOfItsOwn(const Name& entry,
                                             const std::vector<FolderAt>& others) const {
  int64_t bytes = 0;
  for (const FolderAt& folder : entry.folders) {
    const bool alone = folder->second.names.at(entry.tenant) == 1;
    if (alone && std::ranges::count(others, folder) == 0) bytes += folder->second.bytes;
  }
  return bytes;
}

// Whether the tenant may have `more` bytes where it has `less` now. What takes no more than before may be.
absl::Status AdapterRegistry::Core::CheckDisk(const std::string& tenant, int64_t more,
                                              int64_t less) const {
  const auto found = tenants_.find(tenant);
  const int64_t others = (found == tenants_.end() ? 0 : found->second.disk_bytes) - less;
  if (tenant.empty() || more <= less || more <= options_.tenant_disk_bytes - others) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(
      absl::StrCat("tenant '", tenant, "' has ", others, " bytes of other adapters on disk, those "
                   "that are being uploaded included; with ", more, " of this one it would have "
                   "more than its ", options_.tenant_disk_bytes));
}

// Whether `name` may keep the directories, whose files `room`, or nullptr, was taken for.
absl::Status AdapterRegistry::Core::CheckKeeps(const std::string& name, const std::string& tenant,
                                               const std::set<std::string>& directories,
                                               const DiskRoom* room) {
  const auto it = names_.find(name);
  const std::string& whose = it != names_.end() ? it->second.tenant : tenant;
  const std::vector<FolderAt> folders = FoldersOf(directories);
  int64_t more = 0, less = 0;
  for (const FolderAt& folder : folders) {
    if (!folder->second.names.contains(whose)) more += folder->second.bytes;
  }
  if (it != names_.end()) less += BytesOfItsOwn(it->second, folders);
  if (room != nullptr && room->tenant_ == whose) less += room->bytes_;
  return CheckDisk(whose, more, less);
}

// ---- room for what comes

// What the name keeps now makes room, for one at a time.
std::unique_ptr<AdapterRegistry::DiskRoom> AdapterRegistry::Core::DiskRoomFor(
    const std::string& name, const std::string& tenant) {
  std::unique_ptr<DiskRoom> room(new DiskRoom(shared_from_this(), name, tenant));
  std::lock_guard lock(mutex_);
  if (const auto it = names_.find(name); it != names_.end()) {
    room->tenant_ = it->second.tenant;
    if (!coming_.contains(name)) room->replaced_bytes_ = BytesOfItsOwn(it->second, {});
  }
  coming_.insert(name);
  return room;
}

absl::Status AdapterRegistry::DiskRoom::Take(int64_t bytes) {
  std::lock_guard lock(core_->mutex_);
  const absl::Status fits = core_->CheckDisk(tenant_, bytes_ + bytes, bytes_ + replaced_bytes_);
  if (!fits.ok()) return fits;
  core_->tenants_[tenant_].disk_bytes += bytes;
  bytes_ += bytes;
  return fits;
}

void AdapterRegistry::Core::GiveBack(DiskRoom* room) {
  tenants_[room->tenant_].disk_bytes -= std::exchange(room->bytes_, 0);
}

AdapterRegistry::DiskRoom::~DiskRoom() {
  std::lock_guard lock(core_->mutex_);
  core_->GiveBack(this);
  core_->coming_.erase(core_->coming_.find(name_));
}

}  // namespace lorikeet
