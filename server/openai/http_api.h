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

namespace lorikeet {

// Thread-safe.
class HttpApi {
 public:
  struct Probes {
    std::function<absl::Status()> health;  // not OK: no request will be served any more
    std::function<bool()> ready;           // can requests be served now?
    std::function<std::string()> metrics;  // Prometheus text
  };
  // `access` outlives it.
  HttpApi(Probes probes, Access* access) : probes_(std::move(probes)), access_(access) {}

  // Until then what needs a model is 503. Once. Both outlive the HTTP server.
  void Serve(const ServingContext* context, AdapterAdmin* admin);

  std::unique_ptr<HttpAnswer> Handle(HttpRequest request, const std::function<void()>& wake) const;

 private:
  using Wake = std::function<void()>;
  struct Call {
    HttpRequest request;
    Client client;  // nobody on open paths
    Wake wake;
  };
  using Answer = absl::StatusOr<std::unique_ptr<HttpAnswer>>;
  // Who may ask: anyone, or whoever is known and has the role, if one is named.
  struct Door {
    bool open = false;
    std::optional<Role> role;
  };
  struct Route {
    const char* method;
    const char* path;
    Answer (HttpApi::*handle)(const Call&) const;
    Door door;
    bool needs_model;
  };
  static const Route kRoutes[];

  Answer Health(const Call& call) const;
  Answer Ready(const Call& call) const;
  Answer Metrics(const Call& call) const;
  Answer Version(const Call& call) const;
  Answer Completions(const Call& call) const;
  Answer ChatCompletions(const Call& call) const;
  Answer Models(const Call& call) const;
  Answer Tokenize(const Call& call) const;
  Answer Detokenize(const Call& call) const;
  Answer LoadVllm(const Call& call) const;
  Answer UnloadVllm(const Call& call) const;
  Answer LoadSglang(const Call& call) const;
  Answer UnloadSglang(const Call& call) const;

  absl::Status Admit(const Route& route, Call* call) const;

  const Probes probes_;
  Access* const access_;
  const ServingContext* context_ = nullptr;
  AdapterAdmin* admin_ = nullptr;
  std::atomic<bool> has_model_{false};  // both are there for good
};

}  // namespace lorikeet
