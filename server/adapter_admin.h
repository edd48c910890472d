// What AdapterService does, for both ports: which adapters a caller may touch, the audit log, and
// the registry's work.
//
// Requests and responses are lorikeet.v1's. What a caller does not see is NOT_FOUND, as if it were
// not there; a name that it may not give to an adapter is PERMISSION_DENIED.
#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/registry.h"
#include "lorikeet/v1/adapters.pb.h"
#include "server/auth/audit_log.h"
#include "server/auth/identity.h"
#include "server/metrics.h"
#include "server/plan_capacity.h"
#include "server/uploads.h"

namespace lorikeet {

// Thread-safe.
class AdapterAdmin {
 public:
  struct Options {
    std::chrono::microseconds drain{0};  // of an unload that does not say
    Capacity capacity;
  };

  // All of them outlive it and the registry's callbacks. `uploads`: nullptr, none are taken.
  AdapterAdmin(AdapterRegistry* registry, Uploads* uploads, Metrics* metrics, AuditLog* audit,
               Options options)
      : registry_(registry),
        uploads_(uploads),
        metrics_(metrics),
        audit_(audit),
        options_(std::move(options)) {}

  Uploads* uploads() { return uploads_; }

  // Called once, at once or on a thread of the registry.
  template <typename Response>
  using Done = std::function<void(const absl::StatusOr<Response>&)>;

  void Load(const Client& client, const v1::LoadAdapterRequest& request,
            Done<v1::LoadAdapterResponse> done);
  // For the files of an upload under way.
  std::unique_ptr<AdapterRegistry::DiskRoom> DiskRoomFor(const Client& client,
                                                         const std::string& name);
  // Loads what uploads() has kept in `path`; `room`, which was taken for it, lives until `done` is called.
  void LoadUploaded(const Client& client, const v1::UploadHeader& header,
                    const std::filesystem::path& path, AdapterRegistry::DiskRoom* room,
                    Done<v1::LoadAdapterResponse> done);
  void Reload(const Client& client, const v1::ReloadAdapterRequest& request,
              Done<v1::LoadAdapterResponse> done);
  // `time_left`: of the call, absent: no bound.
  void Unload(const Client& client, const v1::UnloadAdapterRequest& request,
              std::optional<std::chrono::microseconds> time_left,
              Done<v1::UnloadAdapterResponse> done);
  void Prefetch(const Client& client, const v1::PrefetchAdapterRequest& request,
                Done<v1::PrefetchAdapterResponse> done);

  void Pin(const Client& client, const v1::PinAdapterRequest& request,
           Done<v1::PinAdapterResponse> done);
  void SetAlias(const Client& client, const v1::SetAliasRequest& request,
                Done<v1::SetAliasResponse> done);
  absl::StatusOr<v1::GetAdapterResponse> Get(const Identity& caller,
                                             const v1::GetAdapterRequest& request) const;
  absl::StatusOr<v1::ListAdaptersResponse> List(const Identity& caller,
                                                const v1::ListAdaptersRequest& request) const;
  absl::StatusOr<v1::PlanCapacityResponse> PlanCapacity(
      const v1::PlanCapacityRequest& request) const;

  // NOT_FOUND unless the caller sees it.
  absl::StatusOr<AdapterInfo> Find(const Identity& caller, std::string_view name) const;
  // All that the caller sees, by name.
  std::vector<AdapterInfo> Visible(const Identity& caller) const;
  // Changes of what the caller sees. Events of versions, which have no name, are for those alone
  // who see all. `wake` as in AdapterRegistry::Watch.
  std::unique_ptr<AdapterWatch> Watch(Caller caller, std::function<void()> wake) const;

  // PERMISSION_DENIED: not a name the caller may give.
  static absl::Status CheckMayName(const Identity& caller, std::string_view name);
  // A line of the audit log.
  void Note(const Client& client, std::string_view action, std::string_view adapter,
            const absl::Status& outcome, std::string_view path = {}) const;
  // What a load took, to the metrics.
  void CountLoad(const absl::Status& outcome, std::chrono::steady_clock::time_point start) const;

 private:
  AdapterRegistry::LoadDone FinishLoad(const Client& client, std::string_view action,
                                       std::string name, std::string path,
                                       Done<v1::LoadAdapterResponse> done) const;
  absl::Status CheckTarget(const Identity& caller, const std::string& target) const;
  absl::Status CheckAlias(const Identity& caller, const v1::SetAliasRequest& request) const;

  AdapterRegistry* const registry_;
  Uploads* const uploads_;
  Metrics* const metrics_;
  AuditLog* const audit_;
  const Options options_;
};

}  // namespace lorikeet
