// Host memory: what is in it, what makes room, what is read next. With the registry's lock.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/registry_core.h"
#include "engine/base/check.h"

namespace lorikeet {

// Of a version whose bytes come to host memory (1) or leave it (-1).
void AdapterRegistry::Core::CountHost(const Version& version, int sign) {
  host_bytes_ += sign * version.record.bytes;
  tenants_[version.tenant].host_bytes += sign * version.record.bytes;
}

// Who has no tenant has no bound of a tenant.
int64_t AdapterRegistry::Core::HostBytesOf(const std::string& tenant) const {
  return tenant.empty() ? options_.host_bytes : options_.tenant_host_bytes;
}

// Whether the version fits into its tenant's share, after cold ones of that tenant made room.
bool AdapterRegistry::Core::MakeTenantRoom(const Version& version) {
  const int64_t most = HostBytesOf(version.tenant) - version.record.bytes;
  const Tenant& tenant = tenants_[version.tenant];
  while (tenant.host_bytes > most) {
    const auto oldest = std::ranges::find_if(
        cold_, [&](const Version* cold) { return cold->tenant == version.tenant; });
    if (oldest == cold_.end()) return false;
    Evict(*oldest);
  }
  return true;
}

// Whether `bytes` more fit, after cold versions made room.
bool AdapterRegistry::Core::MakeRoom(int64_t bytes) {
  while (HostBytes() > options_.host_bytes - bytes && !cold_.empty()) Evict(cold_.front());
  return HostBytes() <= options_.host_bytes - bytes;
}

// Beside what others have pinned.
absl::Status AdapterRegistry::Core::CheckFits(const VersionRecord& record,
                                              const std::string& tenant, bool pinned) const {
  const int64_t own = pinned ? record.bytes : 0;
  const auto found = tenants_.find(tenant);
  const int64_t tenant_pinned = found == tenants_.end() ? 0 : found->second.pinned_bytes - own;
  if (record.bytes <= options_.host_bytes - (pinned_bytes_ - own) &&
      record.bytes <= HostBytesOf(tenant) - tenant_pinned) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      "the adapter has ", record.bytes, " bytes; host memory for adapters has ",
      options_.host_bytes, ", of which ", pinned_bytes_ - own, " are pinned, and for its tenant ",
      HostBytesOf(tenant), ", of which ", tenant_pinned, " are pinned"));
}

absl::Status AdapterRegistry::Core::CheckFits(const Version& version) const {
  return CheckFits(version.record, version.tenant, version.pins > 0);
}

void AdapterRegistry::Core::AddPins(const VersionPtr& version, int32_t pins) {
  const bool before = version->pins > 0;
  version->pins += pins;
  const bool after = version->pins > 0;
  if (before != after) {
    const int64_t bytes = after ? version->record.bytes : -version->record.bytes;
    pinned_bytes_ += bytes;
    tenants_[version->tenant].pinned_bytes += bytes;
  }
  SetCold(version.get());
  if (read_waits_) jobs_changed_.notify_all();
  if (after) QueueRead(version);
}

// Its bytes are counted already.
void AdapterRegistry::Core::Admit(Version* version, std::shared_ptr<const Adapter> adapter) {
  version->adapter = std::move(adapter);
  ++stats_.in_host;
  SetCold(version);
  Emit(AdapterEvent::Kind::kInHost, "", version->record.id);
}

void AdapterRegistry::Core::CountRead(int64_t bytes, SteadyTime start) {
  ++stats_.reads;
  stats_.read_bytes += bytes;
  stats_.read_us += std::chrono::duration_cast<std::chrono::microseconds>(
                        std::chrono::steady_clock::now() - start)
                        .count();
}

void AdapterRegistry::Core::Evict(Version* version) {
  LK_CHECK(version->leases == 0 && version->adapter != nullptr);
  graveyard_.push_back(std::move(version->adapter));
  version->adapter = nullptr;
  CountHost(*version, -1);
  --stats_.in_host;
  ++stats_.evictions;
  SetCold(version);
  reaper_wakes_.notify_one();
  Emit(AdapterEvent::Kind::kEvicted, "", version->record.id);
}

void AdapterRegistry::Core::SetCold(Version* version) {
  const bool cold = version->adapter != nullptr && version->leases == 0 && version->pins == 0 &&
                    !version->retired;
  if (cold == version->is_cold) return;
  version->is_cold = cold;
  if (cold) {
    version->cold = cold_.insert(cold_.end(), version);
    if (read_waits_) jobs_changed_.notify_all();
  } else {
    cold_.erase(version->cold);
  }
}

void AdapterRegistry::Core::QueueRead(const VersionPtr& version) {
  if (version->reading || version->adapter != nullptr) return;
  version->reading = true;
  if (!version->record.source.empty() && options_.sources != nullptr) return FetchThenRead(version);
  jobs_.push_back({.version = version});
  jobs_changed_.notify_one();
}

// Reads it from where another name that leads to it was loaded from: those files may still have its
// bytes when the last place has not. False if there is no place that was not tried.
bool AdapterRegistry::Core::ReadElsewhere(const VersionPtr& version) {
  constexpr size_t kMostPlaces = 8;
  VersionRecord& record = version->record;
  version->tried.insert(record.location());
  if (version->tried.size() >= kMostPlaces) return false;
  for (const auto& [name, entry] : names_) {
    const auto leads_here = [&](const Target& target) { return target.version == version; };
    if (version->tried.contains(entry.location) ||
        std::ranges::none_of(entry.targets, leads_here)) {
      continue;
    }
    const bool remote = options_.sources != nullptr && AdapterSources::Takes(entry.location);
    Left(record.path);
    record.MoveTo(remote ? "" : entry.location, remote ? entry.location : "",
                  entry.origin == Origin::kOperator);
    version->reading = false;
    QueueRead(version);
    return true;
  }
  return false;
}

// The version that was asked for most often of those not in memory, if there is room as it is; one
// at a time, so that other loads find a thread.
bool AdapterRegistry::Core::QueueReadAhead() {
  if (const VersionPtr last = reading_ahead_.lock(); last != nullptr && last->reading) return false;
  if (read_ahead_.empty() && std::exchange(room_came_, false)) ListReadAhead();
  while (!read_ahead_.empty()) {
    const VersionPtr version = read_ahead_.back().lock();
    const bool wanted = version != nullptr && version->names > 0 && !version->reading &&
                        version->adapter == nullptr;
    if (wanted && HostBytes() > options_.host_bytes - version->record.bytes) return false;
    read_ahead_.pop_back();
    if (!wanted || tenants_[version->tenant].host_bytes >
                       HostBytesOf(version->tenant) - version->record.bytes) {
      continue;
    }
    reading_ahead_ = version;
    QueueRead(version);
    return true;
  }
  return false;
}

void AdapterRegistry::Core::ListReadAhead() {
  std::unordered_map<const Version*, int64_t> hits;
  for (const auto& [name, entry] : names_) {
    for (const Target& target : entry.targets) {
      if (target.version->adapter != nullptr || entry.hits == 0) continue;
      int64_t& of_version = hits[target.version.get()];
      if (of_version == 0) read_ahead_.push_back(target.version);
      of_version += entry.hits;
    }
  }
  std::ranges::sort(read_ahead_, {}, [&](const std::weak_ptr<Version>& version) {
    return hits.at(version.lock().get());
  });
}

}  // namespace lorikeet
