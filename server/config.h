// What `lorikeet serve` can be told: one table, read from an optional YAML file and from flags.
// Flags override the file.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/layer_replication.h"
#include "engine/api/limits.h"
#include "server/http/limits.h"
#include "server/options.h"
#include "server/tls_files.h"

namespace lorikeet {

struct ServerConfig {
  std::string model;                       // a GGUF file or a Hugging Face directory
  std::string model_name;                  // empty: the model's own
  LayerReplication layer_replication;      // of the model; empty: its layers as they are
  NamedPaths adapters;                     // loaded before the server is ready
  std::vector<std::string> adapter_roots;  // none: nothing is loaded at run time
  std::vector<std::string> adapter_watches;    // directories below which adapters come and go
  std::vector<std::string> adapter_sources;    // URLs below which LoadAdapter fetches
  std::vector<std::string> adapter_on_demand;  // directories and URLs, for unknown names
  std::string adapter_dir;                 // empty: names are forgotten, uploads refused
  int32_t adapter_disk_mib = 16384;        // of what is fetched
  std::string s3_endpoint, s3_region, hub_endpoint;  // empty: SourceEndpoints' own
  int32_t adapter_host_mib = 0;            // 0: no bound
  int32_t max_adapters = 100'000;
  int32_t tenant_max_adapters = 0;      // 0: no bound
  int32_t tenant_adapter_host_mib = 0;  // 0: no bound
  int32_t tenant_adapter_disk_mib = 0;    // 0: no bound
  int32_t tenant_adapter_device_mib = 0;  // 0: no bound
  std::string host = "127.0.0.1";
  int32_t grpc_port = 50051;  // 0: any free port
  int32_t http_port = 8080;   // 0: any free port
  TlsFiles tls;
  std::string keys;           // keys file; empty: no keys
  std::string audit_log;      // file; empty: none
  bool open_admin = false;    // without keys, beyond loopback
  bool open_metrics = false;  // with keys
  std::string device = "auto";
  std::string precision = "auto";
  std::string quantization = "none";
  bool batch_invariant = false;
  int32_t threads = 0;  // 0: all cores
  int32_t kv_cache_mib = 0;
  int32_t pinned_mib = 0;  // 0: BackendOptions' choice
  bool allow_dense = false;  // AdapterRegistry::Options
  bool no_prefix_cache = false;
  Limits limits;
  HttpLimits http_limits;
  int32_t drain_s = 30;
  std::string log_format = "text";
  std::string log_level = "info";
  std::string otlp_endpoint;  // empty: nothing is traced
  int32_t trace_percent = 100;
  int32_t metrics_adapters = 100;  // MetricsOptions
  bool no_vllm_metrics = false;
  int32_t memory_bandwidth_gbs = 0;  // of what the weights lie in; 0: measured
};

// The table over `config`, which must outlive it.
OptionTable ServerOptions(ServerConfig* config);

// Applies a YAML file's content. INVALID_ARGUMENT: malformed YAML with line and column, an unknown
// key with the nearest one, a key given twice, a value that is out of its range.
absl::Status ApplyYaml(const std::string& yaml, const OptionTable& table);

// The arguments after `serve`: --config FILE first, then the flags. Every message names the
// file or flag it is about. INVALID_ARGUMENT too when there is no model.
absl::StatusOr<ServerConfig> ParseServerConfig(std::span<const std::string> args);

// The table as text, for --help.
std::string ServerHelp();

}  // namespace lorikeet
