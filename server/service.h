// The running service: both ports, the adapter registry and the engine over one model.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/mixer.h"
#include "adapters_cache/registry.h"
#include "engine/api/base_model.h"
#include "engine/base/file_descriptor.h"
#include "engine/engine.h"
#include "engine/memory/kv_layout.h"
#include "engine/runner/runner.h"
#include "server/adapter_admin.h"
#include "server/adapter_texts.h"
#include "server/auth/access.h"
#include "server/auth/audit_log.h"
#include "server/config.h"
#include "server/file_watch.h"
#include "server/generation.h"
#include "server/grpc/grpc_server.h"
#include "server/http/http_server.h"
#include "server/metrics.h"
#include "server/openai/http_api.h"
#include "server/sources/directory_watch.h"
#include "server/sources/remote_sources.h"
#include "server/text/chat_template.h"
#include "server/text/tokenizer.h"
#include "server/tracing/request_log.h"
#include "server/tracing/span_exporter.h"

namespace lorikeet {

// A model, ready to serve.
struct ServedModel {
  std::string name;
  std::unique_ptr<Runner> runner;
  const BaseModel* base = nullptr;  // owned by whoever owns the runner's weights: lives as long
  KvLayout kv;
  int32_t pages = 0;
  int32_t vocab_size = 0;
  int32_t context_tokens = 0;  // the model's own
  int64_t weight_bytes = 0;    // that every step reads
  double bandwidth = 0;        // bytes a second of the memory they are in; 0: not known
  std::vector<int32_t> eos_ids;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;  // null: none
  std::unique_ptr<Grammars> grammars;           // null: no end-of-sequence token
};

class Service {
 public:
  // Opens the HTTP port: /health answers, /ready does not yet. Checks that the gRPC port is free,
  // so that a long load does not end at a port in use.
  static absl::StatusOr<std::unique_ptr<Service>> Open(const ServerConfig& config);
  ~Service();  // Drain(0) if still serving

  // Starts the engine, loads the configured adapters and opens the gRPC port. Once. An error names
  // the adapter or the port.
  absl::Status Serve(ServedModel model);

  // Not ready any more; new requests get UNAVAILABLE, running ones finish for at most `grace_s`.
  // Then both ports close. Idempotent.
  void Drain(int32_t grace_s);

  int http_port() const { return http_->port(); }
  int grpc_port() const { return grpc_->port(); }  // REQUIRES: serving
  int adapters() const;                            // REQUIRES: serving
  // Not OK once the device failed: every request gets UNAVAILABLE from then on. REQUIRES: serving.
  absl::Status device_status() const { return engine_->device_status(); }

 private:
  explicit Service(const ServerConfig& config);

  absl::Status OpenAccess();
  absl::Status OpenRequestLog();
  absl::Status TakeDirectory();
  absl::Status StartSources();
  absl::Status StartRegistry();
  void StartWatch();
  absl::Status StartEngine();
  AdapterAdmin::Options ForAdmin() const;
  absl::Status LoadAdapters();
  std::string MetricsText();
  Metrics::Current CurrentMetrics() const;
  int64_t AdaptersThatFit(const Metrics::Current& current) const;

  // Destroyed from the bottom up: fronts first, then what they use.
  const ServerConfig config_;
  SteadyClock clock_;
  Metrics metrics_;
  std::unique_ptr<SpanExporter> exporter_;  // null: nothing is traced
  std::unique_ptr<RequestLog> request_log_;
  std::unique_ptr<AuditLog> audit_;
  std::unique_ptr<Access> access_;
  std::unique_ptr<FileWatch> keys_watch_;  // null: no keys file
  ServedModel model_;
  ServingContext context_;
  std::unique_ptr<FileDescriptor> directory_;  // adapter_dir, locked; nullptr: there is none
  std::unique_ptr<Uploads> uploads_;     // nullptr: none are taken
  std::unique_ptr<AdapterAdmin> admin_;  // takes what the registry's last calls end with
  std::unique_ptr<AdapterMixer> mixer_;  // takes what the registry's last loads bring
  std::unique_ptr<AdapterTexts> texts_;
  std::unique_ptr<RemoteSources> sources_;  // nullptr: none
  std::unique_ptr<AdapterRegistry> registry_;
  std::unique_ptr<DirectoryWatch> watch_;  // nullptr: none
  std::unique_ptr<Engine> engine_;
  std::atomic<bool> ready_{false};
  std::atomic<bool> started_{false};  // registry_ and engine_ are there for good
  std::unique_ptr<HttpApi> http_api_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<GrpcServer> grpc_;
};

}  // namespace lorikeet
