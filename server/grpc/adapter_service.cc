#include "server/grpc/adapter_service.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/grpc/adapter_upload.h"
#include "server/grpc/adapter_watch.h"
#include "server/grpc/convert.h"
#include "server/grpc/plan_capacity.h"
#include "server/grpc/wire.h"

namespace lorikeet {
namespace {

using std::chrono::duration_cast;
using std::chrono::microseconds;

constexpr int32_t kDefaultPage = 100;
constexpr int32_t kMaxPage = 1000;

int64_t MicrosSince(std::chrono::steady_clock::time_point start) {
  return duration_cast<microseconds>(std::chrono::steady_clock::now() - start).count();
}

// Decodes a request and has `answer` finish the call; a request that does not decode ends it.
template <typename Request>
grpc::ServerUnaryReactor* Decoded(
    grpc::CallbackServerContext* call, const grpc::ByteBuffer* bytes,
    const std::function<void(const Request&, grpc::ServerUnaryReactor*)>& answer) {
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  Request request;
  const absl::Status decoded = DecodeRequest(*bytes, &request);
  if (decoded.ok()) {
    answer(request, reactor);
  } else {
    reactor->Finish(ToGrpcStatus(decoded));
  }
  return reactor;
}

// Decodes a request, and ends the call with the answer that is there at once.
template <typename Request, typename Response>
grpc::ServerUnaryReactor* Answered(
    grpc::CallbackServerContext* call, const grpc::ByteBuffer* bytes, grpc::ByteBuffer* response,
    const std::function<absl::StatusOr<Response>(const Request&)>& answer) {
  return Decoded<Request>(
      call, bytes, [&](const Request& request, grpc::ServerUnaryReactor* reactor) {
        const absl::StatusOr<Response> reply = answer(request);
        if (reply.ok()) *response = EncodeResponse(*reply);
        reactor->Finish(ToGrpcStatus(reply.status()));
      });
}

template <typename Response>
absl::StatusOr<Response> WithAdapter(const absl::StatusOr<AdapterInfo>& info) {
  LK_RETURN_IF_ERROR(info.status());
  Response reply;
  *reply.mutable_adapter() = ToProto(*info);
  return reply;
}

}  // namespace

AdapterRegistry::LoadDone AdapterServiceImpl::FinishLoad(Unary* reactor, Bytes* response) {
  return [=, metrics = metrics_, start = std::chrono::steady_clock::now()](
             const absl::StatusOr<AdapterInfo>& info) {
    metrics->OnAdapterLoad(info.status(), MicrosSince(start));
    const auto reply = WithAdapter<v1::LoadAdapterResponse>(info);
    if (reply.ok()) *response = EncodeResponse(*reply);
    reactor->Finish(ToGrpcStatus(reply.status()));
  };
}

grpc::ServerUnaryReactor* AdapterServiceImpl::LoadAdapter(Call* call, const Bytes* bytes,
                                                          Bytes* response) {
  return Decoded<v1::LoadAdapterRequest>(
      call, bytes, [&](const v1::LoadAdapterRequest& request, Unary* reactor) {
        registry_->LoadAsync(request.name(), request.path(),
                             {.replace = request.replace(), .pin = request.pin()},
                             FinishLoad(reactor, response));
      });
}

grpc::ServerReadReactor<grpc::ByteBuffer>* AdapterServiceImpl::UploadAdapter(Call*,
                                                                             Bytes* response) {
  return AdapterUpload::Start(registry_, metrics_, options_.directory, response);
}

grpc::ServerUnaryReactor* AdapterServiceImpl::ReloadAdapter(Call* call, const Bytes* bytes,
                                                            Bytes* response) {
  return Decoded<v1::ReloadAdapterRequest>(
      call, bytes, [&](const v1::ReloadAdapterRequest& request, Unary* reactor) {
        registry_->ReloadAsync(request.name(), FinishLoad(reactor, response));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::UnloadAdapter(Call* call, const Bytes* bytes,
                                                            Bytes* response) {
  return Decoded<v1::UnloadAdapterRequest>(
      call, bytes, [&](const v1::UnloadAdapterRequest& request, Unary* reactor) {
        microseconds drain = options_.drain;
        if (request.has_drain_ms()) {
          constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
          drain = std::chrono::milliseconds(std::min(request.drain_ms(), kMost));
        } else if (call->deadline() != std::chrono::system_clock::time_point::max()) {
          drain = std::min(drain, duration_cast<microseconds>(call->deadline() -
                                                              std::chrono::system_clock::now()));
        }
        registry_->UnloadAsync(request.name(), std::max(drain, microseconds(0)),
                               [=](const absl::StatusOr<UnloadResult>& result) {
                                 if (result.ok()) {
                                   v1::UnloadAdapterResponse reply;
                                   reply.set_version(result->version);
                                   reply.set_host_bytes_freed(result->host_bytes_freed);
                                   reply.set_device_bytes_freed(result->device_bytes_freed);
                                   *response = EncodeResponse(reply);
                                 }
                                 reactor->Finish(ToGrpcStatus(result.status()));
                               });
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::GetAdapter(Call* call, const Bytes* bytes,
                                                         Bytes* response) {
  return Answered<v1::GetAdapterRequest, v1::GetAdapterResponse>(
      call, bytes, response, [&](const v1::GetAdapterRequest& request) {
        return WithAdapter<v1::GetAdapterResponse>(registry_->Get(request.name()));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::ListAdapters(Call* call, const Bytes* bytes,
                                                           Bytes* response) {
  return Answered<v1::ListAdaptersRequest, v1::ListAdaptersResponse>(
      call, bytes, response,
      [&](const v1::ListAdaptersRequest& request) -> absl::StatusOr<v1::ListAdaptersResponse> {
        if (request.page_size() < 0 || request.page_size() > kMaxPage) {
          return absl::InvalidArgumentError(absl::StrCat("page_size: ", request.page_size(),
                                                         " is not in [0, ", kMaxPage, "]"));
        }
        const int32_t page = request.page_size() > 0 ? request.page_size() : kDefaultPage;
        std::vector<AdapterInfo> found =
            registry_->List({.name_prefix = request.name_prefix(),
                             .version = request.version(),
                             .in_host_only = request.in_host_only(),
                             .on_device_only = request.on_device_only(),
                             .after = request.page_token(),
                             .limit = page + 1});
        v1::ListAdaptersResponse reply;
        if (static_cast<int32_t>(found.size()) > page) {
          found.pop_back();
          reply.set_next_page_token(found.back().name);
        }
        for (const AdapterInfo& info : found) *reply.add_adapters() = ToProto(info);
        return reply;
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::PinAdapter(Call* call, const Bytes* bytes,
                                                         Bytes* response) {
  return Answered<v1::PinAdapterRequest, v1::PinAdapterResponse>(
      call, bytes, response, [&](const v1::PinAdapterRequest& request) {
        return WithAdapter<v1::PinAdapterResponse>(
            registry_->SetPinned(request.name(), request.pinned()));
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::PrefetchAdapter(Call* call, const Bytes* bytes,
                                                              Bytes* response) {
  return Decoded<v1::PrefetchAdapterRequest>(
      call, bytes, [&](const v1::PrefetchAdapterRequest& request, Unary* reactor) {
        registry_->PrefetchAsync(
            request.name(),
            [=, registry = registry_, name = request.name()](const absl::Status& status) {
              const auto reply = status.ok()
                                     ? WithAdapter<v1::PrefetchAdapterResponse>(registry->Get(name))
                                     : status;
              if (reply.ok()) *response = EncodeResponse(*reply);
              reactor->Finish(ToGrpcStatus(reply.status()));
            });
      });
}

grpc::ServerUnaryReactor* AdapterServiceImpl::SetAlias(Call* call, const Bytes* bytes,
                                                       Bytes* response) {
  return Answered<v1::SetAliasRequest, v1::SetAliasResponse>(
      call, bytes, response, [&](const v1::SetAliasRequest& request) {
        std::vector<AdapterTarget> targets;
        for (const v1::AdapterTarget& target : request.targets()) {
          targets.push_back({target.target(), target.weight()});
        }
        return WithAdapter<v1::SetAliasResponse>(registry_->SetAlias(request.alias(), targets));
      });
}

grpc::ServerWriteReactor<v1::AdapterEvent>* AdapterServiceImpl::WatchAdapters(
    Call*, const v1::WatchAdaptersRequest*) {
  return AdapterWatchCall::Start(registry_, front_);
}

grpc::ServerUnaryReactor* AdapterServiceImpl::PlanCapacity(Call* call, const Bytes* bytes,
                                                           Bytes* response) {
  return Answered<v1::PlanCapacityRequest, v1::PlanCapacityResponse>(
      call, bytes, response, [&](const v1::PlanCapacityRequest& request) {
        return lorikeet::PlanCapacity(request, options_.capacity);
      });
}

}  // namespace lorikeet
