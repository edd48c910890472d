#include "server/openai/http_api.h"

#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"
#include "server/generation_request.h"
#include "server/http/errors.h"
#include "server/listen.h"
#include "server/log.h"
#include "server/openai/adapter_rest.h"
#include "server/openai/adapter_routes.h"
#include "server/openai/embeddings.h"
#include "server/openai/generate.h"
#include "server/openai/proto_json.h"
#include "server/openai/with_text.h"
#include "server/request_origin.h"
#include "server/version.h"
#include "server/web/web_files.h"

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

constexpr Door kOpen{.open = true};
constexpr Door kAnyKey{};
constexpr Door kGenerate{.role = Role::kGenerate};
constexpr Door kRead{.role = Role::kAdaptersRead};
constexpr Door kWrite{.role = Role::kAdaptersWrite};
constexpr Door kMetrics{.role = Role::kMetrics};

// Whether `path` is `pattern`, in which "{name}" stands for one part, which `name` gets.
bool Leads(std::string_view path, std::string_view pattern, std::string* name) {
  constexpr std::string_view kName = "{name}";
  const size_t at = pattern.find(kName);
  if (at == std::string_view::npos) return path == pattern;
  const std::string_view before = pattern.substr(0, at), behind = pattern.substr(at + kName.size());
  if (path.size() <= before.size() + behind.size() || !path.starts_with(before) ||
      !path.ends_with(behind)) {
    return false;
  }
  path.remove_prefix(before.size());
  path.remove_suffix(behind.size());
  absl::StatusOr<std::string> decoded = DecodeUrl(path);
  if (!decoded.ok() || path.find('/') != std::string_view::npos) return false;
  *name = *std::move(decoded);
  return true;
}

ToolStyle ToolStyleOf(const ChatTemplate* chat) {
  return chat == nullptr ? ToolStyle::kNone : chat->tool_style();
}

// Whether a web page of another server asks: its reader's browser reaches loopback too. Without a
// certificate the owner of a host name can lead it here after the page was read.
bool IsForeignPage(const HttpRequest& request) {
  if (request.origin.empty() || request.origin == "https://" + request.host) return false;
  return request.origin != "http://" + request.host || !IsFixedHost(request.host);
}

bool Matches(std::string_view method, std::string_view given) {
  return given == method || (given == "HEAD" && method == "GET");
}

Json ModelCard(const std::string& id, int64_t created_s) {
  return {{"id", id}, {"object", "model"}, {"created", created_s}, {"owned_by", "lorikeet"}};
}

}  // namespace

const HttpApi::Route HttpApi::kRoutes[] = {
    {"GET", "/health", &HttpApi::Health, kOpen, false},
    {"GET", "/ping", &HttpApi::Health, kOpen, false},
    {"GET", "/ready", &HttpApi::Ready, kOpen, false},
    {"GET", "/version", &HttpApi::Version, kOpen, false},
    {"GET", "/", &HttpApi::Page, kOpen, false},
    {"GET", "/web/{name}", &HttpApi::Page, kOpen, false},
    {"GET", "/metrics", &HttpApi::Metrics, kMetrics, false},
    {"GET", "/log_level", &HttpApi::GetLogLevel, kWrite, false},
    {"POST", "/log_level", &HttpApi::SetLogLevel, kWrite, false},
    {"POST", "/v1/completions", &HttpApi::Completions, kGenerate, true},
    {"POST", "/v1/chat/completions", &HttpApi::ChatCompletions, kGenerate, true},
    {"POST", "/v1/embeddings", &HttpApi::Embeddings, kGenerate, true},
    {"GET", "/v1/models", &HttpApi::Models, kAnyKey, true},
    {"GET", "/v1/models/{name}", &HttpApi::Model, kAnyKey, true},
    {"POST", "/tokenize", &HttpApi::Tokenize, kGenerate, true},
    {"POST", "/detokenize", &HttpApi::Detokenize, kGenerate, true},
    {"POST", "/v1/load_lora_adapter", &HttpApi::Admin<LoadVllm>, kWrite, true},
    {"POST", "/v1/unload_lora_adapter", &HttpApi::Admin<UnloadVllm>, kWrite, true},
    {"POST", "/load_lora_adapter", &HttpApi::Admin<LoadSglang>, kWrite, true},
    {"POST", "/unload_lora_adapter", &HttpApi::Admin<UnloadSglang>, kWrite, true},
    {"GET", "/v1/adapters", &HttpApi::Admin<rest::ListAdapters>, kRead, true},
    {"POST", "/v1/adapters", &HttpApi::Admin<rest::LoadAdapter>, kWrite, true},
    {"GET", "/v1/adapters/{name}", &HttpApi::Admin<rest::GetAdapter>, kRead, true},
    {"DELETE", "/v1/adapters/{name}", &HttpApi::Admin<rest::UnloadAdapter>, kWrite, true},
    {"POST", "/v1/adapters/{name}/reload", &HttpApi::Admin<rest::ReloadAdapter>, kWrite, true},
    {"POST", "/v1/adapters/{name}/pin", &HttpApi::Admin<rest::PinAdapter>, kWrite, true},
    {"POST", "/v1/adapters/{name}/prefetch", &HttpApi::Admin<rest::PrefetchAdapter>, kWrite, true},
    {"POST", "/v1/adapters/{name}/alias", &HttpApi::Admin<rest::SetAlias>, kWrite, true},
    {"POST", "/v1/plan_capacity", &HttpApi::Admin<rest::PlanCapacity>, kRead, true},
};

void HttpApi::Serve(const ServingContext* context, AdapterAdmin* admin) {
  context_ = context;
  admin_ = admin;
  has_model_ = true;
}

const HttpApi::Route* HttpApi::RouteOf(const HttpRequest& request, std::string* name,
                                       HttpResponse* refusal) {
  std::vector<std::string> allowed;
  for (const Route& route : kRoutes) {
    if (!Leads(request.path, route.path, name)) continue;
    if (Matches(route.method, request.method)) return &route;
    allowed.push_back(route.method);
  }
  if (allowed.empty()) {
    *refusal = ErrorResponse(404, absl::StrCat("there is nothing at ", request.path));
    return nullptr;
  }
  const std::string list = absl::StrJoin(allowed, ", ");
  *refusal = ErrorResponse(
      405, absl::StrCat(request.method, " is not for ", request.path, "; only ", list));
  refusal->headers = absl::StrCat("Allow: ", list, "\r\n");
  return nullptr;
}

std::optional<HttpResponse> HttpApi::Refusal(const HttpRequest& head) const {
  std::string name;
  HttpResponse refusal;
  const Route* route = RouteOf(head, &name, &refusal);
  if (route == nullptr) return refusal;
  if (route->door.open) return std::nullopt;
  const absl::Status known = access_->Check(
      {head.authorization, head.certificate_names, head.peer, route->name()}, route->door.role);
  if (known.ok()) return std::nullopt;
  return ErrorResponse(known);
}

std::unique_ptr<HttpAnswer> HttpApi::Handle(HttpRequest request, const Wake& wake) const {
  std::string name;
  HttpResponse refusal;
  const Route* route = RouteOf(request, &name, &refusal);
  if (route == nullptr) return Respond(std::move(refusal));
  Call call{std::move(request), std::move(name), {}, wake};
  const absl::Status admitted = Admit(*route, &call);
  if (!admitted.ok()) return Respond(ErrorResponse(admitted));
  Answer answer = (this->*route->handle)(call);
  return answer.ok() ? *std::move(answer) : Respond(ErrorResponse(answer.status()));
}

absl::Status HttpApi::Admit(const Route& route, Call* call) const {
  if (!route.door.open) {
    HttpRequest& request = call->request;
    const Credentials credentials{std::move(request.authorization),
                                  std::move(request.certificate_names), std::move(request.peer),
                                  route.name()};
    LK_ASSIGN_OR_RETURN(call->client, access_->Admit(credentials, route.door.role));
    if (route.door.role == Role::kAdaptersWrite && call->client.caller->id.empty() &&
        IsForeignPage(request)) {
      const absl::Status refusal = absl::PermissionDeniedError(absl::StrCat(
          "a page of ", request.origin, " changes adapters only with a key (serve --keys)"));
      access_->NoteRefusal(credentials, call->client.caller.get(), refusal);
      return refusal;
    }
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

HttpApi::Answer HttpApi::GetLogLevel(const Call&) const {
  return RespondJson({{"level", LogLevelName(CurrentLogLevel())}});
}

absl::StatusOr<LogLevel> HttpApi::TakeLogLevel(const Call& call) const {
  if (!call.client.caller->SeesAll()) {
    return absl::PermissionDeniedError(absl::StrCat(
        "key '", call.client.caller->id, "' is for some adapters; the log is of all of them"));
  }
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  Fields fields(body);
  std::string name;
  fields.Read("level", &name);
  LK_RETURN_IF_ERROR(fields.Finish());
  return ParseLogLevel(name);
}

HttpApi::Answer HttpApi::SetLogLevel(const Call& call) const {
  const absl::StatusOr<LogLevel> level = TakeLogLevel(call);
  audit_->Write({.caller = call.client.caller.get(),
                 .peer = call.client.peer,
                 .action = "SetLogLevel",
                 .level = level.ok() ? LogLevelName(*level) : "",
                 .outcome = level.status()});
  LK_RETURN_IF_ERROR(level.status());
  lorikeet::SetLogLevel(*level);
  return GetLogLevel(call);
}

HttpApi::Answer HttpApi::Page(const Call& call) const {
  for (const WebFile& file : kWebFiles) {
    if (call.request.path != file.path) continue;
    return Respond({.body = std::string(file.content),
                    .content_type = file.content_type,
                    .headers = "Cache-Control: no-cache\r\n"
                               "Content-Security-Policy: default-src 'self'; "
                               "frame-ancestors 'none'\r\n"});
  }
  return Respond(ErrorResponse(404, absl::StrCat("there is nothing at ", call.request.path)));
}

HttpApi::Answer HttpApi::Generate(const Call& call, OpenAiRequest parsed) const {
  const RequestOrigin origin = MakeOrigin(call.request.request_id, call.request.traceparent);
  for (GenerationInput& input : parsed.inputs) input.origin = origin;
  parsed.output.request_id = origin.id;
  return StartGeneration(*context_, *call.client.caller, std::move(parsed), call.wake);
}

HttpApi::Answer HttpApi::Completions(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  LK_ASSIGN_OR_RETURN(OpenAiRequest parsed, ParseCompletion(body));
  return Generate(call, std::move(parsed));
}

HttpApi::Answer HttpApi::ChatCompletions(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  const auto answer = [this, call, body](const ModelText& text) -> Answer {
    LK_ASSIGN_OR_RETURN(OpenAiRequest parsed, ParseChat(body, ToolStyleOf(text.chat_template)));
    return Generate(call, std::move(parsed));
  };
  // How a model calls tools is up to its template, which its adapter may bring.
  const auto model = body.find("model");
  if (!body.contains("tools") || model == body.end() || !model->is_string()) {
    return answer(context_->text);
  }
  LK_ASSIGN_OR_RETURN(ResolvedModel resolved, ResolveModel(*context_, *call.client.caller,
                                                           model->get<std::string>()));
  return WithText(*context_, std::move(resolved), call, answer);
}

HttpApi::Answer HttpApi::Embeddings(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  LK_ASSIGN_OR_RETURN(EmbeddingRequest parsed, ParseEmbedding(body, context_->hidden_size));
  const RequestOrigin origin = MakeOrigin(call.request.request_id, call.request.traceparent);
  for (GenerationInput& input : parsed.inputs) input.origin = origin;
  return StartEmbeddings(*context_, call.client.caller, std::move(parsed), call.wake);
}

Json HttpApi::BaseCard() const {
  Json card = ModelCard(context_->model_name, context_->started_unix_s);
  card["root"] = context_->model_name;
  card["parent"] = nullptr;
  card["max_model_len"] = context_->max_context_tokens;
  return card;
}

// Where an adapter lies on the server is for who may read of adapters.
Json HttpApi::AdapterCard(const Identity& caller, const AdapterInfo& info) const {
  Json card = ModelCard(info.name, info.loaded_at_unix_us / 1'000'000);
  card["root"] = caller.Has(Role::kAdaptersRead) ? info.path : info.name;
  card["parent"] = context_->model_name;
  card["version"] = info.version;
  return card;
}

HttpApi::Answer HttpApi::Models(const Call& call) const {
  Json models = Json::array({BaseCard()});
  for (const AdapterInfo& info : admin_->Visible(*call.client.caller)) {
    models.push_back(AdapterCard(*call.client.caller, info));
  }
  return RespondJson({{"object", "list"}, {"data", std::move(models)}});
}

HttpApi::Answer HttpApi::Model(const Call& call) const {
  if (call.name == context_->model_name) return RespondJson(BaseCard());
  LK_ASSIGN_OR_RETURN(const AdapterInfo info, admin_->Find(*call.client.caller, call.name));
  return RespondJson(AdapterCard(*call.client.caller, info));
}

HttpApi::Answer HttpApi::Tokenize(const Call& call) const {
  const ServingContext& context = *context_;
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  Fields fields(body);
  std::string model;
  std::optional<std::string> prompt;
  bool add_special = true, add_generation_prompt = true;
  fields.Read("model", &model);
  fields.Read("prompt", &prompt);
  fields.Read("add_special_tokens", &add_special);
  fields.Read("add_generation_prompt", &add_generation_prompt);
  const Json* messages = fields.Take("messages");
  LK_RETURN_IF_ERROR(fields.Finish());
  if (prompt.has_value() == (messages != nullptr)) {
    return FieldError("prompt", "one of prompt and messages is needed, not both");
  }
  LK_ASSIGN_OR_RETURN(ResolvedModel resolved, ResolveModel(context, *call.client.caller, model));
  std::optional<ChatRequest> chat;
  if (messages != nullptr) {
    chat.emplace().add_generation_prompt = add_generation_prompt;
    LK_ASSIGN_OR_RETURN(chat->messages_json, TemplateMessages(*messages));
  }
  const auto answer = [&context, prompt, chat, add_special](const ModelText& text) -> Answer {
    std::vector<int32_t> ids;
    if (chat) {
      ChatRequest asked = *chat;
      LK_ASSIGN_OR_RETURN(const std::string written, RenderChat(context, text, asked));
      LK_ASSIGN_OR_RETURN(ids, text.tokenizer->Encode(written, /*add_special=*/false));
    } else {
      LK_ASSIGN_OR_RETURN(ids, text.tokenizer->Encode(*prompt, add_special));
    }
    return RespondJson({{"tokens", ids},
                        {"count", ids.size()},
                        {"max_model_len", context.max_context_tokens}});
  };
  return WithText(context, std::move(resolved), call, answer);
}

HttpApi::Answer HttpApi::Detokenize(const Call& call) const {
  LK_ASSIGN_OR_RETURN(const Json body, ParseBody(call.request.body));
  Fields fields(body);
  std::string model;
  std::optional<std::vector<int32_t>> ids;
  fields.Read("model", &model);
  fields.Read("tokens", &ids);
  LK_RETURN_IF_ERROR(fields.Finish());
  if (!ids) return FieldError("tokens", "missing");
  LK_ASSIGN_OR_RETURN(ResolvedModel resolved, ResolveModel(*context_, *call.client.caller, model));
  const auto answer = [ids = *ids](const ModelText& text) -> Answer {
    LK_RETURN_IF_ERROR(ValidateTokenIds(ids, "tokens", text.vocab_size));
    LK_ASSIGN_OR_RETURN(const std::string decoded,
                        text.tokenizer->Decode(ids, /*skip_special=*/false));
    return RespondJson({{"prompt", decoded}});
  };
  return WithText(*context_, std::move(resolved), call, answer);
}

}  // namespace lorikeet
