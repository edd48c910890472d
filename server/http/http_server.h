// The HTTP port: HTTP/1.1 with keep-alive, on a few threads.
//
// Boost.Beast over Asio, because it is asynchronous (two threads serve thousands of open streams),
// parses strictly, leaves every limit to us, does TLS through OpenSSL, and is in every
// distribution; the alternatives there (civetweb, cpp-httplib) take a thread a connection.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/http/connection.h"
#include "server/http/message.h"
#include "server/tls_files.h"

namespace lorikeet {

struct HttpOptions {
  std::string host;  // name or address
  int32_t port = 0;  // 0: any free one
  TlsFiles tls;
  HttpLimits limits;
  int threads = 2;
};

class HttpServer {
 public:
  // Listens and serves. UNAVAILABLE: the port is in use; INVALID_ARGUMENT: no such address, or
  // what LoadTls finds wrong. Certificates that change are taken for new connections. The
  // handler and the gate are called on the server's threads, several at a time, and outlive the
  // server; requests with long bodies are handled on threads of their own. No gate: every body is read.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const HttpOptions& options,
                                                           HttpHandler handler,
                                                           HttpGate gate = nullptr);
  ~HttpServer();  // drops answers under way and closes every connection

  int port() const;

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lorikeet
