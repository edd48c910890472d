// The adapters a server knows by name: reads them into host memory, hands out leases, takes them
// away once nobody uses them.
//
// Identity: an adapter's version is the SHA-256 of its configuration and tensors (formats/
// raw_adapter.h). Names lead to versions; equal bytes under two names are one Adapter in memory, and
// a version never means other weights. Requests hold versions: what happens to a name changes
// nothing for those that run.
//
// Host tier: registered versions are in memory as far as `host_bytes` goes. What is neither leased
// nor pinned makes room, the one used longest ago first, and is read again when it is asked for;
// its files must then still have the bytes of its version. Where there is room and nothing else to
// do, what was asked for most often is read ahead: after a restart, and when others have gone.
//
// Threads: files are read and adapters built on loader threads; adapters are freed on a thread of
// their own, and the state file is written on another. Everything else holds a mutex for a few
// look-ups and never waits for a disk; the
// thread that drops the last lease (often the engine's) frees nothing, it only signals.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/adapter_sources.h"
#include "adapters_cache/normalise.h"
#include "engine/api/adapter_images.h"
#include "engine/api/adapter_store.h"
#include "engine/api/base_model.h"
#include "engine/api/device_tier.h"

namespace lorikeet {

// A version that a name leads to, with the share of its requests.
struct AdapterTarget {
  std::string version;  // 64 hexadecimal digits
  int32_t weight = 1;   // relative to the name's other targets

  bool operator==(const AdapterTarget&) const = default;
};

// A name, and the first version it leads to.
struct AdapterInfo {
  std::string name;
  std::string version;
  std::vector<AdapterTarget> targets;  // more than one for an alias that splits requests
  std::string variant;                 // "lora", "rslora", "dora", ...
  std::string path;                    // resolved directory it is read from, or URL
  int32_t min_rank = 0;
  int32_t max_rank = 0;
  int32_t modules = 0;   // adapted linears
  int64_t bytes = 0;     // in memory, of the version alone
  bool in_host = false;  // in host memory now
  int64_t device_bytes = 0;  // of pages on the device now, where adapters have images there
  bool pinned = false;   // stays there
  int64_t leases = 0;    // requests that hold the version now, through any name
  int64_t hits = 0;      // requests that asked for this name
  int64_t host_misses = 0;  // of them, those that waited until it was read into host memory
  int64_t loaded_at_unix_us = 0;
  int64_t last_used_unix_us = 0;      // when this name was last asked for; 0: never
  std::vector<std::string> warnings;  // of the load: keys and tensors that change nothing
};

struct UnloadResult {
  std::string version;
  int64_t host_bytes_freed = 0;  // 0 when another name leads to the same version
  int64_t device_bytes_freed = 0;
};

struct AdapterFilter {
  std::string name_prefix;
  std::string version;        // names that lead to it; empty: any
  bool in_host_only = false;
  bool on_device_only = false;
  std::string after;          // names behind this one
  int32_t limit = std::numeric_limits<int32_t>::max();
  std::function<bool(std::string_view name)> visible;  // others are not there; empty: all are
};

struct AdapterEvent {
  enum class Kind : uint8_t {
    kRegistered,  // the name leads to the version from now on
    kUnloaded,    // the name is gone; version: what it led to
    kInHost,      // the version came into host memory; no name
    kEvicted,     // the version left host memory; no name
    kFreed,       // the version's last name and lease are gone; no name
  };
  Kind kind = Kind::kRegistered;
  std::string name;
  std::string version;
  int64_t time_unix_us = 0;
};

// A reader of changes. Thread-safe; the registry stops writing to it when it dies.
class AdapterWatch {
 public:
  virtual ~AdapterWatch() = default;
  // The next event, false when there is none now. RESOURCE_EXHAUSTED: the reader was so slow that
  // events were dropped; nothing follows.
  virtual absl::StatusOr<bool> Next(AdapterEvent* event) = 0;
};

struct RegistryStats {
  int64_t names = 0;
  int64_t versions = 0;       // that a name leads to or a request holds
  int64_t in_host = 0;        // of them, in host memory
  int64_t host_bytes = 0;     // their bytes, and once those that several have in common
  int64_t host_hits = 0;      // requests whose adapter was there
  int64_t host_misses = 0;    // requests that waited for their adapter to be read
  int64_t evictions = 0;
  int64_t reads = 0;          // adapters read from disk, first loads and later ones
  int64_t read_failures = 0;  // of later ones
  int64_t read_bytes = 0;     // in memory, of those that succeeded
  int64_t read_us = 0;        // that they took, building included
  int64_t disk_bytes = 0;     // of the directories of Options::owned
};

class AdapterRegistry final : public AdapterStore {
 public:
  class Core;  // registry_core.h

  struct Options {
    std::string base_name;  // what clients call the base model: no adapter may take it
    // Directories that Load may read below. None: every Load is refused.
    std::vector<std::filesystem::path> allowed_roots;
    FactorPrecision precision = FactorPrecision::kFile;
    bool allow_dense = false;  // see NormaliseOptions
    bool on_host = true;       // likewise
    int loader_threads = 2;
    int64_t host_bytes = std::numeric_limits<int64_t>::max();
    // Where names loaded by clients outlive the process; empty: they do not. See registry_file.h.
    std::filesystem::path state_file;
    int32_t max_adapters = std::numeric_limits<int32_t>::max();  // names
    // Of each tenant that has a name (LoadOptions::tenant).
    int32_t tenant_max_adapters = std::numeric_limits<int32_t>::max();
    int64_t tenant_host_bytes = std::numeric_limits<int64_t>::max();
    int64_t tenant_disk_bytes = std::numeric_limits<int64_t>::max();  // of directories of `owned`
    int32_t tenant_image_pages = std::numeric_limits<int32_t>::max();  // of `images`
    const AdapterImages* images = nullptr;  // nullptr: adapters have none
    // Makes the text of an adapter of its files (AdapterFiles::text), read from the directory `where`;
    // `vocab`: its tokens. Empty: adapters speak as the base does.
    std::function<absl::StatusOr<std::shared_ptr<const AdapterText>>(
        const std::map<std::string, std::string, std::less<>>& files, const std::string& where,
        int32_t vocab)>
        read_text;
    AdapterSources* sources = nullptr;  // of URLs; outlives the registry
    // The directories directly below `owned` (a real path) are there for this registry alone:
    // `on_unused` is called with one once no name, version or load uses it and the state file says so.
    // No load begins to read it before that returns. On the registry's own thread, without its lock.
    std::filesystem::path owned;
    std::function<void(const std::filesystem::path& directory)> on_unused;
    // Directories below the roots and URLs: an unknown name is looked for below each in turn when a
    // request first asks for it.
    std::vector<std::string> on_demand;
  };

  enum class Origin : uint8_t {
    kClient,    // the path must lie under an allowed root, symbolic links resolved
    kOperator,  // from the command line or configuration: any path
  };

  // Room for files that come below `owned` and are to be loaded as a name: of that name's tenant, or of who
  // brings it. Given back when it dies; the files count as the name's once they are loaded.
  class DiskRoom {
   public:
    ~DiskRoom();
    // RESOURCE_EXHAUSTED: so many bytes more are beyond tenant_disk_bytes. What the name keeps now, and these
    // files replace, does not count, but for others that come for the same name at the same time.
    absl::Status Take(int64_t bytes);

   private:
    friend Core;
    DiskRoom(std::shared_ptr<Core> core, std::string name, std::string tenant)
        : core_(std::move(core)), name_(std::move(name)), tenant_(std::move(tenant)) {}

    const std::shared_ptr<Core> core_;
    const std::string name_;
    std::string tenant_;
    int64_t bytes_ = 0;           // below, with the registry's lock
    int64_t replaced_bytes_ = 0;
  };
  std::unique_ptr<DiskRoom> DiskRoomFor(const std::string& name, const std::string& tenant);

  struct LoadOptions {
    Origin origin = Origin::kClient;
    bool replace = false;  // a name that leads to another version is led to this one
    bool pin = false;
    bool keep = true;      // the name survives the process
    std::string version;   // DATA_LOSS if it is another; empty: any
    std::string tenant;    // whose name it is, if it is new; empty: nobody's
    DiskRoom* room = nullptr;  // that was taken for these files; lives until `done` is called
  };

  using LoadDone = std::function<void(absl::StatusOr<AdapterInfo>)>;
  using UnloadDone = std::function<void(absl::StatusOr<UnloadResult>)>;
  using LeaseDone = std::function<void(absl::StatusOr<AdapterLease>)>;

  // `base` must outlive the registry. NOT_FOUND: a root that is no directory, named; DATA_LOSS: a
  // state file that cannot be read.
  static absl::StatusOr<std::unique_ptr<AdapterRegistry>> Create(const BaseModel& base,
                                                                 Options options);
  // Loads and unloads still under way end with CANCELLED. Leases may outlive the registry.
  ~AdapterRegistry() override;

  // Registers the adapter directory `path`, or a URL of the sources, as `name` and calls `done` once,
  // on a thread of the registry or of the sources (or at once, on this one, when the request is refused
  // at the door). A relative path is looked for below each root in turn, then in the working directory.
  // Already loaded with the same bytes: OK, and only where a reload reads from changes. A failing
  // load changes nothing. When `done` is called the name survives a crash.
  //
  // INVALID_ARGUMENT: the name or anything in the directory is not acceptable; ALREADY_EXISTS: the
  // name leads to another version and `replace` is not set; PERMISSION_DENIED: outside the roots
  // (path and roots are named); NOT_FOUND: no such directory or file; DATA_LOSS: truncated or
  // malformed weights; UNIMPLEMENTED: a variant this server does not serve, with the reason;
  // RESOURCE_EXHAUSTED: kMaxPendingLoads loads are waiting, max_adapters or tenant_max_adapters names
  // are taken, it alone, or if it is to be pinned with all that is, has more than host_bytes or
  // tenant_host_bytes, its image has more than tenant_image_pages, or its files would take its tenant
  // beyond tenant_disk_bytes; and what AdapterSources::FetchAsync says of URLs.
  void LoadAsync(std::string name, std::filesystem::path path, LoadOptions options, LoadDone done);

  // Loads from where the name was loaded from, replacing it. FAILED_PRECONDITION: the name has
  // several targets.
  void ReloadAsync(const std::string& name, LoadDone done);

  // Takes the name away at once, so that new requests get NOT_FOUND, waits until requests that hold
  // what it alone led to are gone, frees host memory and the pages on the device, and calls `done`
  // once, on the registry's own thread (or at once, on this one, when it is refused), when the name is
  // gone from the state file as well. NOT_FOUND: no such name; DEADLINE_EXCEEDED: still leased after `drain` (the name is gone all the
  // same, and the memory follows its last lease).
  void UnloadAsync(std::string_view name, std::chrono::microseconds drain, UnloadDone done);

  absl::StatusOr<std::string> Find(std::string_view name) const override;
  bool MayAppear(std::string_view name) const override;

  // Pins a version of `name` and hands it to `done`, at once if it is in host memory, else on a
  // loader thread when it is. An unknown name is looked for on demand. NOT_FOUND names the adapter; DATA_LOSS: its files have other bytes
  // by now; RESOURCE_EXHAUSTED: kMaxWaitingRequests wait already; and what reading it can end with.
  void AcquireAsync(std::string_view name, LeaseDone done) override;

  // Reads the versions of `name` into host memory, if they are not there, and calls `done`.
  void PrefetchAsync(std::string_view name, std::function<void(absl::Status)> done);

  // Keeps the versions of `name` in host memory once they are there, or lets them go. `done` as
  // LoadAsync's. NOT_FOUND; RESOURCE_EXHAUSTED: they have no room beside what else is pinned.
  void SetPinnedAsync(std::string_view name, bool pinned, LoadDone done);

  // Leads `alias`, new or not, to targets that are names or versions, each with a share of the
  // requests. In one step: no request sees half of it. `done` as LoadAsync's. INVALID_ARGUMENT: no
  // targets, more than kMaxTargets, a weight that is not positive; NOT_FOUND: a target, named.
  void SetAliasAsync(const std::string& alias, const std::vector<AdapterTarget>& targets,
                     const std::string& tenant, LoadDone done);

  // Has Options::on_unused called if nothing uses the directory.
  void TellIfUnused(const std::string& directory);

  // Where adapters have images besides; nullptr, as at first: nowhere. What is set must outlive the
  // registry or be taken away again.
  void SetDevice(DeviceTier* device);

  std::vector<AdapterInfo> List(const AdapterFilter& filter) const;  // by name
  absl::StatusOr<AdapterInfo> Get(std::string_view name) const;      // NOT_FOUND names it
  RegistryStats stats() const;

  // Every change from now on. `wake` is called when there is something to read, on the thread that
  // made the change and with the registry locked: it must not block or call the registry.
  std::unique_ptr<AdapterWatch> Watch(std::function<void()> wake);

  // The same, waiting. Not from the engine thread or a registry callback.
  absl::StatusOr<AdapterInfo> Load(std::string name, std::filesystem::path path, Origin origin);
  absl::StatusOr<AdapterInfo> Load(std::string name, std::filesystem::path path,
                                   LoadOptions options);
  absl::StatusOr<AdapterInfo> Reload(const std::string& name);
  absl::StatusOr<UnloadResult> Unload(std::string_view name, std::chrono::microseconds drain);
  absl::StatusOr<AdapterLease> Acquire(std::string_view name);
  absl::Status Prefetch(std::string_view name);
  absl::StatusOr<AdapterInfo> SetPinned(std::string_view name, bool pinned);
  absl::StatusOr<AdapterInfo> SetAlias(const std::string& alias,
                                       const std::vector<AdapterTarget>& targets,
                                       const std::string& tenant = {});

  static constexpr int kMaxPendingLoads = 1024;
  static constexpr int kMaxWaitingRequests = 4096;
  static constexpr int kMaxNameBytes = 128;
  static constexpr int kMaxTargets = 8;
  static constexpr int kMaxTargetWeight = 1'000'000;
  static constexpr int kMaxWatchedEvents = 4096;  // that a slow reader may leave unread

 private:
  explicit AdapterRegistry(std::shared_ptr<Core> core);

  std::shared_ptr<Core> core_;  // shared with outstanding leases
};

// 1 to AdapterRegistry::kMaxNameBytes characters of A-Z a-z 0-9 . _ - : / @ +, the first a letter
// or digit, and not `base_name`. INVALID_ARGUMENT says which rule is broken.
absl::Status ValidateAdapterName(std::string_view name, std::string_view base_name);

// NOT_FOUND, in the registry's words.
absl::Status AdapterNotLoaded(std::string_view name);

}  // namespace lorikeet
