// Names, versions and leases: everything that holds the registry's lock and does not wait.
#include "adapters_cache/registry_core.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace lorikeet {

namespace fs = std::filesystem;

int64_t UnixMicros() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

std::string QuotedName(std::string_view name) {
  const std::string shown(name.substr(0, AdapterRegistry::kMaxNameBytes));
  return absl::StrCat("'", shown, "'");
}

absl::Status AdapterNotLoaded(std::string_view name) {
  return absl::NotFoundError("adapter " + QuotedName(name) + " is not loaded");
}

absl::Status RegistryShuttingDown() {
  return absl::CancelledError("the server is shutting down");
}

namespace {

absl::Status TooManyWaiting(int64_t requests) {
  return absl::ResourceExhaustedError(
      absl::StrCat(requests, " requests wait for adapters; at most ",
                   AdapterRegistry::kMaxWaitingRequests, " may"));
}

}  // namespace

// ---- start and stop

void AdapterRegistry::Core::Start() {
  for (int i = 0; i < std::max(1, options_.loader_threads); ++i) {
    threads_.emplace_back([this] { RunLoader(); });
  }
  threads_.emplace_back([this] { RunReaper(); });
  threads_.emplace_back([this] { RunSaver(); });
}

void AdapterRegistry::Core::Stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  jobs_changed_.notify_all();
  reaper_wakes_.notify_all();
  saver_wakes_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  {
    std::unique_lock lock(mutex_);
    Save(lock, /*all=*/!options_.state_file.empty());  // for the hits as well
  }
  std::deque<Job> jobs;
  std::vector<LeaseDone> waiting;
  std::vector<UnloadDone> unloads;
  std::vector<std::shared_ptr<const Adapter>> freed;
  {
    std::lock_guard lock(mutex_);
    jobs.swap(jobs_);
    for (const auto& drain : drains_) unloads.push_back(std::exchange(drain->done, nullptr));
    drains_.clear();
    for (const auto& [id, version] : versions_) {
      std::ranges::move(version->waiting, std::back_inserter(waiting));
      version->waiting.clear();
      freed.push_back(std::move(version->adapter));
      version->drains.clear();
    }
    cold_.clear();
    watchers_.clear();
  }
  for (Job& job : jobs) {
    if (job.done) job.done(RegistryShuttingDown());
  }
  for (LeaseDone& done : waiting) done(RegistryShuttingDown());
  for (UnloadDone& done : unloads) done(RegistryShuttingDown());
  std::unique_lock lock(mutex_);
  ClearLeft(lock);
}

// ---- leases

void AdapterRegistry::Core::Acquire(std::string_view name, LeaseDone done) {
  absl::StatusOr<AdapterLease> lease = AdapterNotLoaded(name);
  bool wanted = false;
  {
    std::lock_guard lock(mutex_);
    const auto it = names_.find(name);
    if (stopping_) {
      lease = RegistryShuttingDown();
    } else if (it == names_.end()) {
      wanted = IsWanted(name);
      if (wanted && waiting_requests_ >= kMaxWaitingRequests) {
        wanted = false;
        lease = TooManyWaiting(waiting_requests_);
      }
    } else {
      Name& entry = it->second;
      ++entry.hits;
      entry.last_used_unix_us = UnixMicros();
      const int64_t total = std::accumulate(
          entry.targets.begin(), entry.targets.end(), int64_t{0},
          [](int64_t sum, const Target& target) { return sum + target.weight; });
      // Fibonacci hashing of a counter spreads the choices evenly at any scale.
      int64_t at = static_cast<int64_t>((next_choice_++ * 0x9E3779B97F4A7C15u >> 32) *
                                        static_cast<uint64_t>(total) >> 32);
      auto target = entry.targets.begin();
      for (; at >= target->weight; ++target) at -= target->weight;
      const VersionPtr& version = target->version;
      if (version->adapter != nullptr) {
        ++stats_.host_hits;
        lease = Lease(version);
      } else if (waiting_requests_ >= kMaxWaitingRequests) {
        lease = TooManyWaiting(waiting_requests_);
      } else {
        ++stats_.host_misses;
        ++entry.host_misses;
        ++waiting_requests_;
        version->waiting.push_back(std::move(done));
        QueueRead(version);
        return;
      }
    }
  }
  if (wanted) return AcquireOnDemand(std::string(name), std::move(done));
  done(std::move(lease));
}

AdapterLease AdapterRegistry::Core::Lease(const VersionPtr& version) {
  ++version->leases;
  SetCold(version.get());
  const Adapter* adapter = version->adapter.get();
  return AdapterLease(std::shared_ptr<const Adapter>(
      adapter, [core = shared_from_this(), version,
                own = version->adapter](const Adapter*) mutable {
        core->OnLeaseDropped(version.get(), std::move(own));
      }), version->adapter, version->tenant);
}

// Any thread, often the engine's. The version keeps the adapter, so nothing is freed here.
void AdapterRegistry::Core::OnLeaseDropped(Version* version,
                                           std::shared_ptr<const Adapter> adapter) {
  std::lock_guard lock(mutex_);
  if (version->adapter != nullptr) adapter.reset();
  --version->leases;
  if (stopping_) return;
  SetCold(version);
  const auto it = versions_.find(version->record.id);
  if (it != versions_.end() && it->second.get() == version) RetireIfUnused(it->second);
}

void AdapterRegistry::Core::RetireIfUnused(const VersionPtr& version) {
  if (version->names > 0 || version->leases > 0 || version->reading || version->retired) return;
  const VersionPtr kept = version;
  kept->retired = true;
  SetCold(kept.get());
  versions_.erase(kept->record.id);
  Left(kept->record.path);
  if (kept->adapter != nullptr) {
    CountHost(*kept, -1);
    --stats_.in_host;
    room_came_ = true;
    for (const auto& drain : kept->drains) drain->result.host_bytes_freed += kept->record.bytes;
    jobs_changed_.notify_all();
  }
  for (const auto& drain : kept->drains) {
    --drain->in_use;
    ++drain->leaving;
  }
  Emit(AdapterEvent::Kind::kFreed, "", kept->record.id);
  retired_.push_back(kept);
  reaper_wakes_.notify_one();
}

// ---- names

void AdapterRegistry::Core::PointName(const std::string& name, std::vector<Target> targets,
                                      std::string location, Origin origin, bool kept,
                                      const std::string& tenant) {
  for (const Target& target : targets) {
    ++target.version->names;
    // Loaded again while it drained: nothing is freed, and nobody waits for it any more.
    for (const auto& drain : std::exchange(target.version->drains, {})) {
      --drain->in_use;
      reaper_wakes_.notify_one();
    }
  }
  const bool fresh = !names_.contains(name);
  Name& entry = names_[name];
  if (fresh) {
    entry.tenant = tenant;
    ++tenants_[tenant].names;
  }
  const std::vector<Target> before = std::exchange(entry.targets, std::move(targets));
  for (const Target& target : entry.targets) {
    if (entry.pinned) AddPins(target.version, 1);
  }
  entry.location = std::move(location);
  entry.origin = origin;
  const bool was_kept = !fresh && entry.kept;
  entry.kept = kept;
  entry.loaded_at_unix_us = UnixMicros();
  if (kept || was_kept) Changed(name);
  Emit(AdapterEvent::Kind::kRegistered, name, entry.targets.front().version->record.id);
  DropTargets(before, entry.pinned, nullptr);
  KeepFolders(&entry);  // last, so that what it leaves waits until the state file says so
}

void AdapterRegistry::Core::DropTargets(const std::vector<Target>& targets, bool pinned,
                                        const std::shared_ptr<Drain>& drain) {
  for (const Target& target : targets) {
    const VersionPtr& version = target.version;
    --version->names;
    if (pinned) AddPins(version, -1);
    if (version->names == 0 && drain != nullptr) {
      version->drains.push_back(drain);
      ++drain->in_use;
    }
    RetireIfUnused(version);
  }
}

void AdapterRegistry::Core::Unload(std::string_view name, std::chrono::microseconds drain_time,
                                   UnloadDone done) {
  // Never more than a day, so that the deadline cannot overflow.
  drain_time = std::clamp<std::chrono::microseconds>(drain_time, std::chrono::microseconds(0),
                                                     std::chrono::hours(24));
  auto drain = std::make_shared<Drain>();
  drain->name = name;
  absl::Status refused;
  {
    std::lock_guard lock(mutex_);
    const auto it = names_.find(name);
    if (stopping_) {
      refused = RegistryShuttingDown();
    } else if (it == names_.end()) {
      refused = AdapterNotLoaded(name);
    } else {
      const Name entry = std::move(it->second);
      names_.erase(it);
      --tenants_[entry.tenant].names;
      if (entry.kept) Changed(drain->name);
      drain->done = std::move(done);
      drain->result.version = entry.targets.front().version->record.id;
      drains_.push_back(drain);
      Emit(AdapterEvent::Kind::kUnloaded, drain->name, drain->result.version);
      DropTargets(entry.targets, entry.pinned, drain);
      LeaveFolders(entry.folders, entry.tenant);
      return WhenSaved([this, drain, drain_time](const absl::Status& saved) {
        std::lock_guard lock(mutex_);
        drain->saved = saved;
        --drain->leaving;
        drain->deadline = std::chrono::steady_clock::now() + drain_time;
        reaper_wakes_.notify_one();
      });
    }
  }
  done(refused);
}

void AdapterRegistry::Core::SetPinned(std::string_view name, bool pinned, LoadDone done) {
  Change([&] { return Pin(name, pinned); }, std::move(done));
}

absl::StatusOr<AdapterInfo> AdapterRegistry::Core::Pin(std::string_view name, bool pinned) {
  const auto it = names_.find(name);
  if (it == names_.end()) return AdapterNotLoaded(name);
  Name& entry = it->second;
  if (entry.pinned == pinned) return Describe(it->first, entry);
  for (auto target = entry.targets.begin(); target != entry.targets.end(); ++target) {
    const absl::Status fits = pinned ? CheckFits(*target->version) : absl::OkStatus();
    if (!fits.ok()) {
      while (target != entry.targets.begin()) AddPins((--target)->version, -1);
      return fits;
    }
    AddPins(target->version, pinned ? 1 : -1);
  }
  entry.pinned = pinned;
  if (entry.kept) Changed(it->first);
  return Describe(it->first, entry);
}

// Whether one more name is allowed.
absl::Status AdapterRegistry::Core::CheckNames(const std::string& tenant) const {
  if (static_cast<int64_t>(names_.size()) >= options_.max_adapters) {
    return absl::ResourceExhaustedError(absl::StrCat(
        names_.size(), " adapters are loaded; at most ", options_.max_adapters, " are allowed"));
  }
  const auto found = tenants_.find(tenant);
  if (tenant.empty() || found == tenants_.end() ||
      found->second.names < options_.tenant_max_adapters) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(absl::StrCat("tenant '", tenant, "' has ",
                                                   found->second.names, " adapters; at most ",
                                                   options_.tenant_max_adapters, " are allowed"));
}

void AdapterRegistry::Core::SetAlias(const std::string& alias,
                                     const std::vector<AdapterTarget>& targets,
                                     const std::string& tenant, LoadDone done) {
  Change([&] { return PointAlias(alias, targets, tenant); }, std::move(done));
}

absl::StatusOr<AdapterInfo> AdapterRegistry::Core::PointAlias(
    const std::string& alias, const std::vector<AdapterTarget>& targets,
    const std::string& tenant) {
  LK_RETURN_IF_ERROR(ValidateAdapterName(alias, options_.base_name));
  if (targets.empty() || targets.size() > kMaxTargets) {
    return absl::InvalidArgumentError(absl::StrCat("alias ", QuotedName(alias), " has ",
                                                   targets.size(), " targets; 1 to ", kMaxTargets));
  }
  std::vector<Target> resolved;
  for (const AdapterTarget& target : targets) {
    if (target.weight < 1 || target.weight > kMaxTargetWeight) {
      return absl::InvalidArgumentError(absl::StrCat("the weight of ", QuotedName(target.version),
                                                     " is ", target.weight, "; 1 to ",
                                                     kMaxTargetWeight));
    }
    const auto version = versions_.find(target.version);
    if (version != versions_.end() && version->second->names > 0) {
      resolved.push_back({version->second, target.weight});
      continue;
    }
    LK_ASSIGN_OR_RETURN(const Name* name, FindName(target.version));
    if (name->targets.size() > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("target ", QuotedName(target.version), " has several targets itself"));
    }
    resolved.push_back({name->targets.front().version, target.weight});
  }
  if (!names_.contains(alias)) LK_RETURN_IF_ERROR(CheckNames(tenant));
  std::string location = resolved.front().version->record.location();
  LK_RETURN_IF_ERROR(CheckKeeps(alias, tenant, DirectoriesOf(resolved, location), nullptr));
  PointName(alias, std::move(resolved), std::move(location), Origin::kClient, /*kept=*/true,
            tenant);
  return Describe(alias, names_.find(alias)->second);
}

absl::StatusOr<const AdapterRegistry::Core::Name*> AdapterRegistry::Core::FindName(
    std::string_view name) const {
  const auto it = names_.find(name);
  if (it == names_.end()) return AdapterNotLoaded(name);
  return &it->second;
}

// ---- what is there

void AdapterRegistry::Core::SetDevice(DeviceTier* device) {
  std::scoped_lock lock(device_mutex_, mutex_);
  device_ = device;
}

int64_t AdapterRegistry::Core::DeviceBytes(const Version& version) const {
  if (device_ == nullptr || version.adapter == nullptr) return 0;
  return device_->ImageBytes(version.adapter->serial);
}

AdapterInfo AdapterRegistry::Core::Describe(const std::string& name, const Name& entry) const {
  const Version& version = *entry.targets.front().version;
  const VersionRecord& record = version.record;
  AdapterInfo info{.name = name,
                   .version = record.id,
                   .variant = record.variant,
                   .path = entry.location,
                   .min_rank = record.min_rank,
                   .max_rank = record.max_rank,
                   .modules = record.modules,
                   .bytes = record.bytes,
                   .in_host = version.adapter != nullptr,
                   .device_bytes = DeviceBytes(version),
                   .pinned = entry.pinned,
                   .leases = version.leases,
                   .hits = entry.hits,
                   .host_misses = entry.host_misses,
                   .loaded_at_unix_us = entry.loaded_at_unix_us,
                   .last_used_unix_us = entry.last_used_unix_us,
                   .warnings = record.warnings};
  for (const Target& target : entry.targets) {
    info.targets.push_back({target.version->record.id, target.weight});
  }
  return info;
}

std::vector<AdapterInfo> AdapterRegistry::Core::List(const AdapterFilter& filter) const {
  std::lock_guard lock(mutex_);
  std::vector<AdapterInfo> found;
  auto it = filter.after < filter.name_prefix ? names_.lower_bound(filter.name_prefix)
                                              : names_.upper_bound(filter.after);
  if (filter.after.empty() && filter.name_prefix.empty()) it = names_.begin();
  for (; it != names_.end() && static_cast<int32_t>(found.size()) < filter.limit; ++it) {
    const auto& [name, entry] = *it;
    if (!name.starts_with(filter.name_prefix)) break;
    if (filter.visible && !filter.visible(name)) continue;
    const auto leads_there = [&](const Target& target) {
      return target.version->record.id == filter.version;
    };
    if (!filter.version.empty() && std::ranges::none_of(entry.targets, leads_there)) continue;
    const Version& first = *entry.targets.front().version;
    if (filter.in_host_only && first.adapter == nullptr) continue;
    if (filter.on_device_only && DeviceBytes(first) == 0) continue;
    found.push_back(Describe(name, entry));
  }
  return found;
}

absl::StatusOr<AdapterInfo> AdapterRegistry::Core::Get(std::string_view name) const {
  std::lock_guard lock(mutex_);
  LK_ASSIGN_OR_RETURN(const Name* entry, FindName(name));
  return Describe(std::string(name), *entry);
}

// Versions that requests hold or wait for are among them.
bool AdapterRegistry::Core::Uses(const std::string& directory) const {
  const auto folder = folders_.find(directory);
  return loading_.contains(directory) ||
         (folder != folders_.end() && !folder->second.names.empty()) ||
         std::ranges::any_of(versions_, [&](const auto& version) {
           return version.second->record.path == directory;
         });
}

void AdapterRegistry::Core::Left(const std::string& directory) {
  if (!IsOwned(directory)) return;
  left_[directory] = generation_;
  left_more_ = true;
  reaper_wakes_.notify_one();
}

void AdapterRegistry::Core::TellIfUnused(const std::string& directory) {
  std::lock_guard lock(mutex_);
  Left(directory);
}

absl::StatusOr<std::string> AdapterRegistry::Core::Find(std::string_view name) const {
  std::lock_guard lock(mutex_);
  LK_ASSIGN_OR_RETURN(const Name* entry, FindName(name));
  return entry->targets.front().version->record.id;
}

RegistryStats AdapterRegistry::Core::stats() const {
  std::lock_guard lock(mutex_);
  RegistryStats stats = stats_;
  stats.names = static_cast<int64_t>(names_.size());
  stats.versions = static_cast<int64_t>(versions_.size());
  stats.host_bytes = HostBytes();
  return stats;
}

}  // namespace lorikeet
