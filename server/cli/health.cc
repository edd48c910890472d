// `lorikeet health`: whether the server of this machine or container can be sent requests. It asks over
// the server's health socket, so it needs neither key nor certificate.
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "server/cli/client.h"
#include "server/config.h"
#include "server/listen.h"

namespace lorikeet {
namespace {

constexpr char kUsage[] = "lorikeet health [flags]: ends with 0 if the server on this machine is ready\n";

}  // namespace

absl::Status RunHealth(Arguments args) {
  int32_t port = ServerConfig().grpc_port, timeout_s = 5;
  OptionTable table;
  table.Int("grpc-port", 1, 65535, "", "gRPC port of the server", &port);
  table.Int("timeout-s", 1, 3600, "s", "time the server has to answer", &timeout_s);
  if (PrintedHelp(args, kUsage, table)) return absl::OkStatus();
  LK_RETURN_IF_ERROR(ParseClientFlags(args, table, 0, 0).status());
  const ServerAddress server = {.host_port = HealthSocket(port)};
  const std::unique_ptr<grpc::health::v1::Health::Stub> health =
      grpc::health::v1::Health::NewStub(Connect(server));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(timeout_s));
  grpc::health::v1::HealthCheckResponse response;
  LK_RETURN_IF_ERROR(CallStatus(server, health->Check(&context, {}, &response)));
  if (response.status() == grpc::health::v1::HealthCheckResponse::SERVING) {
    std::printf("ready\n");
    return absl::OkStatus();
  }
  return absl::UnavailableError(absl::StrCat(
      server.host_port, " is ", grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status())));
}

}  // namespace lorikeet
