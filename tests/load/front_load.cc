// Times what the fronts add to a token: thousands of streams over a runner that computes nothing.
//
//   front_load http|grpc [STREAMS [TOKENS [ENGINES]]]       run from the source tree's root
//
// The server is one process and the client another, each on a core of its own. The runner ends a
// step every 100 ms, all streams of its engine have a row in it, and the text of a step's token says
// which step it was: an event's latency is from the end of that step to the client's read.
//
// All of a step's events are due at the same moment, so the last ones wait for all others. ENGINES
// spread the streams: each serves its share, on ports of its own, and their steps end in turn, evenly
// over the 100 ms.
#include <arpa/inet.h>
#include <grpcpp/grpcpp.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/model/base_model_view.h"
#include "lorikeet/v1/generation.grpc.pb.h"
#include "server/log.h"
#include "server/service.h"

namespace lorikeet {
namespace {

using std::chrono::steady_clock;

constexpr char kModel[] = "tests/golden/models/llama";
constexpr auto kStep = std::chrono::milliseconds(100);
constexpr int kLetters = 16;  // a step's token is one of so many: 1.6 s until one comes again
constexpr int kMaxEngines = 50;
constexpr int kSkipped = 30;  // tokens of a stream that are not counted: all have begun by then

// What the two processes share of an engine.
struct EnginePart {
  std::atomic<int> http_port{0};
  std::atomic<int> grpc_port{0};
  std::atomic<int64_t> ended_ns[kLetters] = {};
};

struct Shared {
  int engines = 1;
  EnginePart engine[kMaxEngines];
  std::atomic<bool> ready{false};
  std::atomic<bool> done{false};
};

// What is asked of a front.
struct Load {
  bool http = true;
  int streams = 2000;
  int tokens = 200;
};

int64_t NowNs() { return steady_clock::now().time_since_epoch().count(); }

int64_t ResidentKiB(pid_t pid) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) return std::atoll(line.c_str() + 6);
  }
  return 0;
}

// The processor time that a process has taken, in all of its threads.
double CpuSeconds(pid_t pid) {
  std::ifstream stat(absl::StrCat("/proc/", pid, "/stat"));
  std::string field;
  for (int i = 0; i < 13; ++i) stat >> field;
  double user = 0, system = 0;
  stat >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

// ---- the server

class PacedRunner final : public Runner {
 public:
  // Steps end at `phase` of every 100 ms.
  PacedRunner(EnginePart* part, std::chrono::nanoseconds phase, std::vector<int32_t> letters)
      : part_(part), phase_(phase), letters_(std::move(letters)) {}

  absl::StatusOr<StepResult> Run(const Batch& batch) override {
    const auto since = steady_clock::now().time_since_epoch() - phase_;
    const auto due = (since / kStep + 1) * kStep + phase_;
    std::this_thread::sleep_until(steady_clock::time_point(due));
    const int64_t letter = ++step_ % kLetters;
    StepResult result;
    result.sampled.resize(batch.logit_rows.size());
    for (SampledToken& sampled : result.sampled) sampled.token = letters_[letter];
    part_->ended_ns[letter] = NowNs();
    return result;
  }

 private:
  EnginePart* const part_;
  const std::chrono::nanoseconds phase_;
  const std::vector<int32_t> letters_;
  int64_t step_ = 0;
};

ServedModel MakeModel(EnginePart* part, std::chrono::nanoseconds phase, int streams) {
  auto opened = ModelSource::Open(kModel);
  LK_CHECK_MSG(opened.ok(), opened.status().ToString());
  const std::shared_ptr<const ModelSource> source = *std::move(opened);
  static BaseModelView base(source);
  const ModelConfig& shape = source->config();
  ServedModel model;
  model.name = shape.name;
  model.base = &base;
  model.kv = KvLayout::Make(shape.layers, shape.kv_heads, shape.head_dim, DType::kF32);
  model.pages = streams * (shape.context / KvLayout::kPageTokens + 1) * model.kv.pages_per_block;
  model.vocab_size = shape.vocab;
  model.context_tokens = shape.context;
  model.eos_ids = shape.eos_ids;
  model.tokenizer = *Tokenizer::FromDirectory(kModel);
  std::vector<int32_t> letters;
  for (int i = 0; i < kLetters; ++i) {
    const auto ids = model.tokenizer->Encode(std::string(1, static_cast<char>('A' + i)), false);
    LK_CHECK(ids.ok() && ids->size() == 1);
    letters.push_back(ids->front());
  }
  model.runner = std::make_unique<PacedRunner>(part, phase, std::move(letters));
  return model;
}

void Serve(Shared* shared, int streams) {
  SetLogLevel(LogLevel::kWarning);  // not a line a request
  ServerConfig config;
  config.model = kModel;
  config.grpc_port = config.http_port = 0;
  config.limits.max_running_requests = streams;
  config.limits.max_queued_requests = streams;
  config.limits.max_batch_tokens = 1 << 15;
  std::vector<std::unique_ptr<Service>> services;
  for (int i = 0; i < shared->engines; ++i) {
    EnginePart* part = &shared->engine[i];
    auto service = Service::Open(config);
    LK_CHECK_MSG(service.ok(), service.status().ToString());
    const absl::Status status =
        (*service)->Serve(MakeModel(part, kStep * i / shared->engines, streams));
    LK_CHECK_MSG(status.ok(), status.ToString());
    part->grpc_port = (*service)->grpc_port();
    part->http_port = (*service)->http_port();
    services.push_back(*std::move(service));
  }
  shared->ready = true;
  while (!shared->done) std::this_thread::sleep_for(std::chrono::milliseconds(50));
}

// ---- the client

class Latencies {
 public:
  Latencies(Shared* shared, pid_t server)
      : shared_(shared), server_(server), before_cpu_s_(CpuSeconds(server)) {}

  // A letter that was read now, the `nth` of a stream of `engine`.
  void Add(int engine, char letter, int nth) {
    if (letter < 'A' || letter >= 'A' + kLetters) return;
    ++events_;
    if (nth < kSkipped) return;
    micros_.push_back((NowNs() - shared_->engine[engine].ended_ns[letter - 'A']) / 1000);
  }
  void Print(double seconds, int finished, int failed) {
    const double cpu_s = CpuSeconds(server_) - before_cpu_s_;
    std::sort(micros_.begin(), micros_.end());
    const auto at = [this](double share) {
      return micros_.empty() ? 0.0 : micros_[size_t(share * (micros_.size() - 1))] / 1000.0;
    };
    std::printf("%d streams whole, %d not; %lld events, %.0f a second; from the step's end to the "
                "client: p50 %.2f ms, p99 %.2f ms, most %.2f ms; server: %.1f us of its core an event\n",
                finished, failed, static_cast<long long>(events_), events_ / seconds, at(0.5),
                at(0.99), at(1), 1e6 * cpu_s / static_cast<double>(std::max<int64_t>(events_, 1)));
  }

 private:
  Shared* const shared_;
  const pid_t server_;
  const double before_cpu_s_;
  int64_t events_ = 0;
  std::vector<int64_t> micros_;
};

struct Stream {
  int fd = -1;
  int engine = 0;
  int letters = 0;
  std::string left;  // read, not understood yet
};

int Connect(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  LK_CHECK(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  return fd;
}

// Takes the events that are whole; true after the last.
bool TakeEvents(Stream* stream, Latencies* latencies) {
  constexpr std::string_view kField = "\"text\":\"";
  size_t used = 0;
  for (size_t end; (end = stream->left.find("\n\n", used)) != std::string::npos; used = end + 2) {
    const std::string_view event(&stream->left[used], end - used);
    if (event.find("[DONE]") != std::string_view::npos) return true;
    const size_t at = event.find(kField);
    if (at == std::string_view::npos) continue;
    for (size_t i = at + kField.size(); i < event.size() && event[i] != '"'; ++i) {
      latencies->Add(stream->engine, event[i], stream->letters++);
    }
  }
  stream->left.erase(0, used);
  return false;
}

void RunHttp(Shared* shared, const Load& load, pid_t server) {
  const int64_t before_kib = ResidentKiB(server);
  const std::string body =
      absl::StrCat(R"({"model":"llama","prompt":"hi","stream":true,"ignore_eos":true,)",
                   R"("max_tokens":)", load.tokens, "}");
  const std::string request =
      absl::StrCat("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: ", body.size(),
                   "\r\n\r\n", body);
  const int poll = epoll_create1(0);
  std::vector<Stream> open(load.streams);
  for (int i = 0; i < load.streams; ++i) {
    open[i].engine = i % shared->engines;
    open[i].fd = Connect(shared->engine[open[i].engine].http_port);
    LK_CHECK(write(open[i].fd, request.data(), request.size()) == ssize_t(request.size()));
    epoll_event event{.events = EPOLLIN, .data = {.u32 = static_cast<uint32_t>(i)}};
    epoll_ctl(poll, EPOLL_CTL_ADD, open[i].fd, &event);
  }
  Latencies latencies(shared, server);
  const int64_t start = NowNs();
  int finished = 0, failed = 0;
  int64_t most_kib = 0, rounds = 0;
  std::vector<epoll_event> ready(512);
  std::vector<char> bytes(1 << 16);
  while (finished + failed < load.streams) {
    const int count = epoll_wait(poll, ready.data(), int(ready.size()), 1000);
    if (++rounds % 64 == 0) most_kib = std::max(most_kib, ResidentKiB(server));
    for (int i = 0; i < count; ++i) {
      Stream& stream = open[ready[i].data.u32];
      const ssize_t n = read(stream.fd, bytes.data(), bytes.size());
      if (n > 0) stream.left.append(bytes.data(), size_t(n));
      const bool whole = n > 0 && TakeEvents(&stream, &latencies);
      if (n > 0 && !whole) continue;
      (whole && stream.letters == load.tokens ? finished : failed) += 1;
      close(stream.fd);
    }
  }
  latencies.Print((NowNs() - start) / 1e9, finished, failed);
  std::printf("server: %lld KiB a stream\n",
              static_cast<long long>((most_kib - before_kib) / load.streams));
}

class GrpcStream final : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  struct All {
    std::mutex mutex;
    std::condition_variable changed;
    Latencies latencies;
    int finished = 0, failed = 0;
  };
  GrpcStream(v1::GenerationService::Stub* stub, const v1::GenerateRequest* request, int engine,
             All* all)
      : all_(all), engine_(engine), tokens_(request->stop().max_tokens()) {
    stub->async()->Generate(&context_, request, this);
    StartRead(&message_);
    StartCall();
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;
    {
      std::lock_guard lock(all_->mutex);
      for (const char letter : message_.text()) all_->latencies.Add(engine_, letter, letters_++);
    }
    StartRead(&message_);
  }
  void OnDone(const grpc::Status& status) override {
    std::lock_guard lock(all_->mutex);
    (status.ok() && letters_ == tokens_ ? all_->finished : all_->failed) += 1;
    all_->changed.notify_one();
  }

 private:
  All* const all_;
  const int engine_;
  const int tokens_;
  int letters_ = 0;
  grpc::ClientContext context_;
  v1::GenerateResponse message_;
};

void RunGrpc(Shared* shared, const Load& load, pid_t server) {
  constexpr int kStreamsEach = 100;  // of one connection
  const int64_t before_kib = ResidentKiB(server);
  v1::GenerateRequest request;
  request.set_text("hi");
  request.mutable_stop()->set_max_tokens(load.tokens);
  request.mutable_stop()->set_ignore_eos(true);
  GrpcStream::All all{.latencies = Latencies(shared, server)};
  std::vector<std::unique_ptr<v1::GenerationService::Stub>> stubs;
  std::vector<std::unique_ptr<GrpcStream>> open;
  const int connections = std::max(shared->engines, load.streams / kStreamsEach);
  for (int i = 0; i < connections; ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    const int port = shared->engine[i % shared->engines].grpc_port;
    stubs.push_back(v1::GenerationService::NewStub(grpc::CreateCustomChannel(
        absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials(), arguments)));
  }
  const int64_t start = NowNs();
  for (int i = 0; i < load.streams; ++i) {
    const int connection = i % connections;
    open.push_back(std::make_unique<GrpcStream>(stubs[connection].get(), &request,
                                                connection % shared->engines, &all));
  }
  int64_t most_kib = 0;
  std::unique_lock lock(all.mutex);
  while (all.finished + all.failed < load.streams) {
    all.changed.wait_for(lock, std::chrono::seconds(1));
    most_kib = std::max(most_kib, ResidentKiB(server));
  }
  all.latencies.Print((NowNs() - start) / 1e9, all.finished, all.failed);
  std::printf("server: %lld KiB a stream\n",
              static_cast<long long>((most_kib - before_kib) / load.streams));
}

// Of one core each, so that neither takes the other's time.
void PinTo(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  sched_setaffinity(0, sizeof cores, &cores);
}

int Main(int argc, char** argv) {
  Load load;
  load.http = argc > 1 && std::strcmp(argv[1], "http") == 0;
  if (argc > 2) load.streams = std::atoi(argv[2]);
  if (argc > 3) load.tokens = std::atoi(argv[3]);
  const int engines = argc > 4 ? std::atoi(argv[4]) : 1;
  LK_CHECK(engines >= 1 && engines <= kMaxEngines);
  const rlimit files{1 << 16, 1 << 16};
  setrlimit(RLIMIT_NOFILE, &files);
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  Shared* shared = new (memory) Shared{.engines = engines};
  const pid_t server = fork();
  if (server == 0) {
    PinTo(0);
    Serve(shared, load.streams);
    _exit(0);
  }
  PinTo(1);
  while (!shared->ready && waitpid(server, nullptr, WNOHANG) == 0) usleep(10'000);
  (load.http ? RunHttp : RunGrpc)(shared, load, server);
  shared->done = true;
  waitpid(server, nullptr, 0);
  return 0;
}

}  // namespace
}  // namespace lorikeet

int main(int argc, char** argv) { return lorikeet::Main(argc, argv); }
