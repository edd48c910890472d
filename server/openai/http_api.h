// Every path of the HTTP port.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/adapter_admin.h"
#include "server/auth/access.h"
#include "server/generation.h"
#include "server/http/message.h"
#include "server/log.h"
#include "server/openai/fields.h"
#include "server/openai/http_call.h"
#include "server/openai/request.h"

namespace lorikeet {

// Who may ask: anyone, or whoever is known and has the role, if one is named.
struct Door {
  bool open = false;
  std::optional<Role> role = {};
};

// Thread-safe.
class HttpApi {
 public:
  struct Probes {
    std::function<absl::Status()> health;  // not OK: no request will be served any more
    std::function<bool()> ready;           // can requests be served now?
    std::function<std::string()> metrics;  // Prometheus text
  };
  // `access` and `audit` outlive it.
  HttpApi(Probes probes, Access* access, AuditLog* audit)
      : probes_(std::move(probes)), access_(access), audit_(audit) {}

  // Until then what needs a model is 503. Once. Both outlive the HTTP server.
  void Serve(const ServingContext* context, AdapterAdmin* admin);

  // Why a request will not be answered whatever its body says, if so.
  std::optional<HttpResponse> Refusal(const HttpRequest& head) const;
  std::unique_ptr<HttpAnswer> Handle(HttpRequest request, const std::function<void()>& wake) const;

 private:
  using Wake = std::function<void()>;
  using Call = HttpCall;
  using Answer = HttpOutcome;
  struct Route {
    const char* method;
    const char* path;  // "{name}" in it stands for one part of a request's
    Answer (HttpApi::*handle)(const Call&) const;
    Door door;
    bool needs_model;
    std::string name() const { return std::string(method) + " " + path; }
  };
  static const Route kRoutes[];

  Answer Health(const Call& call) const;
  Answer Ready(const Call& call) const;
  Answer Metrics(const Call& call) const;
  Answer Version(const Call& call) const;
  Answer Page(const Call& call) const;
  Answer GetLogLevel(const Call& call) const;
  Answer SetLogLevel(const Call& call) const;
  Answer Generate(const Call& call, OpenAiRequest parsed) const;
  Answer Completions(const Call& call) const;
  Answer ChatCompletions(const Call& call) const;
  Answer Embeddings(const Call& call) const;
  Answer Models(const Call& call) const;
  Answer Model(const Call& call) const;
  Answer Tokenize(const Call& call) const;
  Answer Detokenize(const Call& call) const;
  template <auto kAnswer>
  Answer Admin(const Call& call) const {
    return kAnswer(*admin_, call);
  }

  // nullptr: none leads where `request` goes, and `refusal` says so. `name`: HttpCall::name.
  static const Route* RouteOf(const HttpRequest& request, std::string* name,
                              HttpResponse* refusal);
  absl::Status Admit(const Route& route, Call* call) const;
  Json BaseCard() const;
  Json AdapterCard(const Identity& caller, const AdapterInfo& info) const;
  absl::StatusOr<LogLevel> TakeLogLevel(const Call& call) const;

  const Probes probes_;
  Access* const access_;
  AuditLog* const audit_;
  const ServingContext* context_ = nullptr;
  AdapterAdmin* admin_ = nullptr;
  std::atomic<bool> has_model_{false};  // both are there for good
};

}  // namespace lorikeet
