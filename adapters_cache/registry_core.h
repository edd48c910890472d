// The registry's inside: its tables, its threads, and the lock over them. No other folder includes
// this.
#pragma once

#include <condition_variable>
#include <deque>
#include <filesystem>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/registry.h"
#include "adapters_cache/registry_file.h"

namespace lorikeet {

class AdapterRegistry::Core : public std::enable_shared_from_this<AdapterRegistry::Core> {
 public:
  Core(const BaseModel& base, Options options) : base_(base), options_(std::move(options)) {}

  absl::Status Restore();  // from the state file, before Start
  void Start();
  void Stop();

  void Load(std::string name, std::filesystem::path path, LoadOptions options, LoadDone done);
  void Reload(const std::string& name, LoadDone done);
  void Unload(std::string_view name, std::chrono::microseconds drain, UnloadDone done);
  void Acquire(std::string_view name, LeaseDone done);
  void Prefetch(std::string_view name, std::function<void(absl::Status)> done);
  void SetPinned(std::string_view name, bool pinned, LoadDone done);
  void SetAlias(const std::string& alias, const std::vector<AdapterTarget>& targets,
                const std::string& tenant, LoadDone done);
  void TellIfUnused(const std::string& directory);
  std::unique_ptr<DiskRoom> DiskRoomFor(const std::string& name, const std::string& tenant);
  void SetDevice(DeviceTier* device);
  std::vector<AdapterInfo> List(const AdapterFilter& filter) const;
  absl::StatusOr<AdapterInfo> Get(std::string_view name) const;
  absl::StatusOr<std::string> Find(std::string_view name) const;
  bool MayAppear(std::string_view name) const;
  RegistryStats stats() const;
  std::unique_ptr<AdapterWatch> Watch(std::function<void()> wake);

 private:
  friend DiskRoom;
  using SteadyTime = std::chrono::steady_clock::time_point;
  struct Watcher;
  class WatchHandle;

  // An unload that waits for what its name alone led to.
  struct Drain {
    std::string name;
    SteadyTime deadline;
    UnloadDone done;  // empty once called
    UnloadResult result;
    absl::Status saved;
    int32_t in_use = 0;   // versions that requests hold
    int32_t leaving = 1;  // versions on their way out of host memory or of the device, the name on its
                          // way out of the state file

    SteadyTime End() const {  // when `done` is due
      if (leaving > 0) return SteadyTime::max();
      return in_use > 0 ? deadline : SteadyTime::min();
    }
  };

  struct Version {
    VersionRecord record;
    std::string tenant;  // whose share of host memory it takes: the first to load it
    std::shared_ptr<const Adapter> adapter;  // nullptr: not in host memory
    int32_t names = 0;                       // that lead here
    int64_t leases = 0;
    int32_t pins = 0;      // names that pin it
    bool reading = false;  // a job will bring it into host memory
    std::set<std::string> tried;  // locations that did not have its bytes, in this read
    bool retired = false;  // in `retired_`
    std::vector<LeaseDone> waiting;  // for that job
    std::vector<std::shared_ptr<Drain>> drains;
    std::list<Version*>::iterator cold{};  // its place in `cold_`, if it is there
    bool is_cold = false;
  };
  using VersionPtr = std::shared_ptr<Version>;

  struct Target {
    VersionPtr version;
    int32_t weight = 1;
  };
  // A directory of `owned`.
  struct Folder {
    int64_t bytes = 0;
    std::map<std::string, int32_t> names;  // that keep it, by tenant
  };
  using Folders = std::map<std::string, Folder>;
  using FolderAt = Folders::iterator;

  struct Name {
    std::vector<Target> targets;
    std::string location;             // that a reload reads
    Origin origin = Origin::kClient;  // of a reload
    bool kept = true;                 // in the state file
    std::string tenant;               // who brought it; empty: nobody in particular
    bool pinned = false;
    int64_t hits = 0;
    int64_t host_misses = 0;
    int64_t loaded_at_unix_us = 0;
    int64_t last_used_unix_us = 0;
    std::vector<FolderAt> folders;    // that it keeps
  };
  using Names = std::map<std::string, Name, std::less<>>;

  // What one has; no limit where the tenant is empty.
  struct Tenant {
    int32_t names = 0;
    int64_t host_bytes = 0;    // of versions in host memory and of reads under way
    int64_t pinned_bytes = 0;  // of versions with pins, there or not
    int64_t disk_bytes = 0;    // of folders that its names keep, and of rooms
  };

  // Registers a directory, or (`version` set) reads a version again, room for it taken.
  struct Job {
    VersionPtr version;
    std::string name;
    std::filesystem::path path;
    LoadOptions options;
    LoadDone done;
    std::string source;                // URL that `path` was fetched from
    std::shared_ptr<const void> hold;  // of `path`
  };
  struct Loaded {
    VersionRecord record;
    std::shared_ptr<const Adapter> adapter;
  };

  // ---- registry_sources.cc
  void FetchThenLoad(Job job);
  void OnFetched(Job job, const std::string& location,
                 const absl::StatusOr<FetchedAdapter>& fetched);
  void FetchThenRead(const VersionPtr& version);
  void OnFetchedAgain(const VersionPtr& version, const absl::StatusOr<FetchedAdapter>& fetched);
  bool IsWanted(std::string_view name) const;  // with mutex_ held: it is looked for on demand
  void AcquireOnDemand(const std::string& name, LeaseDone done);
  void LookFor(const std::string& name, size_t location);
  void EndSearch(const std::string& name, const absl::Status& status);

  // ---- registry_load.cc: loader threads
  void RunLoader();
  bool TakeJob(Job* job);
  void RunLoad(Job job);
  void RunRead(const Job& job);
  void EndRead(const VersionPtr& version, absl::StatusOr<Loaded> loaded, bool has_room = false);
  void BeginUse(const std::string& directory);
  void EndUse(const std::string& directory);
  absl::StatusOr<AdapterInfo> LoadNow(const Job& job, const std::filesystem::path& directory,
                                      Origin origin);
  absl::StatusOr<AdapterFiles> ReadFiles(const std::filesystem::path& directory,
                                         Origin origin) const;
  absl::StatusOr<AdapterFiles> ReadAgain(const Job& job) const;
  absl::StatusOr<Loaded> Build(AdapterFiles files, Origin origin) const;
  absl::Status CheckImage(const Job& job, const Adapter& adapter) const;
  absl::StatusOr<std::filesystem::path> ResolveDirectory(const std::filesystem::path& path,
                                                         Origin origin) const;
  std::filesystem::path FindRelative(const std::filesystem::path& path) const;

  // ---- registry_disk.cc
  bool IsOwned(const std::string& directory) const;
  void Measure(const std::string& directory);
  // With mutex_ held:
  void Forget(const std::string& directory);
  static std::set<std::string> DirectoriesOf(const std::vector<Target>& targets,
                                             const std::string& location);
  std::vector<FolderAt> FoldersOf(const std::set<std::string>& directories);
  void KeepFolders(Name* entry);
  void LeaveFolders(const std::vector<FolderAt>& folders, const std::string& tenant);
  int64_t BytesOfItsOwn(const Name& entry, const std::vector<FolderAt>& others) const;
  absl::Status CheckDisk(const std::string& tenant, int64_t more, int64_t less) const;
  absl::Status CheckKeeps(const std::string& name, const std::string& tenant,
                          const std::set<std::string>& directories, const DiskRoom* room);
  void GiveBack(DiskRoom* room);

  // ---- registry_state.cc: the saver's thread
  void RunSaver();
  void Save(std::unique_lock<std::mutex>& lock, bool all);
  absl::Status SaveAll(std::unique_lock<std::mutex>& lock);
  absl::Status LogChanges(std::unique_lock<std::mutex>& lock);
  void Change(const std::function<absl::StatusOr<AdapterInfo>()>& change, LoadDone done);

  // ---- all below: REQUIRES mutex_ is held
  void RestoreNames(const RegistryRecords& records);
  // Calls `done` on the saver's thread once what changed until now is in the state file, or when it
  // cannot be written. REQUIRES: it is not stopping_.
  void WhenSaved(std::function<void(const absl::Status&)> done);
  void OnSaved(const absl::Status& saved, int64_t generation, const std::set<std::string>& names);
  absl::StatusOr<bool> AlreadyNamed(const Job& job, const std::string& version) const;
  absl::StatusOr<AdapterInfo> Publish(const Job& job, Loaded loaded);
  void PointName(const std::string& name, std::vector<Target> targets, std::string location,
                 Origin origin, bool kept, const std::string& tenant);
  absl::Status CheckNames(const std::string& tenant) const;
  absl::StatusOr<AdapterInfo> Pin(std::string_view name, bool pinned);
  absl::StatusOr<AdapterInfo> PointAlias(const std::string& alias,
                                         const std::vector<AdapterTarget>& targets,
                                         const std::string& tenant);
  void DropTargets(const std::vector<Target>& targets, bool pinned,
                   const std::shared_ptr<Drain>& drain);
  // Something uses the directory no more.
  void Left(const std::string& directory);
  bool Uses(const std::string& directory) const;
  void QueueRead(const VersionPtr& version);
  bool ReadElsewhere(const VersionPtr& version);
  bool QueueReadAhead();
  void ListReadAhead();
  absl::Status CheckFits(const VersionRecord& record, const std::string& tenant, bool pinned) const;
  absl::Status CheckFits(const Version& version) const;
  bool MakeRoom(int64_t bytes);
  bool MakeTenantRoom(const Version& version);
  int64_t HostBytesOf(const std::string& tenant) const;
  void CountHost(const Version& version, int sign);
  int64_t HostBytes() const { return host_bytes_ + blobs_.bytes(); }
  void AddPins(const VersionPtr& version, int32_t pins);
  void Admit(Version* version, std::shared_ptr<const Adapter> adapter);
  void Evict(Version* version);
  void SetCold(Version* version);  // whether it may make room
  void CountRead(int64_t bytes, SteadyTime start);
  AdapterLease Lease(const VersionPtr& version);
  void OnLeaseDropped(Version* version, std::shared_ptr<const Adapter> adapter);
  void RetireIfUnused(const VersionPtr& version);
  int64_t DeviceBytes(const Version& version) const;
  AdapterInfo Describe(const std::string& name, const Name& entry) const;
  absl::StatusOr<const Name*> FindName(std::string_view name) const;
  RegistryRecords Records() const;
  void Record(const std::string& name, const Name& entry, RegistryRecords* records) const;
  void Changed(const std::string& name);
  void Emit(AdapterEvent::Kind kind, const std::string& name, const std::string& version);

  // ---- registry_reaper.cc
  void RunReaper();
  void FreeRetired(std::unique_lock<std::mutex>& lock);
  void OnFreed(const VersionPtr& version, int64_t device_bytes);
  void EndDrains(std::unique_lock<std::mutex>& lock);
  void ClearLeft(std::unique_lock<std::mutex>& lock);
  SteadyTime NextEnd() const;

  const BaseModel& base_;
  const Options options_;

  std::mutex device_mutex_;        // of calls to device_ without mutex_; taken before it
  DeviceTier* device_ = nullptr;   // changed under both

  mutable std::mutex mutex_;  // everything below
  std::condition_variable jobs_changed_;
  std::condition_variable reaper_wakes_;
  std::condition_variable saver_wakes_;
  bool stopping_ = false;
  int64_t generation_ = 0;               // of what is to be in the state file
  int64_t saved_generation_ = 0;         // of what is in it
  int64_t logged_ = 0;                   // names in its log
  std::set<std::string> changed_names_;  // since it was saved
  std::vector<std::function<void(const absl::Status&)>> unsaved_;  // who waits for that
  std::deque<Job> jobs_;
  size_t fetching_ = 0;  // loads whose files are on their way
  std::vector<std::weak_ptr<Version>> read_ahead_;  // asked for most often last
  std::weak_ptr<Version> reading_ahead_;
  bool room_came_ = false;                          // since read_ahead_ was made
  std::map<std::string, std::vector<LeaseDone>> wanted_;  // by name; looked for on demand
  std::unordered_map<std::string, SteadyTime> absent_until_;  // not looked for again before
  int64_t waiting_requests_ = 0;
  Names names_;
  std::unordered_map<std::string, VersionPtr> versions_;  // by id
  std::unordered_map<std::string, Tenant> tenants_;
  Folders folders_;                     // from their first load until they are removed
  std::multiset<std::string> coming_;   // names that rooms are for
  std::list<Version*> cold_;  // in host memory, neither leased nor pinned; longest unused first
  int64_t host_bytes_ = 0;      // of versions in host memory and of reads under way
  mutable SharedBlobs blobs_;   // that they have in common, besides
  int64_t pinned_bytes_ = 0;    // of versions with pins, there or not
  bool read_waits_ = false;     // for room
  std::multiset<std::string> loading_;  // directories that loads and reads read now
  std::map<std::string, int64_t> left_;  // owned directories, for the reaper, and generation_ then
  bool left_more_ = false;              // since it looked
  std::string clearing_;                // that on_unused is called for
  std::vector<VersionPtr> retired_;                       // for the reaper
  std::vector<std::shared_ptr<const Adapter>> graveyard_;  // for the reaper
  std::vector<std::shared_ptr<Drain>> drains_;            // with `done` still to be called
  std::vector<std::shared_ptr<Watcher>> watchers_;
  RegistryStats stats_;
  uint64_t next_choice_ = 0;  // of a target among several
  std::vector<std::thread> threads_;  // of Start and Stop
};

absl::Status RegistryShuttingDown();
std::string QuotedName(std::string_view name);
int64_t UnixMicros();

}  // namespace lorikeet
