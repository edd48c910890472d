// The HTTP port: /health, /ready and /metrics.
//
// Boost.Beast, because it is asynchronous (one thread serves thousands of open connections and
// streams), checks sizes and time limits by itself, and is in every distribution; the alternatives
// there (civetweb, cpp-httplib) take a thread a connection.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lorikeet {

class HttpServer {
 public:
  struct Handlers {
    std::function<absl::Status()> health;  // not OK: no request will be served any more
    std::function<bool()> ready;           // can requests be served now?
    std::function<std::string()> metrics;  // Prometheus text
  };

  // Listens and serves on a thread of its own. UNAVAILABLE: the port is in use; INVALID_ARGUMENT:
  // no such address. `port` 0: any free one.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& host, int32_t port,
                                                           Handlers handlers);
  ~HttpServer();  // closes every connection

  int port() const;

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lorikeet
