// The gRPC port: GenerationService, AdapterService, the Open Inference Protocol, grpc.health.v1 and
// reflection. grpc.health.v1 alone is also on `HealthSocket(port)`, without TLS: a container's health
// check needs no certificate there, whatever the port asks of clients.
#pragma once

#include <grpcpp/server.h>

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/adapter_admin.h"
#include "server/generation.h"
#include "server/grpc/adapter_service.h"
#include "server/grpc/front_thread.h"
#include "server/grpc/generation_service.h"
#include "server/grpc/inference_service.h"
#include "server/tls_files.h"

namespace lorikeet {

struct GrpcOptions {
  std::string host;  // name or address
  int32_t port = 0;  // 0: any free one
  TlsFiles tls;
};

class GrpcServer {
 public:
  // Listens and serves. `context` and `admin` outlive it. UNAVAILABLE: the port is in use;
  // INVALID_ARGUMENT: no such address. Certificates that change are taken for new connections; the
  // files must be right at first.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(const ServingContext* context,
                                                           AdapterAdmin* admin,
                                                           const GrpcOptions& options);
  ~GrpcServer();  // Stop(0) if still running

  int port() const { return port_; }

  // Health answers NOT_SERVING from now on; calls are still answered.
  void SetDraining();

  // Accepts nothing new, gives open calls `grace` to end, cancels the rest. Idempotent.
  void Stop(std::chrono::microseconds grace);

 private:
  GrpcServer(const ServingContext* context, AdapterAdmin* admin);
  absl::Status StartHealth();

  FrontThread front_;  // outlives the calls
  GenerationServiceImpl generation_;
  AdapterServiceImpl adapters_;
  InferenceServiceImpl inference_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<grpc::Server> health_;  // there while `server_` is
  int port_ = 0;
};

}  // namespace lorikeet
