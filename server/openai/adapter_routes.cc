#include "server/openai/adapter_routes.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/http/errors.h"
#include "server/http/late_reply.h"
#include "server/openai/fields.h"

namespace lorikeet {
namespace {

absl::StatusOr<v1::LoadAdapterRequest> ParseLoad(const std::string& body) {
  LK_ASSIGN_OR_RETURN(const Json json, ParseBody(body));
  Fields fields(json);
  bool replace = false, pin = false;
  v1::LoadAdapterRequest request;
  fields.Read("lora_name", request.mutable_name());
  fields.Read("lora_path", request.mutable_path());
  fields.Read("load_inplace", &replace);
  fields.Read("pinned", &pin);
  LK_RETURN_IF_ERROR(fields.Finish());
  if (request.name().empty()) return FieldError("lora_name", "missing");
  if (request.path().empty()) return FieldError("lora_path", "missing");
  request.set_replace(replace);
  request.set_pin(pin);
  return request;
}

absl::StatusOr<v1::UnloadAdapterRequest> ParseUnload(const std::string& body) {
  LK_ASSIGN_OR_RETURN(const Json json, ParseBody(body));
  Fields fields(json);
  v1::UnloadAdapterRequest request;
  fields.Read("lora_name", request.mutable_name());
  LK_RETURN_IF_ERROR(fields.Finish());
  if (request.name().empty()) return FieldError("lora_name", "missing");
  return request;
}

HttpResponse VllmAnswer(const absl::Status& status, const std::string& name, const char* done) {
  if (absl::IsAlreadyExists(status)) return ErrorResponse(400, std::string(status.message()));
  if (!status.ok()) return ErrorResponse(status);
  return {.body = absl::StrCat("Success: LoRA adapter '", name, "' ", done, " successfully."),
          .content_type = "text/plain; charset=utf-8"};
}

HttpResponse SglangAnswer(const absl::Status& status, const std::vector<AdapterInfo>& loaded) {
  Json names = Json::object();
  for (const AdapterInfo& info : loaded) names[info.name] = info.path;
  const Json message = status.ok() ? Json() : Json(std::string(status.message()));
  return {.status = HttpStatusOf(status),
          .body = Dump({{"success", status.ok()},
                        {"error_message", message},
                        {"loaded_adapters", std::move(names)}})};
}

}  // namespace

HttpOutcome LoadVllm(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const v1::LoadAdapterRequest request, ParseLoad(call.request.body));
  auto answer = std::make_unique<LateReply>(call.wake);
  admin.Load(call.client, request,
             [bring = answer->bring(), name = request.name()](const auto& reply) {
               bring(VllmAnswer(reply.status(), name, "added"));
             });
  return answer;
}

HttpOutcome UnloadVllm(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const v1::UnloadAdapterRequest request, ParseUnload(call.request.body));
  auto answer = std::make_unique<LateReply>(call.wake);
  admin.Unload(call.client, request, std::nullopt,
               [bring = answer->bring(), name = request.name()](const auto& reply) {
                 bring(VllmAnswer(reply.status(), name, "removed"));
               });
  return answer;
}

HttpOutcome LoadSglang(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const v1::LoadAdapterRequest request, ParseLoad(call.request.body));
  auto answer = std::make_unique<LateReply>(call.wake);
  admin.Load(call.client, request, [&admin, bring = answer->bring(),
                                    caller = call.client.caller](const auto& reply) {
    bring(SglangAnswer(reply.status(), admin.Visible(*caller)));
  });
  return answer;
}

HttpOutcome UnloadSglang(AdapterAdmin& admin, const HttpCall& call) {
  LK_ASSIGN_OR_RETURN(const v1::UnloadAdapterRequest request, ParseUnload(call.request.body));
  auto answer = std::make_unique<LateReply>(call.wake);
  admin.Unload(call.client, request, std::nullopt,
               [&admin, bring = answer->bring(), caller = call.client.caller](const auto& reply) {
                 bring(SglangAnswer(reply.status(), admin.Visible(*caller)));
               });
  return answer;
}

}  // namespace lorikeet
