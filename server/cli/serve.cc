// `lorikeet serve`: opens the model, starts the service, waits for a signal, drains.
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "engine/model/model_source.h"
#include "engine/runner/model_runner.h"
#include "server/cli/commands.h"
#include "server/listen.h"
#include "server/log.h"
#include "server/service.h"
#include "server/version.h"

namespace lorikeet {
namespace {

constexpr char kUsage[] = "lorikeet serve --model PATH [flags]\n";
constexpr int64_t kMiB = 1 << 20;
constexpr long kDevicePollNs = 250'000'000;

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const ModelSource& source,
                                                         const std::string& path) {
  if (source.gguf() == nullptr) return Tokenizer::FromDirectory(path);
  LK_ASSIGN_OR_RETURN(const GgufTokenizerSpec spec, ReadGgufTokenizerSpec(*source.gguf()));
  return Tokenizer::FromGguf(spec);
}

absl::Status OpenChatTemplate(ServedModel* model) {
  const ChatTemplateSource& source = model->tokenizer->chat_template();
  if (source.text.empty()) return absl::OkStatus();
  LK_ASSIGN_OR_RETURN(model->chat_template,
                      ChatTemplate::Create(source, model->tokenizer->named()));
  return absl::OkStatus();
}

absl::StatusOr<ServedModel> OpenModel(const ServerConfig& config) {
  LK_ASSIGN_OR_RETURN(std::shared_ptr<const ModelSource> source,
                      ModelSource::Open(config.model, config.layer_replication));
  RunnerOptions options;
  options.device = config.device;
  options.precision = config.precision;
  options.quantization = config.quantization;
  options.batch_invariant = config.batch_invariant;
  options.threads = config.threads;
  options.kv_bytes = config.kv_cache_mib * kMiB;
  options.pinned_bytes = config.pinned_mib * kMiB;
  options.limits = config.limits;
  ServedModel model;
  LK_ASSIGN_OR_RETURN(std::unique_ptr<ModelRunner> runner, ModelRunner::Create(source, options));
  LK_ASSIGN_OR_RETURN(model.tokenizer, OpenTokenizer(*source, config.model));
  LK_RETURN_IF_ERROR(OpenChatTemplate(&model));
  model.name = source->config().name;
  model.base = &runner->base_model();
  model.kv = runner->kv();
  model.pages = runner->pages();
  model.weight_bytes = runner->weight_bytes();
  model.bandwidth = config.memory_bandwidth_gbs > 0 ? config.memory_bandwidth_gbs * 1e9
                                                    : runner->MeasureBandwidth();
  model.vocab_size = source->config().vocab;
  model.context_tokens = source->config().context;
  model.eos_ids = source->config().eos_ids;
  for (const int32_t id : model.tokenizer->end_ids()) {
    if (std::find(model.eos_ids.begin(), model.eos_ids.end(), id) == model.eos_ids.end()) {
      model.eos_ids.push_back(id);
    }
  }
  Log(LogLevel::kInfo, absl::StrCat("model ", model.name, " (", source->config().family, ", ",
                   source->config().layers, " layers) on ", runner->Describe()));
  if (!runner->no_gpu().ok()) Log(LogLevel::kInfo, absl::StrCat("no GPU: ", runner->no_gpu().message()));
  model.runner = std::move(runner);
  return model;
}

// Of this thread and those it starts.
sigset_t BlockStopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  return signals;
}

// Every connection is a file, and what a shell or a service manager gives is less than it allows.
void RaiseFileLimit() {
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
}

// Until a signal comes or the device fails, which is returned.
absl::Status WaitForStop(const Service& service, const sigset_t& signals) {
  const timespec poll{0, kDevicePollNs};
  while (sigtimedwait(&signals, nullptr, &poll) < 0) LK_RETURN_IF_ERROR(service.device_status());
  // A second signal ends the process at once.
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
  return absl::OkStatus();
}

}  // namespace

absl::Status RunServe(Arguments args) {
  for (const std::string& arg : args) {
    if (arg == "--help" || arg == "-h") {
      std::printf("%s\n%s", kUsage, ServerHelp().c_str());
      return absl::OkStatus();
    }
  }
  LK_ASSIGN_OR_RETURN(const ServerConfig config, ParseServerConfig(args));
  SetLogJson(config.log_format == "json");
  LK_ASSIGN_OR_RETURN(const LogLevel level, ParseLogLevel(config.log_level));
  SetLogLevel(level);
  RaiseFileLimit();
  const sigset_t signals = BlockStopSignals();
  const SteadyClock clock;
  const int64_t start_us = clock.NowMicros();
  LK_ASSIGN_OR_RETURN(const std::unique_ptr<Service> service, Service::Open(config));
  Log(LogLevel::kInfo, absl::StrCat("lorikeet ", kVersion, ", loading ", config.model));
  LK_ASSIGN_OR_RETURN(ServedModel model, OpenModel(config));
  LK_RETURN_IF_ERROR(service->Serve(std::move(model)));
  Log(LogLevel::kInfo, absl::StrFormat("ready after %.2f s: gRPC %s, HTTP %s, %d adapters",
                      (clock.NowMicros() - start_us) / 1e6,
                      HostPort(config.host, service->grpc_port()),
                      HostPort(config.host, service->http_port()), service->adapters()));
  const absl::Status status = WaitForStop(*service, signals);
  if (status.ok()) Log(LogLevel::kInfo, absl::StrCat("stopping; running requests have ", config.drain_s, " s"));
  service->Drain(config.drain_s);
  if (status.ok()) Log(LogLevel::kInfo, "stopped");
  return status;
}

}  // namespace lorikeet
