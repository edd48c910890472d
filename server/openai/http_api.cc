#include "server/openai/http_api.h"

#include <chrono>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"
#include "server/generation_request.h"
#include "server/http/errors.h"
#include "server/openai/adapter_admin.h"
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
    {"GET", "/health", &HttpApi::Health, false},
    {"GET", "/ping", &HttpApi::Health, false},
    {"GET", "/ready", &HttpApi::Ready, false},
    {"GET", "/metrics", &HttpApi::Metrics, false},
    {"GET", "/version", &HttpApi::Version, false},
    {"POST", "/v1/completions", &HttpApi::Completions, true},
    {"POST", "/v1/chat/completions", &HttpApi::ChatCompletions, true},
    {"GET", "/v1/models", &HttpApi::Models, true},
    {"POST", "/tokenize", &HttpApi::Tokenize, true},
    {"POST", "/detokenize", &HttpApi::Detokenize, true},
    {"POST", "/v1/load_lora_adapter", &HttpApi::LoadVllm, true},
    {"POST", "/v1/unload_lora_adapter", &HttpApi::UnloadVllm, true},
    {"POST", "/load_lora_adapter", &HttpApi::LoadSglang, true},
    {"POST", "/unload_lora_adapter", &HttpApi::UnloadSglang, true},
};

void HttpApi::Serve(const Serving& serving) {
  serving_ = serving;
  has_model_ = true;
}

std::unique_ptr<HttpAnswer> HttpApi::Handle(HttpRequest request, const Wake& wake) const {
  std::vector<std::string> allowed;
  for (const Route& route : kRoutes) {
    if (request.path != route.path) continue;
    allowed.push_back(route.method);
    if (!Matches(route.method, request.method)) continue;
    if (route.needs_model && !has_model_) {
      return Respond(ErrorResponse(503, "the model is being loaded"));
    }
    Answer answer = (this->*route.handle)(request, wake);
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

HttpApi::Answer HttpApi::Health(const HttpRequest&, const Wake&) const {
  const absl::Status health = probes_.health();
  if (health.ok()) return RespondText(200, "ok\n");
  return RespondText(503, absl::StrCat(health.message(), "\n"));
}

HttpApi::Answer HttpApi::Ready(const HttpRequest&, const Wake&) const {
  if (probes_.ready()) return RespondText(200, "ready\n");
  return RespondText(503, "not ready\n");
}

HttpApi::Answer HttpApi::Metrics(const HttpRequest&, const Wake&) const {
  return Respond({.body = probes_.metrics(), .content_type = "text/plain; version=0.0.4"});
}

HttpApi::Answer HttpApi::Version(const HttpRequest&, const Wake&) const {
  return RespondJson({{"version", kVersion}});
}

HttpApi::Answer HttpApi::Completions(const HttpRequest& request, const Wake& wake) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(request.body));
  LK_ASSIGN_OR_RETURN(OpenAiRequest parsed, ParseCompletion(body));
  return StartGeneration(*serving_.context, std::move(parsed), wake);
}

HttpApi::Answer HttpApi::ChatCompletions(const HttpRequest& request, const Wake& wake) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(request.body));
  LK_ASSIGN_OR_RETURN(OpenAiRequest parsed, ParseChat(body));
  return StartGeneration(*serving_.context, std::move(parsed), wake);
}

HttpApi::Answer HttpApi::Models(const HttpRequest&, const Wake&) const {
  const ServingContext& context = *serving_.context;
  Json models = Json::array();
  Json base = ModelCard(context.model_name, context.started_unix_s);
  base["root"] = context.model_name;
  base["parent"] = nullptr;
  base["max_model_len"] = context.max_context_tokens;
  models.push_back(std::move(base));
  for (const AdapterInfo& info : serving_.registry->List({})) {
    Json card = ModelCard(info.name, info.loaded_at_unix_us / 1'000'000);
    card["root"] = info.path;
    card["parent"] = context.model_name;
    card["version"] = info.version;
    models.push_back(std::move(card));
  }
  return RespondJson({{"object", "list"}, {"data", std::move(models)}});
}

HttpApi::Answer HttpApi::Tokenize(const HttpRequest& request, const Wake&) const {
  const ServingContext& context = *serving_.context;
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(request.body));
  Fields fields(body);
  std::string model, prompt;
  bool add_special = true, add_generation_prompt = true;
  fields.Read("model", &model);
  fields.Read("prompt", &prompt);
  fields.Read("add_special_tokens", &add_special);
  fields.Read("add_generation_prompt", &add_generation_prompt);
  const Json* messages = fields.Take("messages");
  LK_RETURN_IF_ERROR(fields.Finish());
  LK_RETURN_IF_ERROR(ResolveModel(context, model).status());
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

HttpApi::Answer HttpApi::Detokenize(const HttpRequest& request, const Wake&) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(request.body));
  Fields fields(body);
  std::string model;
  std::vector<int32_t> ids;
  fields.Read("model", &model);
  fields.Read("tokens", &ids);
  LK_RETURN_IF_ERROR(fields.Finish());
  LK_RETURN_IF_ERROR(ResolveModel(*serving_.context, model).status());
  LK_RETURN_IF_ERROR(ValidateTokenIds(ids, "tokens", serving_.context->vocab_size));
  LK_ASSIGN_OR_RETURN(const std::string text,
                      serving_.context->tokenizer->Decode(ids, /*skip_special=*/false));
  return RespondJson({{"prompt", text}});
}

HttpApi::Answer HttpApi::LoadVllm(const HttpRequest& request, const Wake& wake) const {
  LK_ASSIGN_OR_RETURN(const AdapterOrder order, ParseLoad(request.body));
  return StartLoad(*serving_.registry, serving_.context->metrics, order, wake,
                   [order](const absl::StatusOr<AdapterInfo>& info) {
                     return VllmAnswer(info.status(), order.name, "added");
                   });
}

HttpApi::Answer HttpApi::UnloadVllm(const HttpRequest& request, const Wake& wake) const {
  LK_ASSIGN_OR_RETURN(const AdapterOrder order, ParseUnload(request.body));
  return StartUnload(*serving_.registry, serving_.unload_drain, order, wake,
                     [order](const absl::StatusOr<UnloadResult>& result) {
                       return VllmAnswer(result.status(), order.name, "removed");
                     });
}

HttpApi::Answer HttpApi::LoadSglang(const HttpRequest& request, const Wake& wake) const {
  LK_ASSIGN_OR_RETURN(const AdapterOrder order, ParseLoad(request.body));
  return StartLoad(*serving_.registry, serving_.context->metrics, order, wake,
                   [registry = serving_.registry](const absl::StatusOr<AdapterInfo>& info) {
                     return SglangAnswer(info.status(), *registry);
                   });
}

HttpApi::Answer HttpApi::UnloadSglang(const HttpRequest& request, const Wake& wake) const {
  LK_ASSIGN_OR_RETURN(const AdapterOrder order, ParseUnload(request.body));
  return StartUnload(*serving_.registry, serving_.unload_drain, order, wake,
                     [registry = serving_.registry](const absl::StatusOr<UnloadResult>& result) {
                       return SglangAnswer(result.status(), *registry);
                     });
}

}  // namespace lorikeet
