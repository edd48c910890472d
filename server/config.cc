#include "server/config.h"

#include <yaml-cpp/yaml.h>

#include <fstream>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

using Kind = OptionTable::Kind;

absl::Status WrongShape(const OptionTable::Row& row, const char* wanted) {
  return absl::InvalidArgumentError(absl::StrCat(row.Key(), ": expected ", wanted));
}

// The option's own message starts with its flag name; a file's reader knows the key.
absl::Status SetFromFile(const OptionTable::Row& row, const std::string& value) {
  const absl::Status status = row.set(value);
  if (status.ok()) return status;
  const auto rest = std::string(status.message()).substr(row.name.size());
  return absl::Status(status.code(), row.Key() + rest);
}

absl::Status ApplyNode(const OptionTable::Row& row, const YAML::Node& node) {
  switch (row.kind) {
    case Kind::kValue:
    case Kind::kSwitch:
      if (!node.IsScalar()) return WrongShape(row, "one value");
      return SetFromFile(row, node.Scalar());
    case Kind::kList:
      if (!node.IsSequence()) return WrongShape(row, "a sequence");
      for (const YAML::Node& item : node) {
        if (!item.IsScalar()) return WrongShape(row, "a sequence of plain values");
        LK_RETURN_IF_ERROR(SetFromFile(row, item.Scalar()));
      }
      return absl::OkStatus();
    case Kind::kPairs:
      if (!node.IsMap()) return WrongShape(row, "a map of names to paths");
      for (const auto& item : node) {
        if (!item.first.IsScalar() || !item.second.IsScalar()) {
          return WrongShape(row, "a map of names to paths");
        }
        LK_RETURN_IF_ERROR(SetFromFile(row, item.first.Scalar() + "=" + item.second.Scalar()));
      }
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

absl::Status ApplyMap(const YAML::Node& root, const OptionTable& table) {
  if (root.IsNull()) return absl::OkStatus();
  if (!root.IsMap()) return absl::InvalidArgumentError("expected a map of keys to values");
  std::set<std::string> seen;
  for (const auto& item : root) {
    if (!item.first.IsScalar()) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", item.first.Mark().line + 1, ": a key is not a plain word"));
    }
    const std::string& key = item.first.Scalar();
    const std::string where = absl::StrCat("line ", item.first.Mark().line + 1, ": ");
    absl::StatusOr<const OptionTable::Row*> row = table.FindKey(key);
    absl::Status status = row.status();
    if (status.ok() && !seen.insert(key).second) {
      status = absl::InvalidArgumentError(absl::StrCat(key, " is given twice"));
    }
    if (status.ok()) status = ApplyNode(**row, item.second);
    if (!status.ok()) return absl::Status(status.code(), absl::StrCat(where, status.message()));
  }
  return absl::OkStatus();
}

absl::Status ApplyFile(const std::string& path, const OptionTable& table) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (!file || !(content << file.rdbuf())) {
    return absl::NotFoundError(absl::StrCat("--config: cannot read '", path, "'"));
  }
  const absl::Status status = ApplyYaml(content.str(), table);
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

// Where the ports are, and who may use them.
void AddPortOptions(ServerConfig* c, OptionTable* table) {
  table->Text("host", "ADDRESS", "address both ports listen on", &c->host);
  table->Int("grpc-port", 0, 65535, "", "gRPC port; 0: any free one", &c->grpc_port);
  table->Int("http-port", 0, 65535, "", "HTTP port: OpenAI's API, /metrics; 0: any free one",
             &c->http_port);
  table->Text("tls-cert", "FILE",
              "PEM certificate chain of both ports, which then speak TLS alone; read again when it "
              "changes",
              &c->tls.certificate);
  table->Text("tls-key", "FILE", "PEM private key of tls-cert", &c->tls.key);
  table->Text("tls-client-ca", "FILE",
              "PEM root certificates: clients must have a certificate of one of them",
              &c->tls.client_ca);
  table->Text("keys", "FILE",
              "who may do what, by API key or client certificate (`lorikeet keys`); read again when "
              "it changes; without it anyone may, except that beyond loopback nobody changes adapters",
              &c->keys);
  table->Text("audit-log", "FILE",
              "a JSON line for every change of adapters or the log's level, done or refused",
              &c->audit_log);
  table->Switch("open-admin", "lets anyone change adapters, though there are no keys, beyond loopback",
                &c->open_admin);
  table->Switch("open-metrics",
                "shows /metrics to who has no key, though there are keys, as an endpoint picker, which "
                "sends none, needs it; they name adapters and tenants",
                &c->open_metrics);
  table->Int("http-connections", 1, 1 << 20, "connections", "open at a time at the HTTP port",
             &c->http_limits.connections);
}

absl::Status CheckTls(const TlsFiles& files) {
  if (files.certificate.empty() != files.key.empty()) {
    return absl::InvalidArgumentError("tls-cert and tls-key go together");
  }
  if (!files.on() && !files.client_ca.empty()) {
    return absl::InvalidArgumentError("tls-client-ca needs tls-cert and tls-key");
  }
  return absl::OkStatus();
}

// What the command line takes: the file's keys, and the file, which is read before the rest.
OptionTable FlagOptions(ServerConfig* config) {
  OptionTable table = ServerOptions(config);
  table.Custom("config", "FILE", "YAML file of the other flags, with _ for -",
               [](const std::string&) { return absl::OkStatus(); });
  return table;
}

// Which adapters there are and where they come from.
void AddAdapterOptions(ServerConfig* c, OptionTable* table) {
  table->Pairs("adapter", "NAME=PATH", "adapter directory to load at start", &c->adapters);
  table->List("adapter-root", "DIR", "LoadAdapter reads below this directory alone",
              &c->adapter_roots);
  table->List("adapter-watch", "DIR",
              "adapters below this directory are loaded as they come, by their folders' names, and "
              "unloaded as they go",
              &c->adapter_watches);
  table->List("adapter-source", "URL",
              "LoadAdapter fetches from below https://..., s3://BUCKET/... or "
              "hf://ORGANISATION/...; takes --adapter-dir",
              &c->adapter_sources);
  table->List("adapter-on-demand", "DIR|URL",
              "an adapter that is not loaded is looked for below this when a request first asks for "
              "it",
              &c->adapter_on_demand);
  table->Int("adapter-disk-mib", 1, 1 << 28, "MiB",
             "disk below --adapter-dir for fetched adapters; those used longest ago make room",
             &c->adapter_disk_mib);
  table->Text("s3-endpoint", "URL",
              "of s3:// sources, buckets as first part of the path (default: Amazon's); keys come "
              "from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
              &c->s3_endpoint);
  table->Text("s3-region", "NAME", "of s3:// sources (default: us-east-1)", &c->s3_region);
  table->Text("hub-endpoint", "URL",
              "of hf:// sources (default: https://huggingface.co); a token comes from HF_TOKEN",
              &c->hub_endpoint);
  table->Switch("allow-dense", "loads adapters whose deltas are as large as the model's weights",
                &c->allow_dense);
  table->Text("adapter-dir", "DIR",
              "where the server keeps uploaded adapters and the list of loaded ones, to have both "
              "again after a restart",
              &c->adapter_dir);
  table->Int("adapter-host-mib", 0, 1 << 24, "MiB",
             "host memory for adapters; those used longest ago make room and are read again when "
             "asked for; 0: no bound",
             &c->adapter_host_mib);
  table->Int("max-adapters", 1, 10'000'000, "adapters", "adapters loaded at a time",
             &c->max_adapters);
  table->Int("tenant-max-adapters", 0, 10'000'000, "adapters",
             "of them, of each tenant in --keys; 0: no bound", &c->tenant_max_adapters);
  table->Int("tenant-adapter-host-mib", 0, 1 << 24, "MiB",
             "host memory for the adapters of each tenant in --keys; 0: no bound",
             &c->tenant_adapter_host_mib);
  table->Int("tenant-adapter-disk-mib", 0, 1 << 24, "MiB",
             "disk for the adapters that each tenant in --keys has uploaded, and as much for those fetched for it, "
             "which make room for one another; 0: no bound",
             &c->tenant_adapter_disk_mib);
  table->Int("tenant-adapter-device-mib", 0, 1 << 24, "MiB",
             "pages of a GPU for the adapters of each tenant in --keys, which make room for one another; where all "
             "are in use its other requests wait; 0: no bound",
             &c->tenant_adapter_device_mib);
}

}  // namespace

OptionTable ServerOptions(ServerConfig* c) {
  OptionTable table;
  Limits& limits = c->limits;
  table.Text("model", "PATH", "GGUF file or Hugging Face directory to serve", &c->model);
  table.Text("model-name", "NAME", "what clients call the base model (default: its own name)",
             &c->model_name);
  table.Custom("layer-replication", "RANGES",
               "serves the model's layers stacked as PEFT's layer_replication says, \"[[0,4],[2,6]]\", for adapters that "
               "say the same",
               [c](const std::string& text) -> absl::Status {
                 absl::StatusOr<LayerReplication> ranges = ParseLayerReplication(text);
                 if (!ranges.ok()) return absl::InvalidArgumentError(absl::StrCat("layer-replication: ", ranges.status().message()));
                 c->layer_replication = *std::move(ranges);
                 return absl::OkStatus();
               });
  AddAdapterOptions(c, &table);
  AddPortOptions(c, &table);
  table.Choice("device", {"auto", "cpu", "cuda"}, "where the model runs", &c->device);
  table.Choice("precision", {"auto", "exact", "fast"},
               "exact computes in f32; fast may round activations", &c->precision);
  table.Choice("quantization", {"none", "fp8"},
               "fp8 keeps the layers' weights on a GPU in 8 bits with a scale a row: half the memory, "
               "faster answers",
               &c->quantization);
  table.Switch("batch-invariant",
               "the same request gives the same tokens and probabilities to the bit whatever else is served "
               "beside it; slower on a GPU, and on the CPU with precision exact",
               &c->batch_invariant);
  table.Int("threads", 0, 1024, "threads", "CPU threads of the model; 0: all cores", &c->threads);
  table.Int("kv-cache-mib", 0, 1 << 24, "MiB",
            "memory for keys and values, and on a GPU for adapters; 0: 1024 on the CPU, on a GPU "
            "all that is free",
            &c->kv_cache_mib);
  table.Int("pinned-mib", 0, 1 << 24, "MiB",
            "host memory for adapters ready to be copied to a GPU, taken as needed; 0: a quarter of "
            "the machine's, at most 32768",
            &c->pinned_mib);
  table.Switch("no-prefix-cache", "computes every prompt in full, shared beginnings too",
               &c->no_prefix_cache);
  table.Int("max-context-tokens", 0, 1 << 24, "tokens",
            "longest prompt and answer together; 0: the model's own", &limits.max_context_tokens);
  table.Int("max-batch-tokens", 1, 1 << 15, "tokens", "rows of one step, prompt chunks included",
            &limits.max_batch_tokens);
  table.Int("max-running-requests", 1, 1 << 14, "requests", "requests in a step at most",
            &limits.max_running_requests);
  table.Int("max-queued-requests", 0, 1 << 20, "requests", "requests waiting behind them",
            &limits.max_queued_requests);
  table.Int("drain-s", 0, 86400, "s", "time that running requests get at shutdown or unload",
            &c->drain_s);
  table.Choice("log-format", {"text", "json"}, "of the lines on standard output", &c->log_format);
  table.Choice("log-level", {"debug", "info", "warning", "error"},
               "least level that is logged; POST /log_level changes it", &c->log_level);
  table.Text("otlp-endpoint", "URL",
             "OpenTelemetry collector that takes traces over gRPC, http://HOST:PORT",
             &c->otlp_endpoint);
  table.Int("trace-percent", 0, 100, "%",
            "requests traced of those that come without a traceparent, which decides for its own",
            &c->trace_percent);
  table.Int("metrics-adapters", 1, 10'000, "adapters",
            "those used most, which have metrics of their own; the rest are counted together; "
            "tenants likewise",
            &c->metrics_adapters);
  table.Switch("no-vllm-metrics", "leaves out the metrics that routers read, named as vLLM's",
               &c->no_vllm_metrics);
  table.Int("memory-bandwidth-gbs", 0, 1'000'000, "GB/s",
            "of the memory that the weights lie in, for the metrics; 0: measured at start",
            &c->memory_bandwidth_gbs);
  return table;
}

absl::Status ApplyYaml(const std::string& yaml, const OptionTable& table) {
  try {
    return ApplyMap(YAML::Load(yaml), table);
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("line ", error.mark.line + 1, ", column ",
                                                   error.mark.column + 1, ": ", error.msg));
  }
}

absl::StatusOr<ServerConfig> ParseServerConfig(std::span<const std::string> args) {
  ServerConfig config;
  OptionTable file_table = ServerOptions(&config);
  std::vector<std::string> flags;
  for (size_t i = 0; i < args.size(); ++i) {
    constexpr std::string_view kPrefix = "--config=";
    if (args[i] == "--config") {
      if (++i == args.size()) return absl::InvalidArgumentError("--config needs a value FILE");
      LK_RETURN_IF_ERROR(ApplyFile(args[i], file_table));
    } else if (args[i].starts_with(kPrefix)) {
      LK_RETURN_IF_ERROR(ApplyFile(args[i].substr(kPrefix.size()), file_table));
    } else {
      flags.push_back(args[i]);
    }
  }
  LK_ASSIGN_OR_RETURN(const std::vector<std::string> rest, FlagOptions(&config).ParseFlags(flags));
  if (!rest.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("unexpected argument '", rest[0], "'"));
  }
  if (config.model.empty()) {
    return absl::InvalidArgumentError("no model: give --model PATH or `model` in the file");
  }
  LK_RETURN_IF_ERROR(CheckTls(config.tls));
  return config;
}

std::string ServerHelp() {
  ServerConfig defaults;
  return FlagOptions(&defaults).Help();
}

}  // namespace lorikeet
