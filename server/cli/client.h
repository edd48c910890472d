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

// The row every client subcommand has.
void AddServerOption(OptionTable* table, std::string* server);

// True after printing `usage` and the table when --help is among the arguments.
bool PrintedHelp(Arguments args, const std::string& usage, const OptionTable& table);

// Parses `args`; INVALID_ARGUMENT unless `least` to `most` arguments are left.
absl::StatusOr<std::vector<std::string>> ParseClientFlags(Arguments args, const OptionTable& table,
                                                          size_t least, size_t most);

std::shared_ptr<grpc::Channel> Connect(const std::string& server);

// A call's outcome for people: the code's name and the server's message.
absl::Status CallStatus(const std::string& server, const grpc::Status& status);

// The whole file. NOT_FOUND names it.
absl::StatusOr<std::string> ReadTextFile(const std::string& path);

}  // namespace lorikeet
