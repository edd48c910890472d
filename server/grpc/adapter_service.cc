#include "server/grpc/adapter_service.h"

#include <algorithm>

#include "server/grpc/convert.h"
#include "server/grpc/wire.h"

namespace lorikeet {
namespace {

using std::chrono::duration_cast;
using std::chrono::microseconds;

int64_t MicrosSince(std::chrono::steady_clock::time_point start) {
  return duration_cast<microseconds>(std::chrono::steady_clock::now() - start).count();
}

grpc::ServerUnaryReactor* FinishNow(grpc::CallbackServerContext* call, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace

grpc::ServerUnaryReactor* AdapterServiceImpl::LoadAdapter(grpc::CallbackServerContext* call,
                                                          const grpc::ByteBuffer* bytes,
                                                          grpc::ByteBuffer* response) {
  v1::LoadAdapterRequest request;
  const absl::Status decoded = DecodeRequest(*bytes, &request);
  if (!decoded.ok()) return FinishNow(call, decoded);
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  const auto start = std::chrono::steady_clock::now();
  registry_->LoadAsync(request.name(), request.path(), AdapterRegistry::Origin::kClient,
                       [=, metrics = metrics_](absl::StatusOr<AdapterInfo> info) {
                         metrics->OnAdapterLoad(info.status(), MicrosSince(start));
                         if (info.ok()) {
                           v1::LoadAdapterResponse reply;
                           *reply.mutable_adapter() = ToProto(*info);
                           *response = EncodeResponse(reply);
                         }
                         reactor->Finish(ToGrpcStatus(info.status()));
                       });
  return reactor;
}

grpc::ServerUnaryReactor* AdapterServiceImpl::UnloadAdapter(grpc::CallbackServerContext* call,
                                                            const grpc::ByteBuffer* bytes,
                                                            grpc::ByteBuffer* response) {
  v1::UnloadAdapterRequest request;
  const absl::Status decoded = DecodeRequest(*bytes, &request);
  if (!decoded.ok()) return FinishNow(call, decoded);
  microseconds drain = drain_;
  if (call->deadline() != std::chrono::system_clock::time_point::max()) {
    drain = std::min(
        drain, duration_cast<microseconds>(call->deadline() - std::chrono::system_clock::now()));
  }
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  registry_->UnloadAsync(request.name(), std::max(drain, microseconds(0)),
                         [=](absl::StatusOr<UnloadResult> result) {
                           if (result.ok()) {
                             v1::UnloadAdapterResponse reply;
                             reply.set_version(result->version);
                             reply.set_bytes_freed(result->bytes_freed);
                             *response = EncodeResponse(reply);
                           }
                           reactor->Finish(ToGrpcStatus(result.status()));
                         });
  return reactor;
}

grpc::ServerUnaryReactor* AdapterServiceImpl::GetAdapter(grpc::CallbackServerContext* call,
                                                         const grpc::ByteBuffer* bytes,
                                                         grpc::ByteBuffer* response) {
  v1::GetAdapterRequest request;
  const absl::Status decoded = DecodeRequest(*bytes, &request);
  if (!decoded.ok()) return FinishNow(call, decoded);
  const absl::StatusOr<AdapterInfo> info = registry_->Get(request.name());
  if (info.ok()) {
    v1::GetAdapterResponse reply;
    *reply.mutable_adapter() = ToProto(*info);
    *response = EncodeResponse(reply);
  }
  return FinishNow(call, info.status());
}

grpc::ServerUnaryReactor* AdapterServiceImpl::ListAdapters(grpc::CallbackServerContext* call,
                                                           const v1::ListAdaptersRequest*,
                                                           v1::ListAdaptersResponse* response) {
  for (const AdapterInfo& info : registry_->List()) *response->add_adapters() = ToProto(info);
  return FinishNow(call, absl::OkStatus());
}

}  // namespace lorikeet
