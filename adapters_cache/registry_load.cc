// Loader threads: from directories to adapters in host memory.
#include <algorithm>
#include <limits>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/registry_core.h"
#include "adapters_cache/token_tables.h"
#include "engine/base/status_macros.h"

namespace lorikeet {

namespace fs = std::filesystem;

void AdapterRegistry::Core::RunLoader() {
  for (Job job; TakeJob(&job);) {
    if (job.version != nullptr) {
      RunRead(job);
    } else {
      RunLoad(std::move(job));
    }
    job = Job();
  }
}

// The first job that can run: a read waits for room in host memory, and later reads wait behind
// it, unless its tenant's share alone is full: then those of that tenant. False at the end.
bool AdapterRegistry::Core::TakeJob(Job* job) {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    bool full = false;
    std::set<std::string> full_tenants;
    read_waits_ = false;
    for (auto it = jobs_.begin(); it != jobs_.end(); ++it) {
      if (it->version != nullptr) {
        const Version& version = *it->version;
        const VersionRecord& record = version.record;
        if (CheckFits(version).ok()) {
          const bool tenant_full =
              full_tenants.contains(version.tenant) || !MakeTenantRoom(version);
          if (tenant_full) full_tenants.insert(version.tenant);
          full = full || (!tenant_full && !MakeRoom(record.bytes));
          read_waits_ = read_waits_ || full || tenant_full;
          if (full || tenant_full) continue;
        }
        CountHost(version, 1);
        it->path = record.path;
        loading_.insert(record.path);
        it->options.origin = record.any_path ? Origin::kOperator : Origin::kClient;
      }
      *job = std::move(*it);
      jobs_.erase(it);
      return true;
    }
    if (jobs_.empty() && QueueReadAhead()) continue;
    jobs_changed_.wait(lock);
  }
  return false;
}

void AdapterRegistry::Core::RunLoad(Job job) {
  const Origin origin = job.source.empty() ? job.options.origin : Origin::kOperator;
  const absl::StatusOr<fs::path> directory = ResolveDirectory(job.path, origin);
  if (!directory.ok()) return job.done(directory.status());
  BeginUse(*directory);
  Measure(*directory);
  const absl::StatusOr<AdapterInfo> info = LoadNow(job, *directory, origin);
  Change([&] { return info; }, std::move(job.done));
  EndUse(*directory);
}

// What is read when its last user has just left stays until the load has ended; what is being
// removed is waited for.
void AdapterRegistry::Core::BeginUse(const std::string& directory) {
  std::unique_lock lock(mutex_);
  jobs_changed_.wait(lock, [&] { return clearing_ != directory; });
  loading_.insert(directory);
}

void AdapterRegistry::Core::EndUse(const std::string& directory) {
  std::lock_guard lock(mutex_);
  loading_.erase(loading_.find(directory));
  Left(directory);
}

absl::StatusOr<AdapterInfo> AdapterRegistry::Core::LoadNow(const Job& job,
                                                           const fs::path& directory,
                                                           Origin origin) {
  const SteadyTime start = std::chrono::steady_clock::now();
  LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadFiles(directory, origin));
  if (!job.options.version.empty() && files.version != job.options.version) {
    return absl::DataLossError(absl::StrCat(job.source.empty() ? directory.string() : job.source,
                                            " has version ", files.version, ", not ",
                                            job.options.version));
  }
  {
    std::lock_guard lock(mutex_);
    LK_ASSIGN_OR_RETURN(const bool named, AlreadyNamed(job, files.version));
    const auto known = versions_.find(files.version);
    if (known != versions_.end()) {
      const bool any_path = origin == Origin::kOperator;
      VersionRecord record = known->second->record;
      record.MoveTo(directory.string(), job.source, any_path);
      // Read again from where it surely is.
      if (known->second->adapter == nullptr) {
        Left(known->second->record.path);
        known->second->record.MoveTo(record.path, record.source, any_path);
      }
      if (!named) return Publish(job, {.record = record});
      Name& entry = names_.find(job.name)->second;
      entry.location = record.location();
      entry.origin = job.options.origin;
      if (entry.kept) Changed(job.name);
      if (job.options.room != nullptr) GiveBack(job.options.room);
      KeepFolders(&entry);
      return job.options.pin ? Pin(job.name, true) : Describe(job.name, entry);
    }
  }
  LK_ASSIGN_OR_RETURN(Loaded loaded, Build(std::move(files), origin));
  loaded.record.source = job.source;
  const int64_t most = std::min(options_.host_bytes, HostBytesOf(job.options.tenant));
  if (loaded.record.bytes > most) {
    return absl::ResourceExhaustedError(
        absl::StrCat("adapter ", QuotedName(job.name), " has ", loaded.record.bytes,
                     " bytes; host memory for adapters has ", most,
                     most < options_.host_bytes ? " for one tenant" : ""));
  }
  LK_RETURN_IF_ERROR(CheckImage(job, *loaded.adapter));
  std::lock_guard lock(mutex_);
  CountRead(loaded.record.bytes, start);
  return Publish(job, std::move(loaded));
}

absl::Status AdapterRegistry::Core::CheckImage(const Job& job, const Adapter& adapter) const {
  const std::string& tenant = job.options.tenant;
  if (tenant.empty() || options_.images == nullptr) return absl::OkStatus();
  LK_ASSIGN_OR_RETURN(const ImageSize own, options_.images->Size(adapter));
  int64_t pages = own.most_pages();
  if (adapter.shared != nullptr) {
    LK_ASSIGN_OR_RETURN(const ImageSize shared, options_.images->Size(*adapter.shared));
    pages += shared.most_pages();
  }
  if (pages <= options_.tenant_image_pages) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("adapter ", QuotedName(job.name), " takes ", pages,
                   " pages of the device; its tenant '", tenant, "' has ",
                   options_.tenant_image_pages));
}

// Whether the name leads to `version` alone already; an error if it may not lead there.
absl::StatusOr<bool> AdapterRegistry::Core::AlreadyNamed(const Job& job,
                                                         const std::string& version) const {
  const auto it = names_.find(job.name);
  if (it == names_.end()) {
    LK_RETURN_IF_ERROR(CheckNames(job.options.tenant));
    return false;
  }
  const std::vector<Target>& targets = it->second.targets;
  const std::string& current = targets.front().version->record.id;
  if (targets.size() == 1 && current == version) return true;
  if (job.options.replace) return false;
  return absl::AlreadyExistsError(absl::StrCat("adapter ", QuotedName(job.name),
                                               " is loaded with version ", current, ", not ",
                                               version, "; reload it, or unload it first"));
}

absl::StatusOr<AdapterFiles> AdapterRegistry::Core::ReadFiles(const fs::path& directory,
                                                              Origin origin) const {
  std::span<const fs::path> roots = options_.allowed_roots;
  if (origin == Origin::kOperator) roots = {};
  return ReadAdapterFiles(directory, roots);
}

absl::StatusOr<AdapterRegistry::Core::Loaded> AdapterRegistry::Core::Build(AdapterFiles files,
                                                                           Origin origin) const {
  const std::string path = files.directory.string();
  const auto text = std::move(files.text);
  Problems problems;
  const RawAdapter raw = ParseAdapter(std::move(files), &problems);
  LK_RETURN_IF_ERROR(problems.ToStatus());
  Loaded loaded;
  NormaliseOptions normalise{options_.precision, options_.allow_dense, options_.on_host, nullptr,
                             &blobs_};
  std::vector<std::string> warnings = raw.warnings;
  normalise.warnings = &warnings;
  if (options_.read_text && !text.empty()) {
    LK_ASSIGN_OR_RETURN(const int32_t vocab, VocabularyOf(raw, base_));
    LK_ASSIGN_OR_RETURN(normalise.text, options_.read_text(text, path, vocab));
  }
  LK_ASSIGN_OR_RETURN(loaded.adapter, Normalise(raw, base_, normalise));
  VersionRecord& record = loaded.record;
  record = {.id = raw.version,
            .variant = raw.variant,
            .path = path,
            .any_path = origin == Origin::kOperator,
            .min_rank = std::numeric_limits<int32_t>::max(),
            .max_rank = loaded.adapter->max_rank,
            .bytes = loaded.adapter->bytes,
            .warnings = std::move(warnings)};
  for (const ModuleDelta& module : loaded.adapter->modules) {
    if (module.empty()) continue;
    ++record.modules;
    record.min_rank = std::min(record.min_rank, module.low_rank.rank);
  }
  return loaded;
}

absl::StatusOr<AdapterInfo> AdapterRegistry::Core::Publish(const Job& job, Loaded loaded) {
  if (stopping_) return RegistryShuttingDown();
  // Another load may have been faster.
  LK_ASSIGN_OR_RETURN(const bool named, AlreadyNamed(job, loaded.record.id));
  if (!named) {
    std::string location = loaded.record.location();
    const auto known = versions_.find(loaded.record.id);
    const VersionRecord& record = known != versions_.end() ? known->second->record : loaded.record;
    LK_RETURN_IF_ERROR(CheckKeeps(job.name, job.options.tenant, {location, record.path},
                                  job.options.room));
    if (job.options.pin) {
      LK_RETURN_IF_ERROR(known != versions_.end()
                             ? CheckFits(*known->second)
                             : CheckFits(loaded.record, job.options.tenant, /*pinned=*/false));
    }
    VersionPtr& version = versions_[loaded.record.id];
    if (version == nullptr) {
      version = std::make_shared<Version>();
      version->record = std::move(loaded.record);
      version->tenant = job.options.tenant;
    }
    if (version->adapter == nullptr && loaded.adapter != nullptr && !version->reading &&
        MakeTenantRoom(*version) && MakeRoom(version->record.bytes)) {
      CountHost(*version, 1);
      Admit(version.get(), std::move(loaded.adapter));
    }
    if (job.options.room != nullptr) GiveBack(job.options.room);
    PointName(job.name, {{version, 1}}, std::move(location), job.options.origin, job.options.keep,
              job.options.tenant);
  }
  if (loaded.adapter != nullptr) graveyard_.push_back(std::move(loaded.adapter));
  reaper_wakes_.notify_one();
  return job.options.pin ? Pin(job.name, true)
                         : Describe(job.name, names_.find(job.name)->second);
}

absl::StatusOr<AdapterFiles> AdapterRegistry::Core::ReadAgain(const Job& job) const {
  const VersionRecord& record = job.version->record;
  {
    std::lock_guard lock(mutex_);
    LK_RETURN_IF_ERROR(CheckFits(*job.version));
  }
  LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadFiles(job.path, job.options.origin));
  if (files.version == record.id) return files;
  return absl::DataLossError(absl::StrCat(job.path.string(), " has version ", files.version,
                                          " by now, not ", record.id, "; reload the adapter"));
}

// Room for it is taken already.
void AdapterRegistry::Core::RunRead(const Job& job) {
  const SteadyTime start = std::chrono::steady_clock::now();
  const auto read = [&]() -> absl::StatusOr<Loaded> {
    LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadAgain(job));
    return Build(std::move(files), job.options.origin);
  };
  absl::StatusOr<Loaded> loaded = read();
  if (loaded.ok()) {
    std::lock_guard lock(mutex_);
    CountRead(loaded->record.bytes, start);
  }
  EndRead(job.version, std::move(loaded), /*has_room=*/true);
  EndUse(job.path);
}

void AdapterRegistry::Core::EndRead(const VersionPtr& version, absl::StatusOr<Loaded> loaded,
                                    bool has_room) {
  std::vector<LeaseDone> waiting;
  std::vector<absl::StatusOr<AdapterLease>> leases;
  {
    std::lock_guard lock(mutex_);
    if (!loaded.ok() && has_room) CountHost(*version, -1);
    jobs_changed_.notify_all();
    const bool misplaced = !loaded.ok() && !absl::IsResourceExhausted(loaded.status());
    if (misplaced && !stopping_ && ReadElsewhere(version)) return;
    version->tried.clear();
    version->reading = false;
    waiting.swap(version->waiting);
    waiting_requests_ -= static_cast<int64_t>(waiting.size());
    if (loaded.ok()) {
      Admit(version.get(), std::move(loaded->adapter));
    } else {
      ++stats_.read_failures;
    }
    for (size_t i = 0; i < waiting.size(); ++i) {
      leases.push_back(loaded.ok() ? absl::StatusOr<AdapterLease>(Lease(version))
                                   : loaded.status());
    }
    RetireIfUnused(version);
  }
  for (size_t i = 0; i < waiting.size(); ++i) waiting[i](std::move(leases[i]));
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

}  // namespace lorikeet
