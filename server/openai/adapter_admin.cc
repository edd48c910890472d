#include "server/openai/adapter_admin.h"

#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/http/errors.h"
#include "server/openai/fields.h"

namespace lorikeet {
namespace {

// Where a registry's thread leaves its answer. The client may be gone by then.
class Slot {
 public:
  void Put(HttpResponse response) {
    std::lock_guard lock(mutex_);
    response_ = std::move(response);
  }
  std::optional<HttpResponse> Take() {
    std::lock_guard lock(mutex_);
    return std::exchange(response_, std::nullopt);
  }

 private:
  std::mutex mutex_;
  std::optional<HttpResponse> response_;
};

class LateAnswer final : public HttpAnswer {
 public:
  explicit LateAnswer(std::shared_ptr<Slot> slot) : slot_(std::move(slot)) {}
  void Pump(HttpWriter& writer) override {
    if (auto response = slot_->Take()) writer.Reply(*std::move(response));
  }

 private:
  std::shared_ptr<Slot> slot_;
};

int64_t SteadyMicros() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

absl::StatusOr<AdapterOrder> ParseLoad(const std::string& body) {
  LK_ASSIGN_OR_RETURN(const Json json, ParseBody(body));
  Fields fields(json);
  AdapterOrder order;
  fields.Read("lora_name", &order.name);
  fields.Read("lora_path", &order.path);
  fields.Read("load_inplace", &order.replace);
  fields.Read("pinned", &order.pin);
  LK_RETURN_IF_ERROR(fields.Finish());
  if (order.name.empty()) return FieldError("lora_name", "missing");
  if (order.path.empty()) return FieldError("lora_path", "missing");
  return order;
}

absl::StatusOr<AdapterOrder> ParseUnload(const std::string& body) {
  LK_ASSIGN_OR_RETURN(const Json json, ParseBody(body));
  Fields fields(json);
  AdapterOrder order;
  fields.Read("lora_name", &order.name);
  LK_RETURN_IF_ERROR(fields.Finish());
  if (order.name.empty()) return FieldError("lora_name", "missing");
  return order;
}

std::unique_ptr<HttpAnswer> StartLoad(AdapterRegistry& registry, Metrics* metrics,
                                      const AdapterOrder& order, std::function<void()> wake,
                                      MakeResponse<AdapterInfo> respond) {
  const auto slot = std::make_shared<Slot>();
  const int64_t start_us = SteadyMicros();
  registry.LoadAsync(order.name, order.path, {.replace = order.replace, .pin = order.pin},
                     [=](absl::StatusOr<AdapterInfo> info) {
                       metrics->OnAdapterLoad(info.status(), SteadyMicros() - start_us);
                       slot->Put(respond(info));
                       wake();
                     });
  return std::make_unique<LateAnswer>(slot);
}

std::unique_ptr<HttpAnswer> StartUnload(AdapterRegistry& registry, std::chrono::microseconds drain,
                                        const AdapterOrder& order, std::function<void()> wake,
                                        MakeResponse<UnloadResult> respond) {
  const auto slot = std::make_shared<Slot>();
  registry.UnloadAsync(order.name, drain, [=](absl::StatusOr<UnloadResult> result) {
    slot->Put(respond(result));
    wake();
  });
  return std::make_unique<LateAnswer>(slot);
}

HttpResponse VllmAnswer(const absl::Status& status, const std::string& name, const char* done) {
  if (absl::IsAlreadyExists(status)) return ErrorResponse(400, std::string(status.message()));
  if (!status.ok()) return ErrorResponse(status);
  return {.body = absl::StrCat("Success: LoRA adapter '", name, "' ", done, " successfully."),
          .content_type = "text/plain; charset=utf-8"};
}

HttpResponse SglangAnswer(const absl::Status& status, const AdapterRegistry& registry) {
  Json loaded = Json::object();
  for (const AdapterInfo& info : registry.List({})) loaded[info.name] = info.path;
  const Json message = status.ok() ? Json() : Json(std::string(status.message()));
  return {.status = HttpStatusOf(status),
          .body = Dump({{"success", status.ok()},
                        {"error_message", message},
                        {"loaded_adapters", std::move(loaded)}})};
}

}  // namespace lorikeet
