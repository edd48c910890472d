// `lorikeet adapters`: the adapters of a running server, and what a directory holds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "adapters_cache/convert.h"
#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/inspect.h"
#include "adapters_cache/sha256.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"
#include "engine/model/base_model_view.h"
#include "engine/model/model_source.h"
#include "lorikeet/v1/adapters.grpc.pb.h"
#include "server/cli/client.h"
#include "server/inspect.h"
#include "server/merge.h"

namespace lorikeet {
namespace {

constexpr char kUsage[] =
    "lorikeet adapters VERB [flags]\n\n"
    "  list [PREFIX]       the server's adapters\n"
    "  get NAME            one of them\n"
    "  load NAME PATH      loads a directory of the server's machine, below an adapter root of it\n"
    "  upload NAME DIR     sends a directory of this machine and loads it\n"
    "  reload NAME         loads again from where it was loaded from\n"
    "  unload NAME         waits for running requests, then frees the memory\n"
    "  pin|unpin NAME      keeps it in the server's memory, or not\n"
    "  prefetch NAME       brings it into the server's memory\n"
    "  alias NAME TARGET[=WEIGHT]...  leads NAME to other names or versions, by weight\n"
    "  watch               prints changes until interrupted\n"
    "  plan RANK [LINEAR]...  how many adapters of a shape fit\n"
    "  inspect DIR         what a directory here holds and whether it would load; no server. With --model\n"
    "                      what it changes there, what that costs a token, and memory on host and GPU\n"
    "  convert DIR[=WEIGHT]... OUT --model PATH  writes them, or their sum, as one plain LoRA\n"
    "  merge DIR[=WEIGHT]... OUT --model DIR  writes the model with them, or their sum, in its weights\n";

// The flags of some verbs.
struct Flags {
  ServerAddress server;
  bool replace = false;
  bool pin = false;
  bool now = false;
  int32_t adapters = 0;
  int32_t tokens = 0;
  std::string model;
};

using Positional = std::vector<std::string>;

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

// One call and its reply.
template <typename Request, typename Reply>
absl::Status Ask(const Flags& flags,
                 grpc::Status (v1::AdapterService::Stub::*method)(grpc::ClientContext*,
                                                                  const Request&, Reply*),
                 const Request& request, Reply* reply) {
  const auto stub = v1::AdapterService::NewStub(Connect(flags.server));
  grpc::ClientContext context;
  return CallStatus(flags.server, ((*stub).*method)(&context, request, reply));
}

absl::Status List(const Flags& flags, const Positional& args) {
  std::vector<std::vector<std::string>> rows = {
      {"NAME", "VARIANT", "RANK", "MODULES", "BYTES", "HOST", "DEVICE", "REQUESTS", "ACTIVE",
       "VERSION", "PATH"}};
  v1::ListAdaptersRequest request;
  request.set_page_size(1000);
  if (!args.empty()) request.set_name_prefix(args[0]);
  do {
    v1::ListAdaptersResponse reply;
    LK_RETURN_IF_ERROR(Ask(flags, &v1::AdapterService::Stub::ListAdapters, request, &reply));
    for (const v1::Adapter& adapter : reply.adapters()) {
      rows.push_back({adapter.name(), adapter.variant(), Ranks(adapter),
                      absl::StrCat(adapter.modules()), Bytes(adapter.bytes()),
                      adapter.pinned() ? "pinned" : adapter.in_host() ? "yes" : "no",
                      adapter.device_bytes() > 0 ? Bytes(adapter.device_bytes()) : "no",
                      absl::StrCat(adapter.requests()), absl::StrCat(adapter.active_requests()),
                      adapter.version().substr(0, 12), adapter.path()});
    }
    request.set_page_token(reply.next_page_token());
  } while (!request.page_token().empty());
  PrintTable(rows);
  return absl::OkStatus();
}

void Print(const char* what, const v1::Adapter& adapter) {
  std::printf("%s %s: %s, rank %s, %d modules, %s, version %s\n", what, adapter.name().c_str(),
              adapter.variant().c_str(), Ranks(adapter).c_str(), adapter.modules(),
              Bytes(adapter.bytes()).c_str(), adapter.version().c_str());
  for (const v1::AdapterTarget& target : adapter.targets()) {
    if (adapter.targets_size() == 1) break;
    std::printf("target: version %s, weight %d\n", target.target().c_str(), target.weight());
  }
  for (const std::string& warning : adapter.warnings()) {
    std::printf("warning: %s\n", warning.c_str());
  }
}

// A call about one name that is answered with its adapter.
template <typename Request, typename Reply>
absl::Status AskAndPrint(const Flags& flags,
                         grpc::Status (v1::AdapterService::Stub::*method)(grpc::ClientContext*,
                                                                          const Request&, Reply*),
                         const Request& request, const char* what) {
  Reply reply;
  LK_RETURN_IF_ERROR(Ask(flags, method, request, &reply));
  Print(what, reply.adapter());
  return absl::OkStatus();
}

template <typename Request>
Request Named(const std::string& name) {
  Request request;
  request.set_name(name);
  return request;
}

absl::Status Get(const Flags& flags, const Positional& args) {
  return AskAndPrint(flags, &v1::AdapterService::Stub::GetAdapter,
                     Named<v1::GetAdapterRequest>(args[0]), "adapter");
}

absl::Status Load(const Flags& flags, const Positional& args) {
  auto request = Named<v1::LoadAdapterRequest>(args[0]);
  request.set_path(args[1]);
  request.set_replace(flags.replace);
  request.set_pin(flags.pin);
  return AskAndPrint(flags, &v1::AdapterService::Stub::LoadAdapter, request, "loaded");
}

std::string HashOf(const std::string& bytes) {
  Sha256 sha256;
  sha256.Add(bytes);
  return sha256.Hex();
}

// Calls `send` with one piece after the other until it says no.
bool InPieces(const std::string& bytes, const std::function<bool(std::string piece)>& send) {
  constexpr size_t kPiece = 1 << 20;
  for (size_t at = 0; at < bytes.size(); at += kPiece) {
    if (!send(bytes.substr(at, kPiece))) return false;
  }
  return true;
}

absl::Status Upload(const Flags& flags, const Positional& args) {
  const std::string directory = args[1] + "/";
  LK_ASSIGN_OR_RETURN(const std::string config, ReadTextFile(directory + "adapter_config.json"));
  LK_ASSIGN_OR_RETURN(const std::string weights,
                      ReadTextFile(directory + "adapter_model.safetensors"));
  v1::UploadAdapterRequest part;
  v1::UploadHeader* header = part.mutable_header();
  header->set_name(args[0]);
  header->set_replace(flags.replace);
  header->set_pin(flags.pin);
  header->set_weights_bytes(static_cast<int64_t>(weights.size()));
  header->set_weights_sha256(HashOf(weights));
  header->set_config_sha256(HashOf(config));
  std::map<std::string, std::string> texts;
  for (const std::string name : AdapterTextNames()) {
    if (!std::filesystem::exists(directory + name)) continue;
    LK_ASSIGN_OR_RETURN(texts[name], ReadTextFile(directory + name));
    (*header->mutable_text_sha256())[name] = HashOf(texts[name]);
  }
  const auto stub = v1::AdapterService::NewStub(Connect(flags.server));
  grpc::ClientContext context;
  v1::LoadAdapterResponse reply;
  const auto writer = stub->UploadAdapter(&context, &reply);
  bool open = writer->Write(part);
  part.set_config(config);
  open = open && writer->Write(part);
  for (const auto& [name, text] : texts) {
    open = open && InPieces(text, [&, &name = name](std::string piece) {
      part.mutable_text()->set_name(name);
      part.mutable_text()->set_piece(std::move(piece));
      return writer->Write(part);
    });
  }
  open = open && InPieces(weights, [&](std::string piece) {
    part.set_weights(std::move(piece));
    return writer->Write(part);
  });
  writer->WritesDone();
  LK_RETURN_IF_ERROR(CallStatus(flags.server, writer->Finish()));
  Print("loaded", reply.adapter());
  return absl::OkStatus();
}

absl::Status Reload(const Flags& flags, const Positional& args) {
  return AskAndPrint(flags, &v1::AdapterService::Stub::ReloadAdapter,
                     Named<v1::ReloadAdapterRequest>(args[0]), "loaded");
}

absl::Status Unload(const Flags& flags, const Positional& args) {
  auto request = Named<v1::UnloadAdapterRequest>(args[0]);
  if (flags.now) request.set_drain_ms(0);
  v1::UnloadAdapterResponse reply;
  LK_RETURN_IF_ERROR(Ask(flags, &v1::AdapterService::Stub::UnloadAdapter, request, &reply));
  std::printf("unloaded %s: %s freed, %s on the device, version %s\n", args[0].c_str(),
              Bytes(reply.host_bytes_freed()).c_str(), Bytes(reply.device_bytes_freed()).c_str(),
              reply.version().c_str());
  return absl::OkStatus();
}

absl::Status SetPinned(const Flags& flags, const std::string& name, bool pinned) {
  auto request = Named<v1::PinAdapterRequest>(name);
  request.set_pinned(pinned);
  return AskAndPrint(flags, &v1::AdapterService::Stub::PinAdapter, request,
                     pinned ? "pinned" : "unpinned");
}
absl::Status Pin(const Flags& flags, const Positional& args) {
  return SetPinned(flags, args[0], true);
}
absl::Status Unpin(const Flags& flags, const Positional& args) {
  return SetPinned(flags, args[0], false);
}

absl::Status Prefetch(const Flags& flags, const Positional& args) {
  return AskAndPrint(flags, &v1::AdapterService::Stub::PrefetchAdapter,
                     Named<v1::PrefetchAdapterRequest>(args[0]), "fetched");
}

absl::Status Alias(const Flags& flags, const Positional& args) {
  v1::SetAliasRequest request;
  request.set_alias(args[0]);
  for (size_t i = 1; i < args.size(); ++i) {
    const size_t equals = args[i].rfind('=');
    v1::AdapterTarget* target = request.add_targets();
    target->set_target(args[i].substr(0, equals));
    target->set_weight(1);
    if (equals == std::string::npos) continue;
    LK_ASSIGN_OR_RETURN(const int64_t weight,
                        ParseInt(args[i].substr(equals + 1), 1, 1'000'000, "the weight"));
    target->set_weight(static_cast<int32_t>(weight));
  }
  return AskAndPrint(flags, &v1::AdapterService::Stub::SetAlias, request, "alias");
}

absl::Status Watch(const Flags& flags, const Positional&) {
  const auto stub = v1::AdapterService::NewStub(Connect(flags.server));
  grpc::ClientContext context;
  const auto reader = stub->WatchAdapters(&context, {});
  for (v1::AdapterEvent event; reader->Read(&event);) {
    std::printf("%s %s %s\n",
                v1::AdapterEvent::Kind_Name(event.kind()).substr(strlen("KIND_")).c_str(),
                event.version().substr(0, 12).c_str(), event.name().c_str());
    std::fflush(stdout);
  }
  return CallStatus(flags.server, reader->Finish());
}

std::string OrNoBound(int64_t count) { return count < 0 ? "no bound" : absl::StrCat(count); }

absl::Status Plan(const Flags& flags, const Positional& args) {
  v1::PlanCapacityRequest request;
  LK_ASSIGN_OR_RETURN(const int64_t rank,
                      ParseInt(args[0], 1, Limits::kMaxAdapterRank, "the rank"));
  request.set_rank(static_cast<int32_t>(rank));
  for (size_t i = 1; i < args.size(); ++i) request.add_linears(args[i]);
  request.set_adapters(flags.adapters);
  request.set_kv_tokens(flags.tokens);
  v1::PlanCapacityResponse reply;
  LK_RETURN_IF_ERROR(Ask(flags, &v1::AdapterService::Stub::PlanCapacity, request, &reply));
  std::printf(
      "one adapter: %s in host memory, %s on the device\n"
      "adapters that fit in host memory: %s\n"
      "adapters that fit beside %d tokens: %s\n"
      "tokens that fit beside %d adapters: %ld\n",
      Bytes(reply.adapter_bytes()).c_str(), Bytes(reply.image_bytes()).c_str(),
      OrNoBound(reply.host_adapters()).c_str(), flags.tokens,
      OrNoBound(reply.device_adapters()).c_str(), flags.adapters,
      static_cast<long>(reply.kv_tokens()));
  return absl::OkStatus();
}

absl::Status Inspect(const Flags& flags, const Positional& args) {
  const std::string& directory = args[0];
  const InspectReport report = InspectAdapter(directory);
  std::printf("%s", FormatReport(report).c_str());
  std::string refusal = report.loadable() ? "" : report.refusals[0];
  if (report.loadable() && !flags.model.empty()) {
    const absl::StatusOr<std::string> on_model = InspectOnModel(directory, flags.model);
    if (on_model.ok()) std::printf("%s", on_model->c_str());
    else refusal = std::string(on_model.status().message());
  }
  if (refusal.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("'", directory, "' would be refused: ", refusal));
}

// DIR or DIR=WEIGHT
absl::StatusOr<ConvertTerm> ParseTerm(const std::string& text) {
  const size_t equals = text.rfind('=');
  ConvertTerm term{text.substr(0, equals)};
  if (equals == std::string::npos) return term;
  if (absl::SimpleAtof(text.substr(equals + 1), &term.weight) && std::isfinite(term.weight)) {
    return term;
  }
  return absl::InvalidArgumentError(absl::StrCat("the weight in '", text, "' is no number"));
}

// All but the last argument, for a verb that needs --model.
absl::StatusOr<std::vector<ConvertTerm>> ParseTerms(const Flags& flags, const char* verb,
                                                    const Positional& args) {
  if (flags.model.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(verb, " needs --model PATH, the adapters' base model"));
  }
  std::vector<ConvertTerm> terms;
  for (size_t i = 0; i + 1 < args.size(); ++i) {
    LK_ASSIGN_OR_RETURN(terms.emplace_back(), ParseTerm(args[i]));
  }
  return terms;
}

absl::Status Convert(const Flags& flags, const Positional& args) {
  LK_ASSIGN_OR_RETURN(const std::vector<ConvertTerm> terms, ParseTerms(flags, "convert", args));
  LK_ASSIGN_OR_RETURN(std::shared_ptr<const ModelSource> source, ModelSource::Open(flags.model));
  LK_RETURN_IF_ERROR(ConvertToLora(BaseModelView(std::move(source)), terms, args.back()));
  return Inspect({}, {args.back()});
}

absl::Status Merge(const Flags& flags, const Positional& args) {
  LK_ASSIGN_OR_RETURN(const std::vector<ConvertTerm> terms, ParseTerms(flags, "merge", args));
  LK_RETURN_IF_ERROR(MergeAdapters(flags.model, terms, args.back()));
  std::printf("merged %zu adapter(s) into %s\n", terms.size(), args.back().c_str());
  return absl::OkStatus();
}

struct Verb {
  const char* name;
  size_t least, most;  // arguments
  absl::Status (*run)(const Flags& flags, const Positional& args);
};

constexpr size_t kAny = 100;
constexpr Verb kVerbs[] = {
    {"list", 0, 1, List},      {"get", 1, 1, Get},         {"load", 2, 2, Load},
    {"upload", 2, 2, Upload},  {"reload", 1, 1, Reload},   {"unload", 1, 1, Unload},
    {"pin", 1, 1, Pin},        {"unpin", 1, 1, Unpin},     {"prefetch", 1, 1, Prefetch},
    {"alias", 2, kAny, Alias}, {"watch", 0, 0, Watch},     {"plan", 1, kAny, Plan},
    {"inspect", 1, 1, Inspect}, {"convert", 2, kAny, Convert},
    {"merge", 2, kAny, Merge}};

absl::StatusOr<const Verb*> FindVerb(const std::string& name) {
  std::vector<std::string> names;
  for (const Verb& verb : kVerbs) {
    if (name == verb.name) return &verb;
    names.push_back(verb.name);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown verb '", name, "'; did you mean '", NearestName(name, names), "'?"));
}

}  // namespace

absl::Status RunAdapters(Arguments args) {
  Flags flags;
  OptionTable table;
  AddServerOption(&table, &flags.server);
  table.Switch("replace", "load, upload: lead a name from other weights to these", &flags.replace);
  table.Switch("pin", "load, upload: keep it in the server's memory", &flags.pin);
  table.Switch("now", "unload: do not wait for running requests", &flags.now);
  table.Text("model", "PATH", "inspect, convert, merge: the base model's directory, or a GGUF file, but to merge", &flags.model);
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  table.Int("adapters", 0, kMost, "adapters", "plan: so many are in use at a time",
            &flags.adapters);
  table.Int("tokens", 0, kMost, "tokens", "plan: so many are kept at a time", &flags.tokens);
  if (PrintedHelp(args, kUsage, table)) return absl::OkStatus();
  if (args.empty()) return absl::InvalidArgumentError("no verb; see lorikeet adapters --help");
  LK_ASSIGN_OR_RETURN(const Verb* verb, FindVerb(args[0]));
  LK_ASSIGN_OR_RETURN(const Positional rest,
                      ParseClientFlags(args.subspan(1), table, verb->least, verb->most));
  return verb->run(flags, rest);
}

}  // namespace lorikeet
