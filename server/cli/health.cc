// `lorikeet health`: whether a server can be sent requests, for container health checks.
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "server/cli/client.h"

namespace lorikeet {
namespace {

constexpr char kUsage[] = "lorikeet health [flags]: ends with 0 if the server is ready\n";

}  // namespace

absl::Status RunHealth(Arguments args) {
  ServerAddress server;
  int32_t timeout_s = 5;
  OptionTable table;
  AddServerOption(&table, &server);
  table.Int("timeout-s", 1, 3600, "s", "time the server has to answer", &timeout_s);
  if (PrintedHelp(args, kUsage, table)) return absl::OkStatus();
  LK_RETURN_IF_ERROR(ParseClientFlags(args, table, 0, 0).status());
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
