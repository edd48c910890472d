// The state file, and the thread that writes it: nobody else waits for its disk.
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "adapters_cache/registry_core.h"
#include "engine/base/status_macros.h"

namespace lorikeet {

absl::Status AdapterRegistry::Core::Restore() {
  if (options_.state_file.empty()) return absl::OkStatus();
  LK_ASSIGN_OR_RETURN(const RegistryRecords records, ReadRegistryFile(options_.state_file));
  for (const auto& [id, version] : records.versions) Measure(version.path);
  for (const auto& [name, record] : records.names) Measure(record.location);
  std::unique_lock lock(mutex_);
  RestoreNames(records);
  return SaveAll(lock);  // what a crash left at the log's end is not built upon
}

void AdapterRegistry::Core::RestoreNames(const RegistryRecords& records) {
  room_came_ = true;
  for (const auto& [id, record] : records.versions) {
    versions_[id] = std::make_shared<Version>();
    versions_[id]->record = record;
  }
  for (const auto& [name, record] : records.names) {
    std::vector<Target> targets;
    for (const auto& [id, weight] : record.targets) targets.push_back({versions_.at(id), weight});
    for (const Target& target : targets) {
      if (target.version->names == 0) target.version->tenant = record.tenant;
    }
    PointName(name, std::move(targets), record.location,
              record.any_path ? Origin::kOperator : Origin::kClient, /*kept=*/true, record.tenant);
    Name& entry = names_[name];
    entry.pinned = record.pinned;
    entry.loaded_at_unix_us = record.loaded_at_unix_us;
    entry.hits = record.hits;
    for (const Target& target : entry.targets) {
      if (entry.pinned) AddPins(target.version, 1);
    }
  }
}

void AdapterRegistry::Core::Changed(const std::string& name) {
  ++generation_;
  if (!options_.state_file.empty()) changed_names_.insert(name);
}

void AdapterRegistry::Core::WhenSaved(std::function<void(const absl::Status&)> done) {
  unsaved_.push_back(std::move(done));
  saver_wakes_.notify_one();
}

// `change` is made with the lock; `done` is told what it returns, if that is not an error once it is
// saved.
void AdapterRegistry::Core::Change(const std::function<absl::StatusOr<AdapterInfo>()>& change,
                                   LoadDone done) {
  absl::StatusOr<AdapterInfo> info = RegistryShuttingDown();
  {
    std::lock_guard lock(mutex_);
    if (!stopping_) info = change();
    if (info.ok()) {
      return WhenSaved([info = std::move(info), done = std::move(done)](const absl::Status& saved) {
        done(saved.ok() ? info : saved);
      });
    }
  }
  done(std::move(info));
}

void AdapterRegistry::Core::RunSaver() {
  constexpr int64_t kMostLogged = 1000;  // besides twice the names there are
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (unsaved_.empty()) {
      saver_wakes_.wait(lock);
    } else {
      Save(lock, logged_ > 2 * static_cast<int64_t>(names_.size()) + kMostLogged);
    }
  }
}

// One line of the log covers every change made before it is written; now and then `all` is written
// in the log's place.
void AdapterRegistry::Core::Save(std::unique_lock<std::mutex>& lock, bool all) {
  const auto waiting = std::exchange(unsaved_, {});
  const absl::Status saved = all ? SaveAll(lock) : LogChanges(lock);
  lock.unlock();
  for (const auto& done : waiting) done(saved);
  lock.lock();
}

absl::Status AdapterRegistry::Core::LogChanges(std::unique_lock<std::mutex>& lock) {
  const std::set<std::string> names = std::exchange(changed_names_, {});
  const int64_t generation = generation_;
  RegistryRecords changed;
  std::vector<std::string> gone;
  for (const std::string& name : names) {
    const auto it = names_.find(name);
    const bool there = it != names_.end() && it->second.kept;
    if (there) Record(name, it->second, &changed);
    if (!there) gone.push_back(name);
  }
  lock.unlock();
  absl::Status saved;
  if (!names.empty()) saved = AppendToRegistryLog(options_.state_file, changed, gone);
  lock.lock();
  logged_ += static_cast<int64_t>(names.size());
  OnSaved(saved, generation, names);
  return saved;
}

absl::Status AdapterRegistry::Core::SaveAll(std::unique_lock<std::mutex>& lock) {
  const std::set<std::string> names = std::exchange(changed_names_, {});
  const int64_t generation = generation_;
  const RegistryRecords records = Records();
  lock.unlock();
  const absl::Status saved = WriteRegistryFile(options_.state_file, records);
  lock.lock();
  if (saved.ok()) logged_ = 0;
  OnSaved(saved, generation, names);
  return saved;
}

// Directories that were left before may go now. What could not be saved is the next time.
void AdapterRegistry::Core::OnSaved(const absl::Status& saved, int64_t generation,
                                    const std::set<std::string>& names) {
  if (!saved.ok()) return changed_names_.insert(names.begin(), names.end());
  saved_generation_ = generation;
  left_more_ = !left_.empty();
  reaper_wakes_.notify_one();
}

void AdapterRegistry::Core::Record(const std::string& name, const Name& entry,
                                   RegistryRecords* records) const {
  NameRecord& record = records->names[name];
  record.location = entry.location;
  record.any_path = entry.origin == Origin::kOperator;
  record.pinned = entry.pinned;
  record.loaded_at_unix_us = entry.loaded_at_unix_us;
  record.hits = entry.hits;
  record.tenant = entry.tenant;
  for (const Target& target : entry.targets) {
    record.targets.emplace_back(target.version->record.id, target.weight);
    records->versions[target.version->record.id] = target.version->record;
  }
}

// What clients loaded: the operator's names come from the configuration again.
RegistryRecords AdapterRegistry::Core::Records() const {
  RegistryRecords records;
  for (const auto& [name, entry] : names_) {
    if (entry.kept) Record(name, entry, &records);
  }
  return records;
}

}  // namespace lorikeet
