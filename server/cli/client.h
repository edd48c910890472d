// What the client subcommands share.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/support/status.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/cli/commands.h"
#include "server/options.h"

namespace lorikeet {

inline constexpr char kDefaultServer[] = "127.0.0.1:50051";

struct ServerAddress {
  std::string host_port = kDefaultServer;
  // PEM. With a `ca` the connection is TLS, and the server's certificate must be one of its.
  std::string ca, certificate, key;
};

// The rows every client subcommand has.
void AddServerOption(OptionTable* table, ServerAddress* server);

// True after printing `usage` and the table when --help is among the arguments.
bool PrintedHelp(Arguments args, const std::string& usage, const OptionTable& table);

// Parses `args`; INVALID_ARGUMENT unless `least` to `most` arguments are left.
absl::StatusOr<std::vector<std::string>> ParseClientFlags(Arguments args, const OptionTable& table,
                                                          size_t least, size_t most);

// Every call brings the API key in the environment's LORIKEET_API_KEY, if there is one.
std::shared_ptr<grpc::Channel> Connect(const ServerAddress& server);

// A call's outcome for people: the code's name and the server's message.
absl::Status CallStatus(const ServerAddress& server, const grpc::Status& status);

// The whole file. NOT_FOUND names it.
absl::StatusOr<std::string> ReadTextFile(const std::string& path);

}  // namespace lorikeet
