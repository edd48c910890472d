#include "server/adapter_admin.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/adapter_proto.h"

namespace lorikeet {
namespace {

using std::chrono::microseconds;

constexpr int32_t kDefaultPage = 100;
constexpr int32_t kMaxPage = 1000;
constexpr int64_t kMaxDrainMs = 24 * 3600 * 1000;

template <typename Response>
absl::StatusOr<Response> WithAdapter(const absl::StatusOr<AdapterInfo>& info) {
  LK_RETURN_IF_ERROR(info.status());
  Response reply;
  *reply.mutable_adapter() = ToProto(*info);
  return reply;
}

absl::Status CheckSees(const Identity& caller, std::string_view name) {
  return caller.Sees(name) ? absl::OkStatus() : AdapterNotLoaded(name);
}

absl::Status CheckDrain(int64_t drain_ms) {
  if (drain_ms >= 0 && drain_ms <= kMaxDrainMs) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("drain_ms: ", drain_ms, " is not in [0, ", kMaxDrainMs, "]"));
}

class VisibleWatch final : public AdapterWatch {
 public:
  VisibleWatch(Caller caller, std::unique_ptr<AdapterWatch> all)
      : caller_(std::move(caller)), all_(std::move(all)) {}

  absl::StatusOr<bool> Next(AdapterEvent* event) override {
    while (true) {
      const absl::StatusOr<bool> there = all_->Next(event);
      if (!there.ok() || !*there) return there;
      if (event->name.empty() ? caller_->SeesAll() : caller_->Sees(event->name)) return true;
    }
  }

 private:
  const Caller caller_;
  const std::unique_ptr<AdapterWatch> all_;
};

}  // namespace

absl::Status AdapterAdmin::CheckMayName(const Identity& caller, std::string_view name) {
  if (caller.Sees(name)) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat(
      "key '", caller.id, "' may not name an adapter '", std::string(name), "'"));
}

void AdapterAdmin::Note(const Client& client, std::string_view action, std::string_view adapter,
                        const absl::Status& outcome, std::string_view path) const {
  audit_->Write({.caller = client.caller.get(),
                 .peer = client.peer,
                 .action = action,
                 .adapter = adapter,
                 .path = path,
                 .outcome = outcome});
}

void AdapterAdmin::CountLoad(const absl::Status& outcome,
                             std::chrono::steady_clock::time_point start) const {
  const auto took = std::chrono::steady_clock::now() - start;
  metrics_->OnAdapterLoad(outcome, std::chrono::duration_cast<microseconds>(took).count());
}

AdapterRegistry::LoadDone AdapterAdmin::FinishLoad(const Client& client, std::string_view action,
                                                   std::string name, std::string path,
                                                   Done<v1::LoadAdapterResponse> done) const {
  return [=, this, action = std::string(action), start = std::chrono::steady_clock::now()](
             const absl::StatusOr<AdapterInfo>& info) {
    CountLoad(info.status(), start);
    Note(client, action, name, info.status(), path);
    done(WithAdapter<v1::LoadAdapterResponse>(info));
  };
}

void AdapterAdmin::Load(const Client& client, const v1::LoadAdapterRequest& request,
                        Done<v1::LoadAdapterResponse> done) {
  // A URL that is refused may hold a password or a signature.
  const bool secret = AdapterSources::Takes(request.path()) &&
                      request.path().find_first_of("@?#") != std::string::npos;
  const auto finish = FinishLoad(client, "LoadAdapter", request.name(),
                                 secret ? "a URL" : request.path(), std::move(done));
  const absl::Status named = CheckMayName(*client.caller, request.name());
  if (!named.ok()) return finish(named);
  registry_->LoadAsync(request.name(), request.path(),
                       {.replace = request.replace(),
                        .pin = request.pin(),
                        .version = request.version(),
                        .tenant = client.caller->tenant},
                       finish);
}

std::unique_ptr<AdapterRegistry::DiskRoom> AdapterAdmin::DiskRoomFor(const Client& client,
                                                                     const std::string& name) {
  return registry_->DiskRoomFor(name, client.caller->tenant);
}

void AdapterAdmin::LoadUploaded(const Client& client, const v1::UploadHeader& header,
                                const std::filesystem::path& path,
                                AdapterRegistry::DiskRoom* room,
                                Done<v1::LoadAdapterResponse> done) {
  registry_->LoadAsync(
      header.name(), path,
      {.origin = AdapterRegistry::Origin::kOperator,
       .replace = header.replace(),
       .pin = header.pin(),
       .tenant = client.caller->tenant,
       .room = room},
      [this, path, finish = FinishLoad(client, "UploadAdapter", header.name(), path.string(),
                                       std::move(done))](const absl::StatusOr<AdapterInfo>& info) {
        uploads_->LoadEnded(path);
        registry_->TellIfUnused(path);
        finish(info);
      });
}

void AdapterAdmin::Reload(const Client& client, const v1::ReloadAdapterRequest& request,
                          Done<v1::LoadAdapterResponse> done) {
  const auto finish = FinishLoad(client, "ReloadAdapter", request.name(), "", std::move(done));
  const absl::Status seen = CheckSees(*client.caller, request.name());
  if (!seen.ok()) return finish(seen);
  registry_->ReloadAsync(request.name(), finish);
}

void AdapterAdmin::Unload(const Client& client, const v1::UnloadAdapterRequest& request,
                          std::optional<microseconds> time_left,
                          Done<v1::UnloadAdapterResponse> done) {
  const auto finish = [this, client, name = request.name(),
                       done = std::move(done)](const absl::StatusOr<UnloadResult>& result) {
    Note(client, "UnloadAdapter", name, result.status());
    if (!result.ok()) return done(result.status());
    v1::UnloadAdapterResponse reply;
    reply.set_version(result->version);
    reply.set_host_bytes_freed(result->host_bytes_freed);
    reply.set_device_bytes_freed(result->device_bytes_freed);
    done(std::move(reply));
  };
  const absl::Status seen = CheckSees(*client.caller, request.name());
  if (!seen.ok()) return finish(seen);
  microseconds drain = std::min(options_.drain, time_left.value_or(options_.drain));
  if (request.has_drain_ms()) {
    const absl::Status fits = CheckDrain(request.drain_ms());
    if (!fits.ok()) return finish(fits);
    drain = std::chrono::milliseconds(request.drain_ms());
  }
  registry_->UnloadAsync(request.name(), std::max(drain, microseconds(0)), finish);
}

void AdapterAdmin::Prefetch(const Client& client, const v1::PrefetchAdapterRequest& request,
                            Done<v1::PrefetchAdapterResponse> done) {
  const auto finish = [this, client, name = request.name(),
                       done = std::move(done)](const absl::Status& status) {
    Note(client, "PrefetchAdapter", name, status);
    done(status.ok() ? WithAdapter<v1::PrefetchAdapterResponse>(registry_->Get(name)) : status);
  };
  const absl::Status seen = CheckSees(*client.caller, request.name());
  if (!seen.ok()) return finish(seen);
  registry_->PrefetchAsync(request.name(), finish);
}

void AdapterAdmin::Pin(const Client& client, const v1::PinAdapterRequest& request,
                       Done<v1::PinAdapterResponse> done) {
  const auto finish = [this, client, name = request.name(),
                       done = std::move(done)](const absl::StatusOr<AdapterInfo>& info) {
    Note(client, "PinAdapter", name, info.status());
    done(WithAdapter<v1::PinAdapterResponse>(info));
  };
  const absl::Status seen = CheckSees(*client.caller, request.name());
  if (!seen.ok()) return finish(seen);
  registry_->SetPinnedAsync(request.name(), request.pinned(), finish);
}

// A version stands for the adapters that lead to it: the caller must see one of them.
absl::Status AdapterAdmin::CheckTarget(const Identity& caller, const std::string& target) const {
  AdapterFilter filter{.version = target, .limit = 1};
  if (registry_->List(filter).empty()) return CheckSees(caller, target);
  filter.visible = [&caller](std::string_view name) { return caller.Sees(name); };
  return registry_->List(filter).empty() ? AdapterNotLoaded(target) : absl::OkStatus();
}

absl::Status AdapterAdmin::CheckAlias(const Identity& caller,
                                      const v1::SetAliasRequest& request) const {
  LK_RETURN_IF_ERROR(CheckMayName(caller, request.alias()));
  for (const v1::AdapterTarget& target : request.targets()) {
    LK_RETURN_IF_ERROR(CheckTarget(caller, target.target()));
  }
  return absl::OkStatus();
}

void AdapterAdmin::SetAlias(const Client& client, const v1::SetAliasRequest& request,
                            Done<v1::SetAliasResponse> done) {
  const auto finish = [this, client, alias = request.alias(),
                       done = std::move(done)](const absl::StatusOr<AdapterInfo>& info) {
    Note(client, "SetAlias", alias, info.status());
    done(WithAdapter<v1::SetAliasResponse>(info));
  };
  const absl::Status allowed = CheckAlias(*client.caller, request);
  if (!allowed.ok()) return finish(allowed);
  std::vector<AdapterTarget> targets;
  for (const v1::AdapterTarget& target : request.targets()) {
    targets.push_back({target.target(), target.weight()});
  }
  registry_->SetAliasAsync(request.alias(), targets, client.caller->tenant, finish);
}

absl::StatusOr<v1::GetAdapterResponse> AdapterAdmin::Get(
    const Identity& caller, const v1::GetAdapterRequest& request) const {
  return WithAdapter<v1::GetAdapterResponse>(Find(caller, request.name()));
}

absl::StatusOr<AdapterInfo> AdapterAdmin::Find(const Identity& caller,
                                               std::string_view name) const {
  LK_RETURN_IF_ERROR(CheckSees(caller, name));
  return registry_->Get(name);
}

absl::StatusOr<v1::ListAdaptersResponse> AdapterAdmin::List(
    const Identity& caller, const v1::ListAdaptersRequest& request) const {
  if (request.page_size() < 0 || request.page_size() > kMaxPage) {
    return absl::InvalidArgumentError(
        absl::StrCat("page_size: ", request.page_size(), " is not in [0, ", kMaxPage, "]"));
  }
  const int32_t page = request.page_size() > 0 ? request.page_size() : kDefaultPage;
  std::vector<AdapterInfo> found =
      registry_->List({.name_prefix = request.name_prefix(),
                       .version = request.version(),
                       .in_host_only = request.in_host_only(),
                       .on_device_only = request.on_device_only(),
                       .after = request.page_token(),
                       .limit = page + 1,
                       .visible = [&](std::string_view name) { return caller.Sees(name); }});
  v1::ListAdaptersResponse reply;
  if (static_cast<int32_t>(found.size()) > page) {
    found.pop_back();
    reply.set_next_page_token(found.back().name);
  }
  for (const AdapterInfo& info : found) *reply.add_adapters() = ToProto(info);
  return reply;
}

std::vector<AdapterInfo> AdapterAdmin::Visible(const Identity& caller) const {
  return registry_->List({.visible = [&](std::string_view name) { return caller.Sees(name); }});
}

std::unique_ptr<AdapterWatch> AdapterAdmin::Watch(Caller caller, std::function<void()> wake) const {
  return std::make_unique<VisibleWatch>(std::move(caller), registry_->Watch(std::move(wake)));
}

absl::StatusOr<v1::PlanCapacityResponse> AdapterAdmin::PlanCapacity(
    const v1::PlanCapacityRequest& request) const {
  return lorikeet::PlanCapacity(request, options_.capacity);
}

}  // namespace lorikeet
