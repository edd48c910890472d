// `lorikeet adapters`: the adapters of a running server, and what a directory holds.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "adapters_cache/inspect.h"
#include "engine/base/status_macros.h"
#include "lorikeet/v1/adapters.grpc.pb.h"
#include "server/cli/client.h"

namespace lorikeet {
namespace {

constexpr char kUsage[] =
    "lorikeet adapters list|load NAME PATH|unload NAME|inspect DIR [flags]\n\n"
    "  list            the server's adapters\n"
    "  load NAME PATH  loads a directory of the server's machine, below one of its adapter roots\n"
    "  unload NAME     waits for running requests, then frees the memory\n"
    "  inspect DIR     what a directory here holds and whether it would load; needs no server\n";

std::string Bytes(int64_t bytes) {
  if (bytes < 10'000) return absl::StrCat(bytes, " B");
  if (bytes < 10'000'000) return absl::StrFormat("%.0f KB", bytes / 1e3);
  return absl::StrFormat("%.1f MB", bytes / 1e6);
}

std::string Ranks(const v1::Adapter& adapter) {
  if (adapter.min_rank() == adapter.max_rank()) return absl::StrCat(adapter.max_rank());
  return absl::StrCat(adapter.min_rank(), "-", adapter.max_rank());
}

// Columns as wide as their widest cell.
void PrintTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows[0].size(), 0);
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      absl::StrAppend(&line, row[i]);
      if (i + 1 < row.size()) line.append(widths[i] - row[i].size() + 2, ' ');
    }
    std::printf("%s\n", line.c_str());
  }
}

absl::Status List(const std::string& server) {
  const auto stub = v1::AdapterService::NewStub(Connect(server));
  grpc::ClientContext context;
  v1::ListAdaptersResponse reply;
  LK_RETURN_IF_ERROR(CallStatus(server, stub->ListAdapters(&context, {}, &reply)));
  std::vector<std::vector<std::string>> rows = {
      {"NAME", "VARIANT", "RANK", "MODULES", "MEMORY", "REQUESTS", "ACTIVE", "VERSION", "PATH"}};
  for (const v1::Adapter& adapter : reply.adapters()) {
    rows.push_back({adapter.name(), adapter.variant(), Ranks(adapter),
                    absl::StrCat(adapter.modules()), Bytes(adapter.bytes()),
                    absl::StrCat(adapter.requests()), absl::StrCat(adapter.active_requests()),
                    adapter.version().substr(0, 12), adapter.path()});
  }
  PrintTable(rows);
  return absl::OkStatus();
}

absl::Status Load(const std::string& server, const std::string& name, const std::string& path) {
  const auto stub = v1::AdapterService::NewStub(Connect(server));
  grpc::ClientContext context;
  v1::LoadAdapterRequest request;
  request.set_name(name);
  request.set_path(path);
  v1::LoadAdapterResponse reply;
  LK_RETURN_IF_ERROR(CallStatus(server, stub->LoadAdapter(&context, request, &reply)));
  const v1::Adapter& adapter = reply.adapter();
  std::printf("loaded %s: %s, rank %s, %d modules, %s, version %s\n", adapter.name().c_str(),
              adapter.variant().c_str(), Ranks(adapter).c_str(), adapter.modules(),
              Bytes(adapter.bytes()).c_str(), adapter.version().c_str());
  for (const std::string& warning : adapter.warnings()) {
    std::printf("warning: %s\n", warning.c_str());
  }
  return absl::OkStatus();
}

absl::Status Unload(const std::string& server, const std::string& name) {
  const auto stub = v1::AdapterService::NewStub(Connect(server));
  grpc::ClientContext context;
  v1::UnloadAdapterRequest request;
  request.set_name(name);
  v1::UnloadAdapterResponse reply;
  LK_RETURN_IF_ERROR(CallStatus(server, stub->UnloadAdapter(&context, request, &reply)));
  std::printf("unloaded %s: %s freed, version %s\n", name.c_str(),
              Bytes(reply.bytes_freed()).c_str(), reply.version().c_str());
  return absl::OkStatus();
}

absl::Status Inspect(const std::string& directory) {
  const InspectReport report = InspectAdapter(directory);
  std::printf("%s", FormatReport(report).c_str());
  if (report.loadable()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("'", directory, "' would be refused: ", report.refusals[0]));
}

}  // namespace

absl::Status RunAdapters(Arguments args) {
  std::string server;
  OptionTable table;
  AddServerOption(&table, &server);
  if (PrintedHelp(args, kUsage, table)) return absl::OkStatus();
  struct Verb {
    const char* name;
    size_t positional;
  };
  constexpr Verb kVerbs[] = {{"list", 0}, {"load", 2}, {"unload", 1}, {"inspect", 1}};
  const auto verb = std::find_if(std::begin(kVerbs), std::end(kVerbs), [&](const Verb& known) {
    return !args.empty() && args[0] == known.name;
  });
  if (verb == std::end(kVerbs)) {
    return absl::InvalidArgumentError(
        absl::StrCat(args.empty() ? "no verb" : absl::StrCat("'", args[0], "'"),
                     "; expected adapters list|load|unload|inspect"));
  }
  LK_ASSIGN_OR_RETURN(const std::vector<std::string> rest,
                      ParseClientFlags(args.subspan(1), table, verb->positional));
  switch (verb - std::begin(kVerbs)) {
    case 0:
      return List(server);
    case 1:
      return Load(server, rest[0], rest[1]);
    case 2:
      return Unload(server, rest[0]);
    default:
      return Inspect(rest[0]);
  }
}

}  // namespace lorikeet
