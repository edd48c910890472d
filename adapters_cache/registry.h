// The adapters a server knows by name: loads them from disk, hands out leases, unloads them once
// nobody uses them.
//
// Identity: an adapter's version is the SHA-256 of its configuration and tensors (formats/
// raw_adapter.h), so equal bytes under two names are one Adapter in memory, and a version never
// means other weights.
//
// Threads: files are read and adapters built on loader threads; adapters are freed on a thread of
// their own. Acquire, List and Get hold a mutex for a map look-up and never wait for a load; the
// thread that drops the last lease (often the engine's) frees nothing, it only signals.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/normalise.h"
#include "engine/api/adapter_store.h"
#include "engine/api/base_model.h"

namespace lorikeet {

struct AdapterInfo {
  std::string name;
  std::string version;  // 64 hexadecimal digits
  std::string variant;  // "lora", "rslora", "dora", ...
  std::string path;     // resolved directory it came from
  int32_t min_rank = 0;
  int32_t max_rank = 0;
  int32_t modules = 0;  // adapted linears
  int64_t bytes = 0;    // in memory; shared with other names of the same version
  int64_t leases = 0;   // requests that hold it through this name now
  int64_t hits = 0;     // Acquire calls answered
  int64_t loaded_at_unix_us = 0;
  int64_t last_used_unix_us = 0;      // of the last Acquire; 0: never
  std::vector<std::string> warnings;  // of the load: keys and tensors that change nothing
};

struct UnloadResult {
  std::string version;
  int64_t bytes_freed = 0;  // 0 when another name still serves the same version
};

class AdapterRegistry final : public AdapterStore {
 public:
  struct Options {
    std::string base_name;  // what clients call the base model: no adapter may take it
    // Directories that Load may read below. None: every Load is refused.
    std::vector<std::filesystem::path> allowed_roots;
    FactorPrecision precision = FactorPrecision::kFile;
    bool allow_dense = false;  // see NormaliseOptions
    int loader_threads = 2;
  };

  enum class Origin : uint8_t {
    kClient,    // the path must lie under an allowed root, symbolic links resolved
    kOperator,  // from the command line or configuration: any path
  };

  using LoadDone = std::function<void(absl::StatusOr<AdapterInfo>)>;
  using UnloadDone = std::function<void(absl::StatusOr<UnloadResult>)>;

  // `base` must outlive the registry. NOT_FOUND: a root that is no directory, named.
  static absl::StatusOr<std::unique_ptr<AdapterRegistry>> Create(const BaseModel& base,
                                                                 Options options);
  // Loads and unloads still under way end with CANCELLED. Leases may outlive the registry.
  ~AdapterRegistry() override;

  // Loads the adapter directory `path` as `name` and calls `done` once, on a loader thread (or at
  // once, on this one, when the request is refused at the door). A relative path is looked for
  // below each root in turn, then in the working directory. Already loaded with the same bytes: OK,
  // nothing changes. A failing load changes nothing.
  //
  // INVALID_ARGUMENT: the name or anything in the directory is not acceptable; ALREADY_EXISTS: the
  // name serves another version; PERMISSION_DENIED: outside the roots (path and roots are named);
  // NOT_FOUND: no such directory or file; DATA_LOSS: truncated or malformed weights;
  // UNIMPLEMENTED: a variant this server does not serve, with the reason; RESOURCE_EXHAUSTED:
  // kMaxPendingLoads loads are waiting.
  void LoadAsync(std::string name, std::filesystem::path path, Origin origin, LoadDone done);

  // Takes the name away at once, so that new requests get NOT_FOUND, waits until its leases are
  // gone, frees, and calls `done` once, on the registry's own thread (or at once, on this one, when
  // it is refused). NOT_FOUND: no such name; DEADLINE_EXCEEDED: still leased after `drain` (the
  // name is gone all the same, and the memory follows its last lease).
  void UnloadAsync(std::string_view name, std::chrono::microseconds drain, UnloadDone done);

  // The same, waiting. Not from the engine thread or a registry callback.
  absl::StatusOr<AdapterInfo> Load(std::string name, std::filesystem::path path, Origin origin);
  absl::StatusOr<UnloadResult> Unload(std::string_view name, std::chrono::microseconds drain);

  absl::StatusOr<AdapterLease> Acquire(std::string_view name) override;

  std::vector<AdapterInfo> List() const;                         // by name
  absl::StatusOr<AdapterInfo> Get(std::string_view name) const;  // NOT_FOUND names it

  static constexpr int kMaxPendingLoads = 256;
  static constexpr int kMaxNameBytes = 128;

 private:
  class Core;
  explicit AdapterRegistry(std::shared_ptr<Core> core);

  std::shared_ptr<Core> core_;  // shared with outstanding leases
};

// 1 to AdapterRegistry::kMaxNameBytes characters of A-Z a-z 0-9 . _ - : / @ +, the first a letter
// or digit, and not `base_name`. INVALID_ARGUMENT says which rule is broken.
absl::Status ValidateAdapterName(std::string_view name, std::string_view base_name);

}  // namespace lorikeet
