#include "adapters_cache/registry.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <future>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/formats/problems.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
using SteadyTime = std::chrono::steady_clock::time_point;

int64_t UnixMicros() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

std::string Quoted(std::string_view name) {
  const std::string shown(name.substr(0, AdapterRegistry::kMaxNameBytes));
  return absl::StrCat("'", shown, "'");
}

absl::Status NotLoaded(std::string_view name) {
  return absl::NotFoundError("adapter " + Quoted(name) + " is not loaded");
}

absl::Status ShuttingDown() { return absl::CancelledError("the server is shutting down"); }

// An adapter under one name. `handle` points to the same Adapter; its copies are the leases, and
// its deleter, which owns the entry, says when the last one is gone. The cycle ends when the entry
// gives its handle up.
struct Entry {
  AdapterInfo info;
  std::shared_ptr<const Adapter> adapter;
  std::shared_ptr<const Adapter> handle;
};

// An entry that lost its name.
struct Draining {
  std::shared_ptr<Entry> entry;
  SteadyTime deadline;
  AdapterRegistry::UnloadDone done;  // empty once called
  bool unused = false;               // its last lease is gone
};

struct LoadJob {
  std::string name;
  fs::path path;
  AdapterRegistry::Origin origin;
  AdapterRegistry::LoadDone done;
};

}  // namespace

absl::Status ValidateAdapterName(std::string_view name, std::string_view base_name) {
  const auto letter_or_digit = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
  };
  if (name.empty()) return absl::InvalidArgumentError("the adapter's name is empty");
  if (name.size() > AdapterRegistry::kMaxNameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the adapter's name has ", name.size(),
                                                   " bytes; at most ",
                                                   AdapterRegistry::kMaxNameBytes));
  }
  if (!letter_or_digit(name.front())) {
    return absl::InvalidArgumentError("the adapter's name must begin with a letter or digit");
  }
  for (size_t i = 0; i < name.size(); ++i) {
    if (letter_or_digit(name[i]) ||
        std::string_view("._-:/@+").find(name[i]) != std::string_view::npos) {
      continue;
    }
    return absl::InvalidArgumentError(absl::StrCat("byte ", i,
                                                   " of the adapter's name is none of A-Z a-z 0-9 "
                                                   ". _ - : / @ +"));
  }
  if (name == base_name) {
    return absl::InvalidArgumentError(Quoted(name) + " is the base model's name");
  }
  return absl::OkStatus();
}

class AdapterRegistry::Core : public std::enable_shared_from_this<AdapterRegistry::Core> {
 public:
  Core(const BaseModel& base, Options options) : base_(base), options_(std::move(options)) {}

  void Start() {
    for (int i = 0; i < std::max(1, options_.loader_threads); ++i) {
      threads_.emplace_back([this] { RunLoader(); });
    }
    threads_.emplace_back([this] { RunReaper(); });
  }
  void Stop();
  const std::string& base_name() const { return options_.base_name; }

  void Enqueue(LoadJob job);
  void Unload(std::string_view name, std::chrono::microseconds drain, UnloadDone done);
  absl::StatusOr<AdapterLease> Acquire(std::string_view name);
  std::vector<AdapterInfo> List() const;
  absl::StatusOr<AdapterInfo> Get(std::string_view name) const;

 private:
  void RunLoader();
  void RunReaper();

  absl::StatusOr<AdapterInfo> Load(const LoadJob& job);
  absl::StatusOr<fs::path> ResolveDirectory(const fs::path& path, Origin origin) const;
  fs::path FindRelative(const fs::path& path) const;
  // The entry's description if `name` is taken by `version`; an error if by another. REQUIRES:
  // mutex_ is held.
  absl::StatusOr<std::optional<AdapterInfo>> FindNamed(const std::string& name,
                                                       const std::string& version) const;
  absl::StatusOr<AdapterInfo> Publish(AdapterInfo info, std::shared_ptr<const Adapter> adapter);
  static AdapterInfo Describe(const Entry& entry);
  void OnUnused(const Entry* entry);
  absl::StatusOr<UnloadResult> Free(std::shared_ptr<Entry> entry);

  const BaseModel& base_;
  const Options options_;

  mutable std::mutex mutex_;  // everything below
  std::condition_variable loads_changed_;
  std::condition_variable draining_changed_;
  bool stopping_ = false;
  std::deque<LoadJob> jobs_;
  std::map<std::string, std::shared_ptr<Entry>, std::less<>> entries_;
  std::map<std::string, std::weak_ptr<const Adapter>> by_version_;
  std::vector<Draining> draining_;
  std::vector<std::thread> threads_;  // of Start and Stop
};

// ---- loading

void AdapterRegistry::Core::Enqueue(LoadJob job) {
  absl::Status refused;
  {
    std::lock_guard lock(mutex_);
    if (stopping_) {
      refused = ShuttingDown();
    } else if (jobs_.size() >= kMaxPendingLoads) {
      refused = absl::ResourceExhaustedError(
          absl::StrCat(jobs_.size(), " adapter loads are waiting; at most ", kMaxPendingLoads));
    } else {
      jobs_.push_back(std::move(job));
    }
  }
  if (!refused.ok()) return job.done(refused);
  loads_changed_.notify_one();
}

void AdapterRegistry::Core::RunLoader() {
  while (true) {
    LoadJob job;
    {
      std::unique_lock lock(mutex_);
      loads_changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (stopping_) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job.done(Load(job));
  }
}

absl::StatusOr<AdapterInfo> AdapterRegistry::Core::Load(const LoadJob& job) {
  LK_ASSIGN_OR_RETURN(const fs::path directory, ResolveDirectory(job.path, job.origin));
  std::span<const fs::path> roots = options_.allowed_roots;
  if (job.origin == Origin::kOperator) roots = {};
  LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadAdapterFiles(directory, roots));
  {
    std::lock_guard lock(mutex_);
    LK_ASSIGN_OR_RETURN(const auto named, FindNamed(job.name, files.version));
    if (named.has_value()) return *named;
  }

  Problems problems;
  const RawAdapter raw = ParseAdapter(std::move(files), &problems);
  LK_RETURN_IF_ERROR(problems.ToStatus());
  AdapterInfo info{.name = job.name,
                   .version = raw.version,
                   .variant = raw.variant,
                   .path = directory.string(),
                   .warnings = raw.warnings};
  std::shared_ptr<const Adapter> adapter;
  {
    std::lock_guard lock(mutex_);
    const auto known = by_version_.find(raw.version);
    if (known != by_version_.end()) adapter = known->second.lock();
  }
  if (adapter == nullptr) {
    LK_ASSIGN_OR_RETURN(adapter, Normalise(raw, base_, {options_.precision, options_.allow_dense}));
  }
  return Publish(std::move(info), std::move(adapter));
}

absl::StatusOr<fs::path> AdapterRegistry::Core::ResolveDirectory(const fs::path& path,
                                                                 Origin origin) const {
  if (path.empty() || path.native().find('\0') != std::string::npos) {
    return absl::InvalidArgumentError("the adapter's path is empty or holds a zero byte");
  }
  std::error_code error;
  fs::path real;
  if (origin == Origin::kOperator || path.is_absolute()) {
    real = fs::weakly_canonical(path, error);
  } else {
    real = FindRelative(path);
  }
  if (origin == Origin::kClient && !IsUnder(real, options_.allowed_roots)) {
    std::string roots;
    for (const fs::path& root : options_.allowed_roots) absl::StrAppend(&roots, " ", root.string());
    return absl::PermissionDeniedError(absl::StrCat(path.string(), " is outside the allowed roots:",
                                                    roots.empty() ? " there are none" : roots));
  }
  if (error || !fs::is_directory(real, error)) {
    return absl::NotFoundError(absl::StrCat(path.string(), " is not a directory"));
  }
  return real;
}

// Below the first root that has it, else in the working directory. A path that is nowhere is taken
// for one below the last root.
fs::path AdapterRegistry::Core::FindRelative(const fs::path& path) const {
  std::error_code error;
  fs::path real;
  for (const fs::path& root : options_.allowed_roots) {
    real = fs::weakly_canonical(root / path, error);
    if (fs::is_directory(real, error)) return real;
  }
  const fs::path here = fs::weakly_canonical(path, error);
  const bool allowed = IsUnder(here, options_.allowed_roots) && fs::is_directory(here, error);
  return allowed ? here : real;
}

absl::StatusOr<std::optional<AdapterInfo>> AdapterRegistry::Core::FindNamed(
    const std::string& name, const std::string& version) const {
  const auto it = entries_.find(name);
  if (it == entries_.end()) return std::nullopt;
  if (it->second->info.version == version) return Describe(*it->second);
  return absl::AlreadyExistsError(absl::StrCat("adapter ", Quoted(name), " is loaded with version ",
                                               it->second->info.version, ", not ", version,
                                               "; unload it first or choose another name"));
}

absl::StatusOr<AdapterInfo> AdapterRegistry::Core::Publish(AdapterInfo info,
                                                           std::shared_ptr<const Adapter> adapter) {
  std::shared_ptr<const Adapter> surplus;  // freed after the lock
  std::lock_guard lock(mutex_);
  if (stopping_) return ShuttingDown();
  // Another load of the same may have been faster.
  LK_ASSIGN_OR_RETURN(const auto named, FindNamed(info.name, info.version));
  if (named.has_value()) return *named;
  std::weak_ptr<const Adapter>& known = by_version_[info.version];
  if (auto shared = known.lock(); shared != nullptr) surplus = std::exchange(adapter, shared);
  known = adapter;

  info.min_rank = std::numeric_limits<int32_t>::max();
  for (const ModuleDelta& module : adapter->modules) {
    if (module.empty()) continue;
    ++info.modules;
    info.min_rank = std::min(info.min_rank, module.low_rank.rank);
  }
  info.max_rank = adapter->max_rank;
  info.bytes = adapter->bytes;
  info.loaded_at_unix_us = UnixMicros();
  auto entry = std::make_shared<Entry>(Entry{std::move(info), adapter, nullptr});
  entry->handle = std::shared_ptr<const Adapter>(
      adapter.get(),
      [core = shared_from_this(), entry](const Adapter*) { core->OnUnused(entry.get()); });
  entries_.emplace(entry->info.name, entry);
  return Describe(*entry);
}

// ---- leases

absl::StatusOr<AdapterLease> AdapterRegistry::Core::Acquire(std::string_view name) {
  std::lock_guard lock(mutex_);
  const auto it = entries_.find(name);
  if (it == entries_.end()) return NotLoaded(name);
  ++it->second->info.hits;
  it->second->info.last_used_unix_us = UnixMicros();
  return AdapterLease(it->second->handle);
}

AdapterInfo AdapterRegistry::Core::Describe(const Entry& entry) {
  AdapterInfo info = entry.info;
  info.leases = entry.handle.use_count() - 1;
  return info;
}

std::vector<AdapterInfo> AdapterRegistry::Core::List() const {
  std::lock_guard lock(mutex_);
  std::vector<AdapterInfo> all;
  for (const auto& [name, entry] : entries_) all.push_back(Describe(*entry));
  return all;
}

absl::StatusOr<AdapterInfo> AdapterRegistry::Core::Get(std::string_view name) const {
  std::lock_guard lock(mutex_);
  const auto it = entries_.find(name);
  if (it == entries_.end()) return NotLoaded(name);
  return Describe(*it->second);
}

// ---- unloading

void AdapterRegistry::Core::Unload(std::string_view name, std::chrono::microseconds drain,
                                   UnloadDone done) {
  // Never more than a day, so that the deadline cannot overflow.
  drain = std::clamp<std::chrono::microseconds>(drain, std::chrono::microseconds(0),
                                                std::chrono::hours(24));
  std::shared_ptr<const Adapter> handle;
  std::shared_ptr<Entry> entry;
  absl::Status refused;
  {
    std::lock_guard lock(mutex_);
    const auto it = entries_.find(name);
    if (stopping_) {
      refused = ShuttingDown();
    } else if (it == entries_.end()) {
      refused = NotLoaded(name);
    } else {
      entry = it->second;
      handle = std::move(it->second->handle);
      draining_.push_back({entry, SteadyTime::max(), std::move(done)});
      entries_.erase(it);
    }
  }
  if (!refused.ok()) return done(refused);
  handle.reset();  // without leases, OnUnused runs here, before any deadline counts
  std::lock_guard lock(mutex_);
  for (Draining& draining : draining_) {
    if (draining.entry == entry) draining.deadline = std::chrono::steady_clock::now() + drain;
  }
  draining_changed_.notify_one();
}

// The last lease of an entry without a name is gone: whoever dropped it only signals.
void AdapterRegistry::Core::OnUnused(const Entry* entry) {
  std::lock_guard lock(mutex_);
  for (Draining& draining : draining_) {
    if (draining.entry.get() == entry) draining.unused = true;
  }
  draining_changed_.notify_one();
}

absl::StatusOr<UnloadResult> AdapterRegistry::Core::Free(std::shared_ptr<Entry> entry) {
  UnloadResult result{.version = entry->info.version};
  std::shared_ptr<const Adapter> adapter;
  {
    // Every copy of Entry::adapter is made under the mutex, so the count is exact.
    std::lock_guard lock(mutex_);
    adapter = std::move(entry->adapter);
    if (adapter.use_count() == 1) {
      result.bytes_freed = adapter->bytes;
      by_version_.erase(result.version);
    }
  }
  adapter.reset();
  return result;
}

void AdapterRegistry::Core::RunReaper() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const auto now = std::chrono::steady_clock::now();
    const auto due = std::find_if(draining_.begin(), draining_.end(), [now](const Draining& d) {
      return d.unused || (d.done && d.deadline <= now);
    });
    if (due != draining_.end()) {
      UnloadDone done = std::exchange(due->done, nullptr);
      absl::StatusOr<UnloadResult> result = absl::DeadlineExceededError(
          absl::StrCat("adapter ", Quoted(due->entry->info.name),
                       " is still in use; its name is gone and its memory follows"));
      std::shared_ptr<Entry> freed;
      if (due->unused) {
        freed = std::move(due->entry);
        draining_.erase(due);
      }
      lock.unlock();
      if (freed != nullptr) result = Free(std::move(freed));
      if (done) done(std::move(result));
      lock.lock();
      continue;
    }
    SteadyTime next = SteadyTime::max();
    for (const Draining& draining : draining_) {
      if (draining.done) next = std::min(next, draining.deadline);
    }
    if (next == SteadyTime::max()) {
      draining_changed_.wait(lock);
    } else {
      draining_changed_.wait_until(lock, next);
    }
  }
}

void AdapterRegistry::Core::Stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  loads_changed_.notify_all();
  draining_changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  decltype(jobs_) jobs;
  decltype(draining_) draining;
  decltype(entries_) entries;
  {
    std::lock_guard lock(mutex_);
    jobs.swap(jobs_);
    draining.swap(draining_);
    entries.swap(entries_);
  }
  for (auto& [name, entry] : entries) std::exchange(entry->handle, nullptr).reset();
  for (LoadJob& job : jobs) job.done(ShuttingDown());
  for (Draining& d : draining) {
    if (d.done) d.done(ShuttingDown());
  }
}

// ---- the registry itself

AdapterRegistry::AdapterRegistry(std::shared_ptr<Core> core) : core_(std::move(core)) {}

AdapterRegistry::~AdapterRegistry() { core_->Stop(); }

absl::StatusOr<std::unique_ptr<AdapterRegistry>> AdapterRegistry::Create(const BaseModel& base,
                                                                         Options options) {
  for (fs::path& root : options.allowed_roots) {
    std::error_code error;
    const fs::path real = fs::canonical(root, error);
    if (error || !fs::is_directory(real, error)) {
      return absl::NotFoundError(
          absl::StrCat("adapter root ", root.string(), " is not a directory"));
    }
    root = real;
  }
  auto core = std::make_shared<Core>(base, std::move(options));
  core->Start();
  return std::unique_ptr<AdapterRegistry>(new AdapterRegistry(std::move(core)));
}

void AdapterRegistry::LoadAsync(std::string name, fs::path path, Origin origin, LoadDone done) {
  const absl::Status valid = ValidateAdapterName(name, core_->base_name());
  if (!valid.ok()) return done(valid);
  core_->Enqueue({std::move(name), std::move(path), origin, std::move(done)});
}

void AdapterRegistry::UnloadAsync(std::string_view name, std::chrono::microseconds drain,
                                  UnloadDone done) {
  core_->Unload(name, drain, std::move(done));
}

// The promises below are shared: set_value may still touch its promise when the waiter is back.
absl::StatusOr<AdapterInfo> AdapterRegistry::Load(std::string name, fs::path path, Origin origin) {
  auto result = std::make_shared<std::promise<absl::StatusOr<AdapterInfo>>>();
  LoadAsync(std::move(name), std::move(path), origin,
            [result](absl::StatusOr<AdapterInfo> info) { result->set_value(std::move(info)); });
  return result->get_future().get();
}

absl::StatusOr<UnloadResult> AdapterRegistry::Unload(std::string_view name,
                                                     std::chrono::microseconds drain) {
  auto result = std::make_shared<std::promise<absl::StatusOr<UnloadResult>>>();
  UnloadAsync(name, drain, [result](absl::StatusOr<UnloadResult> freed) {
    result->set_value(std::move(freed));
  });
  return result->get_future().get();
}

absl::StatusOr<AdapterLease> AdapterRegistry::Acquire(std::string_view name) {
  return core_->Acquire(name);
}
std::vector<AdapterInfo> AdapterRegistry::List() const { return core_->List(); }
absl::StatusOr<AdapterInfo> AdapterRegistry::Get(std::string_view name) const {
  return core_->Get(name);
}

}  // namespace lorikeet
