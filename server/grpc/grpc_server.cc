#include "server/grpc/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <grpcpp/server_builder.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "grpc/health/v1/health.pb.h"
#include "server/listen.h"

namespace lorikeet {
namespace {

// Peers send pings on silent calls to keep them alive: as often as every 10 s is fine.
void AllowKeepalive(grpc::ServerBuilder* builder) {
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
}

std::shared_ptr<grpc::ServerCredentials> MakeCredentials(const TlsFiles& files) {
  if (!files.on()) return grpc::InsecureServerCredentials();
  using grpc::experimental::FileWatcherCertificateProvider;
  constexpr unsigned kWatchSeconds = 1;
  const bool mutual = !files.client_ca.empty();
  grpc::experimental::TlsServerCredentialsOptions options(
      std::make_shared<FileWatcherCertificateProvider>(files.key, files.certificate,
                                                       files.client_ca, kWatchSeconds));
  options.watch_identity_key_cert_pairs();
  if (mutual) options.watch_root_certs();
  options.set_cert_request_type(mutual ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                       : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  return grpc::experimental::TlsServerCredentials(options);
}

}  // namespace

GrpcServer::GrpcServer(const ServingContext* context, AdapterAdmin* admin)
    : generation_(context, &front_),
      adapters_(admin, context->access, &front_),
      inference_(context, admin, &front_) {}

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Start(const ServingContext* context,
                                                              AdapterAdmin* admin,
                                                              const GrpcOptions& options) {
  LK_RETURN_IF_ERROR(CheckCanListen(options.host, options.port, "gRPC port"));
  // Both register plugins for servers built later; repeated calls change nothing.
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::health::v1::HealthCheckRequest::descriptor();  // linked in, for reflection to describe it

  std::unique_ptr<GrpcServer> self(new GrpcServer(context, admin));
  const std::string address = HostPort(options.host, options.port);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, MakeCredentials(options.tls), &self->port_);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a second server is an error
  AllowKeepalive(&builder);
  builder.SetMaxReceiveMessageSize(Limits::kMaxRequestBytes);
  builder.SetMaxSendMessageSize(-1);
  builder.RegisterService(&self->generation_);
  builder.RegisterService(&self->adapters_);
  builder.RegisterService(&self->inference_);
  auto calls = builder.AddCompletionQueue();
  self->server_ = builder.BuildAndStart();
  if (self->server_ == nullptr || self->port_ == 0) {
    return absl::UnavailableError(absl::StrCat("gRPC port ", address, " cannot be listened on"));
  }
  self->generation_.Serve(std::move(calls));
  for (const char* service :
       {v1::GenerationService::service_full_name(), v1::AdapterService::service_full_name(),
        inference::GRPCInferenceService::service_full_name()}) {
    self->server_->GetHealthCheckService()->SetServingStatus(service, true);
  }
  LK_RETURN_IF_ERROR(self->StartHealth());
  return self;
}

absl::Status GrpcServer::StartHealth() {
  const std::string address = HealthSocket(port_);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials());
  health_ = builder.BuildAndStart();
  if (health_ != nullptr) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("health socket ", address, " cannot be listened on"));
}

GrpcServer::~GrpcServer() { Stop(std::chrono::microseconds(0)); }

void GrpcServer::SetDraining() {
  if (server_ == nullptr) return;  // stopped: nobody is served
  server_->GetHealthCheckService()->SetServingStatus(false);
  health_->GetHealthCheckService()->SetServingStatus(false);
}

void GrpcServer::Stop(std::chrono::microseconds grace) {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now() + grace);
  server_->Wait();
  generation_.Stop();
  server_.reset();
  health_.reset();
}

}  // namespace lorikeet
