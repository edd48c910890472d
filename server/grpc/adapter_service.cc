#include "server/grpc/adapter_service.h"

#include <functional>
#include <optional>
#include <utility>

#include "engine/base/status_macros.h"
#include "server/grpc/adapter_upload.h"
#include "server/grpc/adapter_watch.h"
#include "server/grpc/admit.h"
#include "server/grpc/wire.h"

namespace lorikeet {
namespace {

using std::chrono::microseconds;

// What is left of a call's deadline.
std::optional<microseconds> TimeLeft(const grpc::CallbackServerContext& call) {
  if (call.deadline() == std::chrono::system_clock::time_point::max()) return std::nullopt;
  return std::chrono::duration_cast<microseconds>(call.deadline() -
                                                  std::chrono::system_clock::now());
}

// Admits and decodes, and ends the call with what `work` has done.
template <typename Request, typename Response>
grpc::ServerUnaryReactor* Answer(
    Access& access, Role role, const char* name, grpc::CallbackServerContext* call,
    const grpc::ByteBuffer* bytes, grpc::ByteBuffer* response,
    const std::function<void(const Client&, const Request&, AdapterAdmin::Done<Response>)>& work) {
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  Request request;
  const absl::StatusOr<Client> client = AdmitCall(access, *call, role, name);
  absl::Status status = client.status();
  if (status.ok()) status = DecodeRequest(*bytes, &request);
  if (!status.ok()) {
    reactor->Finish(ToGrpcStatus(status));
    return reactor;
  }
  work(*client, request, [=](const absl::StatusOr<Response>& reply) {
    if (reply.ok()) *response = EncodeResponse(*reply);
    reactor->Finish(ToGrpcStatus(reply.status()));
  });
  return reactor;
}

}  // namespace

grpc::ServerUnaryReactor* AdapterServiceImpl::LoadAdapter(Call* call, const Bytes* bytes,
                                                          Bytes* response) {
  return Answer<v1::LoadAdapterRequest, v1::LoadAdapterResponse>(
      *access_, Role::kAdaptersWrite, "LoadAdapter", call, bytes, response,
      [&](const Client& client, const v1::LoadAdapterRequest& request, auto done) {
        admin_->Load(client, request, std::move(done));
      });
}

grpc::ServerReadReactor<grpc::ByteBuffer>* AdapterServiceImpl::UploadAdapter(Call* call,
                                                                             Bytes* response) {
  return AdapterUpload::Start(
      admin_, &uploads_, AdmitCall(*access_, *call, Role::kAdaptersWrite, "UploadAdapter"), response);
}

grpc::ServerUnaryReactor* AdapterServiceImpl::ReloadAdapter(Call* call, const Bytes* bytes,
                                                            Bytes* response) {
  return Answer<v1::ReloadAdapterRequest, v1::LoadAdapterResponse>(
      *access_, Role::kAdaptersWrite, "ReloadAdapter", call, bytes, response,
      [&](const Client& client, const v1::ReloadAdapterRequest& request, auto done) {
        admin_->Reload(client, request, std::move(done));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::UnloadAdapter(Call* call, const Bytes* bytes,
                                                            Bytes* response) {
  return Answer<v1::UnloadAdapterRequest, v1::UnloadAdapterResponse>(
      *access_, Role::kAdaptersWrite, "UnloadAdapter", call, bytes, response,
      [&](const Client& client, const v1::UnloadAdapterRequest& request, auto done) {
        admin_->Unload(client, request, TimeLeft(*call), std::move(done));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::GetAdapter(Call* call, const Bytes* bytes,
                                                         Bytes* response) {
  return Answer<v1::GetAdapterRequest, v1::GetAdapterResponse>(
      *access_, Role::kAdaptersRead, "GetAdapter", call, bytes, response,
      [&](const Client& client, const v1::GetAdapterRequest& request, const auto& done) {
        done(admin_->Get(*client.caller, request));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::ListAdapters(Call* call, const Bytes* bytes,
                                                           Bytes* response) {
  return Answer<v1::ListAdaptersRequest, v1::ListAdaptersResponse>(
      *access_, Role::kAdaptersRead, "ListAdapters", call, bytes, response,
      [&](const Client& client, const v1::ListAdaptersRequest& request, const auto& done) {
        done(admin_->List(*client.caller, request));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::PinAdapter(Call* call, const Bytes* bytes,
                                                         Bytes* response) {
  return Answer<v1::PinAdapterRequest, v1::PinAdapterResponse>(
      *access_, Role::kAdaptersWrite, "PinAdapter", call, bytes, response,
      [&](const Client& client, const v1::PinAdapterRequest& request, auto done) {
        admin_->Pin(client, request, std::move(done));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::PrefetchAdapter(Call* call, const Bytes* bytes,
                                                              Bytes* response) {
  return Answer<v1::PrefetchAdapterRequest, v1::PrefetchAdapterResponse>(
      *access_, Role::kAdaptersWrite, "PrefetchAdapter", call, bytes, response,
      [&](const Client& client, const v1::PrefetchAdapterRequest& request, auto done) {
        admin_->Prefetch(client, request, std::move(done));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::SetAlias(Call* call, const Bytes* bytes,
                                                       Bytes* response) {
  return Answer<v1::SetAliasRequest, v1::SetAliasResponse>(
      *access_, Role::kAdaptersWrite, "SetAlias", call, bytes, response,
      [&](const Client& client, const v1::SetAliasRequest& request, auto done) {
        admin_->SetAlias(client, request, std::move(done));
      });
}

grpc::ServerWriteReactor<v1::AdapterEvent>* AdapterServiceImpl::WatchAdapters(
    Call* call, const v1::WatchAdaptersRequest*) {
  return AdapterWatchCall::Start(admin_, AdmitCall(*access_, *call, Role::kAdaptersRead), front_);
}

grpc::ServerUnaryReactor* AdapterServiceImpl::PlanCapacity(Call* call, const Bytes* bytes,
                                                           Bytes* response) {
  return Answer<v1::PlanCapacityRequest, v1::PlanCapacityResponse>(
      *access_, Role::kAdaptersRead, "PlanCapacity", call, bytes, response,
      [&](const Client&, const v1::PlanCapacityRequest& request, const auto& done) {
        done(admin_->PlanCapacity(request));
      });
}

}  // namespace lorikeet
