#include "server/service.h"

#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <limits>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/listen.h"
#include "server/log.h"

namespace lorikeet {
namespace {

// Written responses need a moment to reach their clients after the engine is done.
constexpr auto kFlushGrace = std::chrono::seconds(2);

constexpr int64_t kMiB = 1 << 20;

// The longest prompt and answer together that the model, the configuration and the pages allow.
int32_t ContextTokens(const ServerConfig& config, const ServedModel& model) {
  const int64_t pool = int64_t{model.pages} / model.kv.pages_per_block * KvLayout::kPageTokens;
  int64_t tokens = std::min<int64_t>(model.context_tokens, pool);
  if (config.limits.max_context_tokens > 0) {
    tokens = std::min<int64_t>(tokens, config.limits.max_context_tokens);
  }
  return static_cast<int32_t>(tokens);
}

// For the images of one tenant's adapters.
int32_t TenantImagePages(const ServerConfig& config, const ServedModel& model) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (config.tenant_adapter_device_mib == 0) return kMost;
  return static_cast<int32_t>(
      std::min(kMost, config.tenant_adapter_device_mib * kMiB / model.kv.page_bytes()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Service>> Service::Open(const ServerConfig& config) {
  std::unique_ptr<Service> self(new Service(config));
  LK_RETURN_IF_ERROR(CheckCanListen(config.host, config.grpc_port, "gRPC port"));
  HttpApi::Probes probes;
  probes.health = [service = self.get()] {
    return service->started_ ? service->device_status() : absl::OkStatus();
  };
  probes.ready = [service = self.get()] {
    return service->ready_ && service->device_status().ok();
  };
  probes.metrics = [service = self.get()] { return service->MetricsText(); };
  LK_RETURN_IF_ERROR(self->OpenRequestLog());
  LK_RETURN_IF_ERROR(self->OpenAccess());
  self->http_api_ = std::make_unique<HttpApi>(std::move(probes), self->access_.get(),
                                              self->audit_.get());
  LK_ASSIGN_OR_RETURN(
      self->http_,
      HttpServer::Start({config.host, config.http_port, config.tls, config.http_limits},
                        [api = self->http_api_.get()](HttpRequest request, auto wake) {
                          return api->Handle(std::move(request), wake);
                        },
                        [api = self->http_api_.get()](const HttpRequest& head) {
                          return api->Refusal(head);
                        }));
  return self;
}

Service::Service(const ServerConfig& config)
    : config_(config),
      metrics_({.vllm = !config.no_vllm_metrics, .named_adapters = config.metrics_adapters}) {}

absl::Status Service::OpenRequestLog() {
  if (!config_.otlp_endpoint.empty()) {
    LK_ASSIGN_OR_RETURN(exporter_, SpanExporter::Start(config_.otlp_endpoint));
  }
  request_log_ = std::make_unique<RequestLog>(&clock_, exporter_.get(), config_.trace_percent);
  return absl::OkStatus();
}

absl::Status Service::OpenAccess() {
  const bool trusted =
      config_.open_admin || IsLoopback(config_.host) || !config_.tls.client_ca.empty();
  const Access::Options options{.keys_file = config_.keys,
                                .trusted_callers = trusted,
                                .open_metrics = config_.open_metrics};
  LK_ASSIGN_OR_RETURN(audit_, AuditLog::Open(config_.audit_log));
  LK_ASSIGN_OR_RETURN(access_, Access::Open(options, &clock_, audit_.get()));
  if (config_.keys.empty()) return absl::OkStatus();
  keys_watch_ = std::make_unique<FileWatch>(
      std::vector{config_.keys}, [access = access_.get(), file = config_.keys] {
        const absl::Status status = access->Reload();
        if (status.ok()) return Log(LogLevel::kInfo, absl::StrCat("keys read again from ", file));
        Log(LogLevel::kWarning, absl::StrCat(status.message(), "; the keys from before stay"));
      });
  return absl::OkStatus();
}

Service::~Service() {
  Drain(0);
  if (registry_ != nullptr) registry_->SetDevice(nullptr);
}

absl::Status Service::Serve(ServedModel model) {
  model_ = std::move(model);
  if (!model_.eos_ids.empty()) {
    LK_ASSIGN_OR_RETURN(model_.grammars, Grammars::Create(*model_.tokenizer, model_.vocab_size,
                                                          model_.eos_ids));
  }
  if (!config_.model_name.empty()) model_.name = config_.model_name;
  LK_RETURN_IF_ERROR(TakeDirectory());
  LK_RETURN_IF_ERROR(StartSources());
  LK_RETURN_IF_ERROR(StartRegistry());
  LK_RETURN_IF_ERROR(StartEngine());
  started_ = true;
  LK_RETURN_IF_ERROR(LoadAdapters());
  StartWatch();
  LK_ASSIGN_OR_RETURN(grpc_, GrpcServer::Start(&context_, admin_.get(),
                                               {config_.host, config_.grpc_port, config_.tls}));
  http_api_->Serve(&context_, admin_.get());
  ready_ = true;
  return absl::OkStatus();
}

// Two servers would write over each other's list of adapters. A file system without locks is trusted.
absl::Status Service::TakeDirectory() {
  if (config_.adapter_dir.empty()) return absl::OkStatus();
  std::error_code error;
  std::filesystem::create_directories(config_.adapter_dir, error);
  if (error) {
    return absl::UnavailableError(absl::StrCat("adapter directory ", config_.adapter_dir, ": ",
                                               error.message()));
  }
  directory_ = std::make_unique<FileDescriptor>(
      open(config_.adapter_dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (flock(directory_->get(), LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("adapter directory ", config_.adapter_dir, " is another server's, which runs"));
}

absl::Status Service::StartSources() {
  RemoteSources::Options options;
  options.allowed = config_.adapter_sources;
  for (const std::string& location : config_.adapter_on_demand) {
    if (AdapterSources::Takes(location)) options.allowed.push_back(location);
  }
  if (options.allowed.empty()) return absl::OkStatus();
  if (config_.adapter_dir.empty()) {
    return absl::InvalidArgumentError("adapter sources need --adapter-dir, to keep what they send");
  }
  options.directory = std::filesystem::path(config_.adapter_dir) / "fetched";
  options.disk_bytes = config_.adapter_disk_mib * kMiB;
  if (config_.tenant_adapter_disk_mib > 0) {
    options.tenant_disk_bytes = config_.tenant_adapter_disk_mib * kMiB;
  }
  options.credentials = SourceCredentials::FromEnvironment();
  SourceEndpoints& endpoints = options.endpoints;
  if (!config_.s3_endpoint.empty()) endpoints.s3 = config_.s3_endpoint;
  if (!config_.s3_region.empty()) endpoints.s3_region = config_.s3_region;
  if (!config_.hub_endpoint.empty()) endpoints.hub = config_.hub_endpoint;
  LK_ASSIGN_OR_RETURN(sources_, RemoteSources::Create(std::move(options)));
  return absl::OkStatus();
}

void Service::StartWatch() {
  if (config_.adapter_watches.empty()) return;
  watch_ = std::make_unique<DirectoryWatch>(
      registry_.get(),
      std::vector<std::filesystem::path>(config_.adapter_watches.begin(),
                                         config_.adapter_watches.end()),
      [this](const DirectoryWatch::Loaded& loaded) {
        metrics_.OnAdapterLoad(loaded.status, loaded.took_us);
        if (loaded.status.ok()) return;
        Log(LogLevel::kWarning, absl::StrCat(loaded.path, ": ", loaded.status.ToString()));
      });
}

absl::Status Service::StartRegistry() {
  AdapterRegistry::Options options;
  options.base_name = model_.name;
  options.allowed_roots.assign(config_.adapter_roots.begin(), config_.adapter_roots.end());
  options.allowed_roots.insert(options.allowed_roots.end(), config_.adapter_watches.begin(),
                               config_.adapter_watches.end());
  options.sources = sources_.get();
  options.on_demand = config_.adapter_on_demand;
  for (const std::string& location : config_.adapter_on_demand) {
    if (!AdapterSources::Takes(location)) options.allowed_roots.emplace_back(location);
  }
  texts_ = std::make_unique<AdapterTexts>(*model_.tokenizer, model_.eos_ids);
  options.read_text = [texts = texts_.get()](const auto& files, const auto& where, int32_t vocab) {
    return texts->Read(files, where, vocab);
  };
  options.allow_dense = config_.allow_dense;
  options.on_host = model_.runner->images() == nullptr;
  options.images = model_.runner->images();
  options.tenant_image_pages = TenantImagePages(config_, model_);
  options.max_adapters = config_.max_adapters;
  if (config_.adapter_host_mib > 0) options.host_bytes = config_.adapter_host_mib * kMiB;
  if (config_.tenant_max_adapters > 0) options.tenant_max_adapters = config_.tenant_max_adapters;
  if (config_.tenant_adapter_host_mib > 0) {
    options.tenant_host_bytes = config_.tenant_adapter_host_mib * kMiB;
  }
  if (config_.tenant_adapter_disk_mib > 0) {
    options.tenant_disk_bytes = config_.tenant_adapter_disk_mib * kMiB;
  }
  if (!config_.adapter_dir.empty()) {
    options.state_file = std::filesystem::path(config_.adapter_dir) / "registry";
    uploads_ = std::make_unique<Uploads>(std::filesystem::path(config_.adapter_dir) / "uploads");
    options.owned = uploads_->directory();
    options.on_unused = [uploads = uploads_.get()](const std::filesystem::path& directory) {
      uploads->Remove(directory);
    };
  }
  LK_ASSIGN_OR_RETURN(registry_, AdapterRegistry::Create(*model_.base, options));
  admin_ = std::make_unique<AdapterAdmin>(registry_.get(), uploads_.get(), &metrics_, audit_.get(),
                                          ForAdmin());
  mixer_ = std::make_unique<AdapterMixer>(*model_.base, registry_.get());
  return absl::OkStatus();
}

AdapterAdmin::Options Service::ForAdmin() const {
  AdapterAdmin::Options options;
  options.drain = std::chrono::seconds(config_.drain_s);
  options.capacity = {.base = model_.base,
                      .kv = model_.kv,
                      .pages = model_.pages,
                      .images = model_.runner->images()};
  if (config_.adapter_host_mib > 0) options.capacity.host_bytes = config_.adapter_host_mib * kMiB;
  return options;
}

absl::Status Service::StartEngine() {
  EngineOptions options;
  options.limits = config_.limits;
  options.limits.max_context_tokens = ContextTokens(config_, model_);
  options.kv = model_.kv;
  options.pages = model_.pages;
  options.prefix_cache = !config_.no_prefix_cache;
  options.vocab = model_.vocab_size;
  options.eos_ids = model_.eos_ids;
  options.tenant_image_pages = TenantImagePages(config_, model_);
  LK_ASSIGN_OR_RETURN(engine_, Engine::Start(options, model_.runner.get(), &clock_, &metrics_));
  registry_->SetDevice(engine_.get());
  context_ = {.text = {.tokenizer = model_.tokenizer.get(),
                       .grammars = model_.grammars.get(),
                       .chat_template = model_.chat_template.get(),
                       .vocab_size = model_.vocab_size},
              .engine = engine_.get(),
              .access = access_.get(),
              .adapters = registry_.get(),
              .mixer = mixer_.get(),
              .clock = &clock_,
              .metrics = &metrics_,
              .request_log = request_log_.get(),
              .model_name = model_.name,
              .started_unix_s = std::time(nullptr),
              .hidden_size = model_.base->hidden(),
              .max_context_tokens = options.limits.max_context_tokens};
  return absl::OkStatus();
}

absl::Status Service::LoadAdapters() {
  for (const auto& [name, path] : config_.adapters) {
    const int64_t start_us = clock_.NowMicros();
    const absl::Status status =
        registry_
            ->Load(name, path,
                   {.origin = AdapterRegistry::Origin::kOperator, .replace = true, .keep = false})
            .status();
    metrics_.OnAdapterLoad(status, clock_.NowMicros() - start_us);
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat("adapter '", name, "': ", status.message()));
    }
  }
  return absl::OkStatus();
}

void Service::Drain(int32_t grace_s) {
  ready_ = false;
  if (sources_ != nullptr) sources_->Cancel();
  if (grpc_ != nullptr) grpc_->SetDraining();
  if (engine_ != nullptr)
    engine_->Shutdown(std::chrono::microseconds(std::chrono::seconds(grace_s)).count());
  if (grpc_ != nullptr) grpc_->Stop(kFlushGrace);
}

int Service::adapters() const { return static_cast<int>(registry_->stats().names); }

std::string Service::MetricsText() {
  return metrics_.Text(started_ ? CurrentMetrics() : Metrics::Current());
}

Metrics::Current Service::CurrentMetrics() const {
  Metrics::Current current;
  ServerState& state = current.state;
  const Engine::Gauges gauges = engine_->gauges();
  state.waiting = gauges.waiting;
  state.running = gauges.running;
  state.block_tokens = KvLayout::kPageTokens;
  state.blocks = model_.pages / model_.kv.pages_per_block;
  state.in_host = registry_->List({.in_host_only = true, .limit = kMaxListedAdapters});
  state.has_device_tier = model_.runner->images() != nullptr;
  current.adapters = registry_->stats();
  current.images = gauges.images;
  current.decode_waits = gauges.decode_waits;
  state.max_adapters = AdaptersThatFit(current);
  current.device_memory = model_.runner->memory_use();
  current.weight_bytes = model_.weight_bytes;
  if (exporter_ != nullptr) current.spans = exporter_->counts();
  current.bandwidth = model_.bandwidth;
  current.gone = [this](const std::string& name) { return !registry_->Find(name).ok(); };
  return current;
}

// By the mean size of those that are there.
int64_t Service::AdaptersThatFit(const Metrics::Current& current) const {
  if (current.state.has_device_tier) {
    const ImageCounts& images = current.images;
    if (images.image_bytes == 0) return config_.max_adapters;
    return model_.pages * model_.kv.page_bytes() / (images.image_bytes / images.images);
  }
  const RegistryStats& host = current.adapters;
  if (config_.adapter_host_mib == 0 || host.in_host == 0) return config_.max_adapters;
  return std::min<int64_t>(config_.max_adapters,
                           config_.adapter_host_mib * kMiB / (host.host_bytes / host.in_host));
}

}  // namespace lorikeet
