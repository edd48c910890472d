#include "server/openai/adapter_rest.h"

#include <memory>
#include <optional>
#include <string>

#include "engine/base/status_macros.h"
#include "server/http/errors.h"
#include "server/http/late_reply.h"
#include "server/openai/proto_json.h"

namespace lorikeet::rest {
namespace {

// The request in a body, which may be empty, with the path's name in its field `name_field`.
template <typename Request>
absl::StatusOr<Request> FromBody(const HttpCall& call, const char* name_field) {
  Json body = Json::object();
  if (!call.request.body.empty()) {
    LK_ASSIGN_OR_RETURN(body, ParseBody(call.request.body));
  }
  if (name_field != nullptr) {
    if (body.contains(name_field)) return FieldError(name_field, "it is in the path already");
    body[name_field] = call.name;
  }
  Request request;
  LK_RETURN_IF_ERROR(FromJson(body, &request));
  return request;
}

template <typename Request>
absl::StatusOr<Request> FromQueryOf(const HttpCall& call) {
  Request request;
  LK_RETURN_IF_ERROR(FromQuery(call.request.query, &request));
  return request;
}

template <typename Response>
HttpResponse ToResponse(const absl::StatusOr<Response>& reply) {
  if (!reply.ok()) return ErrorResponse(reply.status());
  return {.body = Dump(ToJson(*reply))};
}

template <typename Response>
HttpOutcome Now(const absl::StatusOr<Response>& reply) {
  return std::make_unique<HttpReply>(ToResponse(reply));
}

// Has `work` bring the answer.
template <typename Response, typename Work>
HttpOutcome Later(const HttpCall& call, const Work& work) {
  auto answer = std::make_unique<LateReply>(call.wake);
  work([bring = answer->bring()](const absl::StatusOr<Response>& reply) {
    bring(ToResponse(reply));
  });
  return answer;
}

}  // namespace

HttpOutcome ListAdapters(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const auto request, FromQueryOf<v1::ListAdaptersRequest>(call));
  return Now(admin.List(*call.client.caller, request));
}

HttpOutcome LoadAdapter(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const auto request, FromBody<v1::LoadAdapterRequest>(call, nullptr));
  return Later<v1::LoadAdapterResponse>(
      call, [&](auto done) { admin.Load(call.client, request, std::move(done)); });
}

HttpOutcome GetAdapter(AdapterAdmin& admin, const HttpCall& call) {
  v1::GetAdapterRequest request;
  request.set_name(call.name);
  return Now(admin.Get(*call.client.caller, request));
}

HttpOutcome UnloadAdapter(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(auto request, FromQueryOf<v1::UnloadAdapterRequest>(call));
  if (!request.name().empty()) return FieldError("name", "it is in the path already");
  request.set_name(call.name);
  return Later<v1::UnloadAdapterResponse>(call, [&](auto done) {
    admin.Unload(call.client, request, std::nullopt, std::move(done));
  });
}

HttpOutcome ReloadAdapter(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const auto request, FromBody<v1::ReloadAdapterRequest>(call, "name"));
  return Later<v1::LoadAdapterResponse>(
      call, [&](auto done) { admin.Reload(call.client, request, std::move(done)); });
}

HttpOutcome PinAdapter(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const auto request, FromBody<v1::PinAdapterRequest>(call, "name"));
  return Later<v1::PinAdapterResponse>(
      call, [&](auto done) { admin.Pin(call.client, request, std::move(done)); });
}

HttpOutcome PrefetchAdapter(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const auto request, FromBody<v1::PrefetchAdapterRequest>(call, "name"));
  return Later<v1::PrefetchAdapterResponse>(
      call, [&](auto done) { admin.Prefetch(call.client, request, std::move(done)); });
}

HttpOutcome SetAlias(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const auto request, FromBody<v1::SetAliasRequest>(call, "alias"));
  return Later<v1::SetAliasResponse>(
      call, [&](auto done) { admin.SetAlias(call.client, request, std::move(done)); });
}

HttpOutcome PlanCapacity(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const auto request, FromBody<v1::PlanCapacityRequest>(call, nullptr));
  return Now(admin.PlanCapacity(request));
}

}  // namespace lorikeet::rest
