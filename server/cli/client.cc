#include "server/cli/client.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace lorikeet {

void AddServerOption(OptionTable* table, std::string* server) {
  *server = kDefaultServer;
  table->Text("server", "HOST:PORT", "gRPC port of the server", server);
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
        absl::StrCat(rest.size(), " arguments given, ", least, " needed; see --help"));
  }
  return rest;
}

std::shared_ptr<grpc::Channel> Connect(const std::string& server) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  return grpc::CreateCustomChannel(server, grpc::InsecureChannelCredentials(), arguments);
}

absl::Status CallStatus(const std::string& server, const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  return absl::Status(code, absl::StrCat(server, ": ", absl::StatusCodeToString(code), ": ",
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
