// Adapters from elsewhere, and names that are looked for when they are first asked for.
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/registry_core.h"

namespace lorikeet {
namespace {

// A name that was not found is not looked for again so soon.
constexpr std::chrono::seconds kAbsentFor{10};
constexpr size_t kMostAbsent = 4096;

}  // namespace

// ---- fetching

void AdapterRegistry::Core::FetchThenLoad(Job job) {
  const std::string location = job.path.string();
  const std::string tenant = job.options.tenant;
  options_.sources->FetchAsync(
      location, {}, tenant,
      [core = shared_from_this(), job = std::move(job),
       location](const absl::StatusOr<FetchedAdapter>& fetched) mutable {
        core->OnFetched(std::move(job), location, fetched);
      });
}

void AdapterRegistry::Core::OnFetched(Job job, const std::string& location,
                                      const absl::StatusOr<FetchedAdapter>& fetched) {
  absl::Status failed = fetched.status();
  {
    std::lock_guard lock(mutex_);
    --fetching_;
    if (stopping_) failed = RegistryShuttingDown();
    if (failed.ok()) {
      job.source = location;
      job.path = fetched->directory;
      job.hold = fetched->hold;
      jobs_.push_back(std::move(job));
    }
  }
  if (!failed.ok()) return job.done(failed);
  jobs_changed_.notify_one();
}

// With the lock. The files may have left the disk cache since.
void AdapterRegistry::Core::FetchThenRead(const VersionPtr& version) {
  options_.sources->FetchAsync(
      version->record.source, version->record.path, version->tenant,
      [core = shared_from_this(), version](const absl::StatusOr<FetchedAdapter>& fetched) {
        core->OnFetchedAgain(version, fetched);
      });
}

void AdapterRegistry::Core::OnFetchedAgain(const VersionPtr& version,
                                           const absl::StatusOr<FetchedAdapter>& fetched) {
  if (!fetched.ok()) return EndRead(version, fetched.status());
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return;  // Stop has told those who waited
    version->record.path = fetched->directory.string();
    jobs_.push_back({.version = version, .hold = fetched->hold});
  }
  jobs_changed_.notify_one();
}

// ---- on demand

bool AdapterRegistry::Core::MayAppear(std::string_view name) const {
  std::lock_guard lock(mutex_);
  return IsWanted(name);
}

bool AdapterRegistry::Core::IsWanted(std::string_view name) const {
  if (options_.on_demand.empty() || !IsPlainPath(name) ||
      !ValidateAdapterName(name, options_.base_name).ok()) {
    return false;
  }
  const auto absent = absent_until_.find(std::string(name));
  return absent == absent_until_.end() || absent->second <= std::chrono::steady_clock::now();
}

// Whoever asks for a name first has it looked for; the others wait for that.
void AdapterRegistry::Core::AcquireOnDemand(const std::string& name, LeaseDone done) {
  {
    std::lock_guard lock(mutex_);
    std::vector<LeaseDone>& waiting = wanted_[name];
    waiting.push_back(std::move(done));
    ++waiting_requests_;
    if (waiting.size() > 1) return;
  }
  LookFor(name, 0);
}

void AdapterRegistry::Core::LookFor(const std::string& name, size_t location) {
  const std::string path = absl::StrCat(options_.on_demand[location], "/", name);
  Load(name, path, {.keep = false},
       [core = shared_from_this(), name, location](const absl::StatusOr<AdapterInfo>& info) {
         if (absl::IsAlreadyExists(info.status())) return core->EndSearch(name, absl::OkStatus());
         const bool absent = absl::IsNotFound(info.status());
         if (absent && location + 1 < core->options_.on_demand.size()) {
           return core->LookFor(name, location + 1);
         }
         core->EndSearch(name, absent ? AdapterNotLoaded(name) : info.status());
       });
}

void AdapterRegistry::Core::EndSearch(const std::string& name, const absl::Status& status) {
  std::vector<LeaseDone> waiting;
  {
    std::lock_guard lock(mutex_);
    waiting = std::move(wanted_[name]);
    wanted_.erase(name);
    waiting_requests_ -= static_cast<int64_t>(waiting.size());
    if (absl::IsNotFound(status)) {
      if (absent_until_.size() >= kMostAbsent) absent_until_.clear();
      absent_until_[name] = std::chrono::steady_clock::now() + kAbsentFor;
    }
  }
  for (LeaseDone& done : waiting) {
    if (status.ok()) {
      Acquire(name, std::move(done));
    } else {
      done(status);
    }
  }
}

}  // namespace lorikeet
