#include "server/openai/http_api.h"

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"
#include "server/generation_request.h"
#include "server/http/errors.h"
#include "server/http/late_reply.h"
#include "server/openai/adapter_routes.h"
#include "server/openai/generate.h"
#include "server/openai/request.h"
#include "server/version.h"

namespace lorikeet {
namespace {

constexpr char kText[] = "text/plain; charset=utf-8";

std::unique_ptr<HttpAnswer> Respond(HttpResponse response) {
  return std::make_unique<HttpReply>(std::move(response));
}
std::unique_ptr<HttpAnswer> RespondText(int status, std::string text) {
  return Respond({.status = status, .body = std::move(text), .content_type = kText});
}
std::unique_ptr<HttpAnswer> RespondJson(const Json& json) { return Respond({.body = Dump(json)}); }

bool Matches(std::string_view method, std::string_view given) {
  return given == method || (given == "HEAD" && method == "GET");
}

Json ModelCard(const std::string& id, int64_t created_s) {
  return {{"id", id}, {"object", "model"}, {"created", created_s}, {"owned_by", "lorikeet"}};
}

}  // namespace

const HttpApi::Route HttpApi::kRoutes[] = {
    {"GET", "/health", &HttpApi::Health, {.open = true}, false},
    {"GET", "/ping", &HttpApi::Health, {.open = true}, false},
    {"GET", "/ready", &HttpApi::Ready, {.open = true}, false},
    {"GET", "/version", &HttpApi::Version, {.open = true}, false},
    {"GET", "/metrics", &HttpApi::Metrics, {.role = Role::kMetrics}, false},
    {"POST", "/v1/completions", &HttpApi::Completions, {.role = Role::kGenerate}, true},
    {"POST", "/v1/chat/completions", &HttpApi::ChatCompletions, {.role = Role::kGenerate}, true},
    {"GET", "/v1/models", &HttpApi::Models, {}, true},
    {"POST", "/tokenize", &HttpApi::Tokenize, {.role = Role::kGenerate}, true},
    {"POST", "/detokenize", &HttpApi::Detokenize, {.role = Role::kGenerate}, true},
    {"POST", "/v1/load_lora_adapter", &HttpApi::LoadVllm, {.role = Role::kAdaptersWrite}, true},
    {"POST", "/v1/unload_lora_adapter", &HttpApi::UnloadVllm, {.role = Role::kAdaptersWrite}, true},
    {"POST", "/load_lora_adapter", &HttpApi::LoadSglang, {.role = Role::kAdaptersWrite}, true},
    {"POST", "/unload_lora_adapter", &HttpApi::UnloadSglang, {.role = Role::kAdaptersWrite}, true},
};

void HttpApi::Serve(const ServingContext* context, AdapterAdmin* admin) {
  context_ = context;
  admin_ = admin;
  has_model_ = true;
}

std::unique_ptr<HttpAnswer> HttpApi::Handle(HttpRequest request, const Wake& wake) const {
  std::vector<std::string> allowed;
  for (const Route& route : kRoutes) {
    if (request.path != route.path) continue;
    allowed.push_back(route.method);
    if (!Matches(route.method, request.method)) continue;
    Call call{std::move(request), {}, wake};
    const absl::Status admitted = Admit(route, &call);
    if (!admitted.ok()) return Respond(ErrorResponse(admitted));
    Answer answer = (this->*route.handle)(call);
    return answer.ok() ? *std::move(answer) : Respond(ErrorResponse(answer.status()));
  }
  if (allowed.empty()) {
    return Respond(ErrorResponse(404, absl::StrCat("there is nothing at ", request.path)));
  }
  const std::string list = absl::StrJoin(allowed, ", ");
  HttpResponse refused = ErrorResponse(
      405, absl::StrCat(request.method, " is not for ", request.path, "; only ", list));
  refused.headers = absl::StrCat("Allow: ", list, "\r\n");
  return Respond(std::move(refused));
}

absl::Status HttpApi::Admit(const Route& route, Call* call) const {
  if (!route.door.open) {
    HttpRequest& request = call->request;
    LK_ASSIGN_OR_RETURN(call->client, access_->Admit({std::move(request.authorization),
                                                      std::move(request.certificate_names),
                                                      std::move(request.peer)},
                                                     route.door.role));
  }
  if (!route.needs_model || has_model_) return absl::OkStatus();
  return absl::UnavailableError("the model is being loaded");
}

HttpApi::Answer HttpApi::Health(const Call&) const {
  const absl::Status health = probes_.health();
  if (health.ok()) return RespondText(200, "ok\n");
  return RespondText(503, absl::StrCat(health.message(), "\n"));
}

HttpApi::Answer HttpApi::Ready(const Call&) const {
  if (probes_.ready()) return RespondText(200, "ready\n");
  return RespondText(503, "not ready\n");
}

HttpApi::Answer HttpApi::Metrics(const Call&) const {
  return Respond({.body = probes_.metrics(), .content_type = "text/plain; version=0.0.4"});
}

HttpApi::Answer HttpApi::Version(const Call&) const {
  return RespondJson({{"version", kVersion}});
}

HttpApi::Answer HttpApi::Completions(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  LK_ASSIGN_OR_RETURN(OpenAiRequest parsed, ParseCompletion(body));
  return StartGeneration(*context_, *call.client.caller, std::move(parsed), call.wake);
}

HttpApi::Answer HttpApi::ChatCompletions(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  LK_ASSIGN_OR_RETURN(OpenAiRequest parsed, ParseChat(body));
  return StartGeneration(*context_, *call.client.caller, std::move(parsed), call.wake);
}

HttpApi::Answer HttpApi::Models(const Call& call) const {
  const ServingContext& context = *context_;
  Json models = Json::array();
  Json base = ModelCard(context.model_name, context.started_unix_s);
  base["root"] = context.model_name;
  base["parent"] = nullptr;
  base["max_model_len"] = context.max_context_tokens;
  models.push_back(std::move(base));
  for (const AdapterInfo& info : admin_->Visible(*call.client.caller)) {
    Json card = ModelCard(info.name, info.loaded_at_unix_us / 1'000'000);
    card["root"] = info.path;
    card["parent"] = context.model_name;
    card["version"] = info.version;
    models.push_back(std::move(card));
  }
  return RespondJson({{"object", "list"}, {"data", std::move(models)}});
}

HttpApi::Answer HttpApi::Tokenize(const Call& call) const {
  const ServingContext& context = *context_;
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  Fields fields(body);
  std::string model, prompt;
  bool add_special = true, add_generation_prompt = true;
  fields.Read("model", &model);
  fields.Read("prompt", &prompt);
  fields.Read("add_special_tokens", &add_special);
  fields.Read("add_generation_prompt", &add_generation_prompt);
  const Json* messages = fields.Take("messages");
  LK_RETURN_IF_ERROR(fields.Finish());
  LK_RETURN_IF_ERROR(ResolveModel(context, *call.client.caller, model).status());
  std::vector<int32_t> ids;
  if (messages != nullptr) {
    ChatRequest chat;
    chat.add_generation_prompt = add_generation_prompt;
    LK_ASSIGN_OR_RETURN(chat.messages_json, TemplateMessages(*messages));
    LK_ASSIGN_OR_RETURN(ids, EncodeChat(context, chat));
  } else {
    LK_ASSIGN_OR_RETURN(ids, context.tokenizer->Encode(prompt, add_special));
  }
  return RespondJson({{"tokens", ids},
                      {"count", ids.size()},
                      {"max_model_len", context.max_context_tokens}});
}

HttpApi::Answer HttpApi::Detokenize(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  Fields fields(body);
  std::string model;
  std::vector<int32_t> ids;
  fields.Read("model", &model);
  fields.Read("tokens", &ids);
  LK_RETURN_IF_ERROR(fields.Finish());
  LK_RETURN_IF_ERROR(ResolveModel(*context_, *call.client.caller, model).status());
  LK_RETURN_IF_ERROR(ValidateTokenIds(ids, "tokens", context_->vocab_size));
  LK_ASSIGN_OR_RETURN(const std::string text,
                      context_->tokenizer->Decode(ids, /*skip_special=*/false));
  return RespondJson({{"prompt", text}});
}

HttpApi::Answer HttpApi::LoadVllm(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const v1::LoadAdapterRequest request, ParseLoad(call.request.body));
  auto answer = std::make_unique<LateReply>(call.wake);
  admin_->Load(call.client, request,
               [bring = answer->bring(), name = request.name()](const auto& reply) {
                 bring(VllmAnswer(reply.status(), name, "added"));
               });
  return answer;
}

HttpApi::Answer HttpApi::UnloadVllm(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const v1::UnloadAdapterRequest request, ParseUnload(call.request.body));
  auto answer = std::make_unique<LateReply>(call.wake);
  admin_->Unload(call.client, request, std::nullopt,
                 [bring = answer->bring(), name = request.name()](const auto& reply) {
                   bring(VllmAnswer(reply.status(), name, "removed"));
                 });
  return answer;
}

HttpApi::Answer HttpApi::LoadSglang(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const v1::LoadAdapterRequest request, ParseLoad(call.request.body));
  auto answer = std::make_unique<LateReply>(call.wake);
  admin_->Load(call.client, request, [this, bring = answer->bring(),
                                      caller = call.client.caller](const auto& reply) {
    bring(SglangAnswer(reply.status(), admin_->Visible(*caller)));
  });
  return answer;
}

HttpApi::Answer HttpApi::UnloadSglang(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const v1::UnloadAdapterRequest request, ParseUnload(call.request.body));
  auto answer = std::make_unique<LateReply>(call.wake);
  admin_->Unload(call.client, request, std::nullopt,
                 [this, bring = answer->bring(), caller = call.client.caller](const auto& reply) {
                   bring(SglangAnswer(reply.status(), admin_->Visible(*caller)));
                 });
  return answer;
}

}  // namespace lorikeet
