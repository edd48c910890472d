// lorikeet: a server for one language model and many adapters, and its clients.
#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "server/cli/commands.h"
#include "server/options.h"
#include "server/version.h"

namespace {

using lorikeet::Arguments;

absl::Status RunVersion(Arguments) {
  std::printf("lorikeet %s\n", lorikeet::kVersion);
  return absl::OkStatus();
}

struct Command {
  const char* name;
  const char* help;
  absl::Status (*run)(Arguments);
};

constexpr Command kCommands[] = {
    {"serve", "serve a model and its adapters", lorikeet::RunServe},
    {"generate", "send one prompt to a server", lorikeet::RunGenerate},
    {"adapters", "list, load, unload or inspect adapters", lorikeet::RunAdapters},
    {"bench", "measure a server under load", lorikeet::RunBench},
    {"health", "ask a server whether it is ready", lorikeet::RunHealth},
    {"keys", "make API keys", lorikeet::RunKeys},
    {"version", "print the version", RunVersion},
};

void PrintUsage() {
  std::printf("lorikeet COMMAND [flags]; every command has --help\n\n");
  for (const Command& command : kCommands) {
    std::printf("  %-10s %s\n", command.name, command.help);
  }
}

absl::Status Dispatch(const std::vector<std::string>& args) {
  if (args.empty() || args[0] == "--help" || args[0] == "-h" || args[0] == "help") {
    PrintUsage();
    return absl::OkStatus();
  }
  if (args[0] == "--version") return RunVersion({});
  std::vector<std::string> names;
  for (const Command& command : kCommands) {
    if (args[0] == command.name) return command.run(Arguments(args).subspan(1));
    names.push_back(command.name);
  }
  return absl::InvalidArgumentError("unknown command '" + args[0] + "'; did you mean '" +
                                    lorikeet::NearestName(args[0], names) + "'?");
}

}  // namespace

int main(int argc, char** argv) {
  // Their own logs would put more lines on standard error than the one that matters, and let any
  // client of a server write there.
  gpr_set_log_function([](gpr_log_func_args*) {});
  google::protobuf::SetLogHandler(nullptr);
  const absl::Status status = Dispatch(std::vector<std::string>(argv + 1, argv + argc));
  std::fflush(stdout);
  if (status.ok()) return 0;
  std::string line(status.message());
  std::replace(line.begin(), line.end(), '\n', ' ');
  std::fprintf(stderr, "lorikeet: %s\n", line.c_str());
  return 1;
}
