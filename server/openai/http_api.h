// Every path of the HTTP port.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/registry.h"
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
  // What there is once the model is loaded. Everything pointed to outlives the HTTP server.
  struct Serving {
    const ServingContext* context = nullptr;
    AdapterRegistry* registry = nullptr;
  };

  explicit HttpApi(Probes probes) : probes_(std::move(probes)) {}

  // Until then what needs a model is 503. Once.
  void Serve(const Serving& serving);

  std::unique_ptr<HttpAnswer> Handle(HttpRequest request, const std::function<void()>& wake) const;

 private:
  using Wake = std::function<void()>;
  using Answer = absl::StatusOr<std::unique_ptr<HttpAnswer>>;
  struct Route {
    const char* method;
    const char* path;
    Answer (HttpApi::*handle)(const HttpRequest&, const Wake&) const;
    bool needs_model;
  };
  static const Route kRoutes[];

  Answer Health(const HttpRequest& request, const Wake& wake) const;
  Answer Ready(const HttpRequest& request, const Wake& wake) const;
  Answer Metrics(const HttpRequest& request, const Wake& wake) const;
  Answer Version(const HttpRequest& request, const Wake& wake) const;
  Answer Completions(const HttpRequest& request, const Wake& wake) const;
  Answer ChatCompletions(const HttpRequest& request, const Wake& wake) const;
  Answer Models(const HttpRequest& request, const Wake& wake) const;
  Answer Tokenize(const HttpRequest& request, const Wake& wake) const;
  Answer Detokenize(const HttpRequest& request, const Wake& wake) const;

  const Probes probes_;
  Serving serving_;
  std::atomic<bool> has_model_{false};  // serving_ is there for good
};

}  // namespace lorikeet
