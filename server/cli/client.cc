#include "server/cli/client.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/client_interceptor.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace lorikeet {

namespace {

void AddFile(OptionTable* table, const char* name, const char* help, std::string* content) {
  table->Custom(name, "FILE", help, [content](const std::string& path) {
    LK_ASSIGN_OR_RETURN(*content, ReadTextFile(path));
    return absl::OkStatus();
  });
}

// Adds the key to what every call sends first, on a connection with TLS and without.
class KeySender final : public grpc::experimental::Interceptor {
 public:
  explicit KeySender(std::string header) : header_(std::move(header)) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using Point = grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(Point::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", header_);
    }
    methods->Proceed();
  }

 private:
  const std::string header_;
};

class KeySenders final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit KeySenders(const char* key) : header_(absl::StrCat("Bearer ", key)) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(
      grpc::experimental::ClientRpcInfo*) override {
    return new KeySender(header_);  // gRPC deletes it
  }

 private:
  const std::string header_;
};

}  // namespace

void AddServerOption(OptionTable* table, ServerAddress* server) {
  table->Custom("server", "HOST:PORT",
                absl::StrCat("gRPC port of the server (default ", kDefaultServer, ")"),
                [server](const std::string& host_port) -> absl::Status {
                  server->host_port = host_port;
                  if (host_port.find(':') != std::string::npos) return absl::OkStatus();
                  return absl::InvalidArgumentError(
                      absl::StrCat("server: '", host_port, "' is not HOST:PORT"));
                });
  AddFile(table, "tls-ca", "PEM root certificates of the server; without them, no TLS", &server->ca);
  AddFile(table, "tls-cert", "PEM certificate chain to show the server", &server->certificate);
  AddFile(table, "tls-key", "PEM private key of tls-cert", &server->key);
}

bool PrintedHelp(Arguments args, const std::string& usage, const OptionTable& table) {
  const bool wanted = std::any_of(args.begin(), args.end(), [](const std::string& arg) {
    return arg == "--help" || arg == "-h";
  });
  if (wanted) std::printf("%s\n%s", usage.c_str(), table.Help().c_str());
  return wanted;
}

absl::StatusOr<std::vector<std::string>> ParseClientFlags(Arguments args, const OptionTable& table,
                                                          size_t least, size_t most) {
  LK_ASSIGN_OR_RETURN(std::vector<std::string> rest, table.ParseFlags(args));
  if (rest.size() > most) {
    return absl::InvalidArgumentError(absl::StrCat("unexpected argument '", rest[most], "'"));
  }
  if (rest.size() < least) {
    return absl::InvalidArgumentError(
        absl::StrCat("arguments given: ", rest.size(), ", needed: ", least, "; see --help"));
  }
  return rest;
}

std::shared_ptr<grpc::Channel> Connect(const ServerAddress& server) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> senders;
  const char* key = std::getenv("LORIKEET_API_KEY");
  if (key != nullptr && *key != '\0') senders.push_back(std::make_unique<KeySenders>(key));
  const auto credentials =
      server.ca.empty()
          ? grpc::InsecureChannelCredentials()
          : grpc::SslCredentials({.pem_root_certs = server.ca,
                                  .pem_private_key = server.key,
                                  .pem_cert_chain = server.certificate});
  return grpc::experimental::CreateCustomChannelWithInterceptors(server.host_port, credentials,
                                                                 arguments, std::move(senders));
}

absl::Status CallStatus(const ServerAddress& server, const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  return absl::Status(code, absl::StrCat(server.host_port, ": ", absl::StatusCodeToString(code), ": ",
                                         status.error_message()));
}

absl::StatusOr<std::string> ReadTextFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (file && file.peek() == std::ifstream::traits_type::eof()) return std::string();
  if (!file || !(content << file.rdbuf())) {
    return absl::NotFoundError(absl::StrCat("cannot read '", path, "'"));
  }
  return content.str();
}

}  // namespace lorikeet
