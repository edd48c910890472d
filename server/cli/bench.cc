// `lorikeet bench`: load on a running server, closed loop (a fixed number of streams) or open loop
// (Poisson arrivals at a rate). One thread over one completion queue, so that on a small machine it
// takes little from the server it measures.
#include <grpcpp/completion_queue.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "lorikeet/v1/generation.grpc.pb.h"
#include "server/cli/bench_stats.h"
#include "server/cli/client.h"

namespace lorikeet {
namespace {

using SteadyTime = std::chrono::steady_clock::time_point;

constexpr char kUsage[] = "lorikeet bench [flags]\n";

struct BenchFlags {
  ServerAddress server;
  int32_t concurrency = 8;
  double rate = 0;
  int32_t requests = 64;
  int32_t warmup = 0;
  std::string adapters = "base";
  double zipf = 0;
  int32_t prompt_tokens = 37;
  std::string prompt_file;
  int32_t max_tokens = 48;
  bool ignore_eos = false;
  int32_t seed = 1;
  std::string json_file;
};

OptionTable BenchOptions(BenchFlags* f) {
  OptionTable table;
  AddServerOption(&table, &f->server);
  table.Int("concurrency", 1, 4096, "streams", "closed loop: streams at the same time",
            &f->concurrency);
  table.Real("rate", 0, 1e6, "requests/s", "open loop: arrivals at this rate; 0: closed loop",
             &f->rate);
  table.Int("requests", 1, 1 << 24, "requests", "requests measured", &f->requests);
  table.Int("warmup", 0, 1 << 20, "requests", "requests before, not measured", &f->warmup);
  table.Text("adapters", "A,B,C", "taken in turn; base: no adapter", &f->adapters);
  table.Real("zipf", 0, 10, "",
             "draws adapters by Zipf's law with this exponent, the first most often; 0: in turn",
             &f->zipf);
  table.Int("prompt-tokens", 1, 1 << 20, "tokens", "length of random prompts", &f->prompt_tokens);
  table.Text("prompt", "FILE", "use this text as every prompt instead", &f->prompt_file);
  table.Int("max-tokens", 1, 1 << 20, "tokens", "longest answer", &f->max_tokens);
  table.Switch("ignore-eos", "every answer has max-tokens tokens", &f->ignore_eos);
  table.Int("seed", 0, 1 << 30, "", "of prompts, sampling and arrivals", &f->seed);
  table.Text("json", "FILE", "writes the result there too", &f->json_file);
  return table;
}

// What the operation that just ended on a stream was.
enum class Step : uint8_t { kStarted, kRead, kFinished };

struct Stream {
  Step pending = Step::kStarted;
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientAsyncReader<v1::GenerateResponse>> reader;
  v1::GenerateResponse message;
  grpc::Status status;
  SteadyTime due;  // when it should have been sent
  SteadyTime last_token;
  int64_t tokens = 0;
};

class ProgressBar {
 public:
  explicit ProgressBar(int64_t total) : total_(total), shown_(isatty(STDERR_FILENO)) {}
  ~ProgressBar() {
    if (shown_) std::fprintf(stderr, "\r\033[K");
  }
  void Update(int64_t done, int64_t tokens, double seconds) {
    if (!shown_ || done * 200 / total_ == last_) return;
    last_ = done * 200 / total_;
    const int filled = static_cast<int>(done * kWidth / total_);
    std::fprintf(stderr, "\r[%s%s] %lld/%lld  %.0f tokens/s", std::string(filled, '#').c_str(),
                 std::string(kWidth - filled, '.').c_str(), static_cast<long long>(done),
                 static_cast<long long>(total_), seconds > 0 ? tokens / seconds : 0.0);
  }

 private:
  static constexpr int kWidth = 40;
  const int64_t total_;
  const bool shown_;
  int64_t last_ = -1;
};

class Bench {
 public:
  Bench(const BenchFlags& flags, std::string prompt_text)
      : flags_(flags),
        prompt_text_(std::move(prompt_text)),
        adapters_(absl::StrSplit(flags.adapters, ',')),
        stub_(v1::GenerationService::NewStub(Connect(flags.server))),
        random_(flags.seed) {
    std::vector<double> weights;
    for (size_t i = 0; i < adapters_.size(); ++i) weights.push_back(std::pow(i + 1.0, -flags.zipf));
    popularity_ = std::discrete_distribution<size_t>(weights.begin(), weights.end());
  }

  absl::StatusOr<BenchResult> Run() {
    grpc::ClientContext context;
    LK_RETURN_IF_ERROR(CallStatus(flags_.server, stub_->GetModel(&context, {}, &model_)));
    Load(flags_.warmup, /*measured=*/false);
    result_ = BenchResult();
    Load(flags_.requests, /*measured=*/true);
    result_.concurrency = flags_.rate > 0 ? 0 : flags_.concurrency;
    result_.rate_per_s = flags_.rate;
    result_.adapters = adapters_;
    return std::move(result_);
  }

 private:
  // Sends `requests` and waits for all of them.
  void Load(int64_t requests, bool measured) {
    ProgressBar bar(measured ? requests : 1);
    const SteadyTime start = std::chrono::steady_clock::now();
    SteadyTime next_due = start;
    int64_t sent = 0, done = 0, open = 0;
    while (done < requests) {
      const SteadyTime now = std::chrono::steady_clock::now();
      while (sent < requests && (flags_.rate > 0 ? next_due <= now : open < flags_.concurrency)) {
        Send(sent++, flags_.rate > 0 ? next_due : now);
        ++open;
        if (flags_.rate > 0) next_due += Gap();
      }
      const bool timed = flags_.rate > 0 && sent < requests;
      if (!WaitForEvent(timed ? &next_due : nullptr)) continue;
      ++done;
      --open;
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      result_.wall_s = elapsed.count();
      if (measured) bar.Update(done, result_.completion_tokens, result_.wall_s);
    }
  }

  std::chrono::nanoseconds Gap() {
    const double seconds = std::exponential_distribution<double>(flags_.rate)(random_);
    return std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9));
  }

  void Send(int64_t index, SteadyTime due) {
    auto stream = std::make_unique<Stream>();
    v1::GenerateRequest request;
    if (prompt_text_.empty()) {
      std::uniform_int_distribution<int32_t> token(0, model_.vocab_size() - 1);
      auto* ids = request.mutable_token_ids()->mutable_ids();
      for (int32_t i = 0; i < flags_.prompt_tokens; ++i) ids->Add(token(random_));
    } else {
      request.set_text(prompt_text_);
    }
    const size_t drawn = flags_.zipf > 0 ? popularity_(random_) : index % adapters_.size();
    const std::string& adapter = adapters_[drawn];
    if (adapter != "base") request.set_adapter(adapter);
    request.mutable_sampling()->set_temperature(0);
    request.mutable_stop()->set_max_tokens(flags_.max_tokens);
    request.mutable_stop()->set_ignore_eos(flags_.ignore_eos);
    stream->due = due;
    stream->reader = stub_->PrepareAsyncGenerate(&stream->context, request, &queue_);
    stream->reader->StartCall(stream.get());
    stream.release();  // the queue gives it back
  }

  // Handles one event, or none by `until`. True if a request ended.
  bool WaitForEvent(const SteadyTime* until) {
    void* tag = nullptr;
    bool ok = false;
    if (until == nullptr) {
      LK_CHECK(queue_.Next(&tag, &ok));
    } else {
      const auto wait = *until - std::chrono::steady_clock::now();
      const auto deadline = std::chrono::system_clock::now() +
                            std::chrono::duration_cast<std::chrono::system_clock::duration>(wait);
      if (queue_.AsyncNext(&tag, &ok, deadline) != grpc::CompletionQueue::GOT_EVENT) return false;
    }
    auto* stream = static_cast<Stream*>(tag);
    if (stream->pending == Step::kFinished) {
      OnFinished(std::unique_ptr<Stream>(stream));
      return true;
    }
    if (stream->pending == Step::kRead && ok) OnMessage(stream);
    if (ok) {
      stream->pending = Step::kRead;
      stream->reader->Read(&stream->message, stream);
    } else {
      stream->pending = Step::kFinished;
      stream->reader->Finish(&stream->status, stream);
    }
    return false;
  }

  void OnMessage(Stream* stream) {
    const int tokens = stream->message.token_ids_size();
    if (tokens > 0) {
      const SteadyTime now = std::chrono::steady_clock::now();
      const auto ms = [&](SteadyTime from) {
        return std::chrono::duration<double, std::milli>(now - from).count();
      };
      const bool first = stream->tokens == 0;
      if (first) result_.ttft_ms.push_back(ms(stream->due));
      // The first message has no token before it to measure from.
      const int gaps = first ? 0 : tokens;
      if (gaps > 0)
        result_.itl_ms.insert(result_.itl_ms.end(), gaps, ms(stream->last_token) / gaps);
      stream->last_token = now;
      stream->tokens += tokens;
      result_.completion_tokens += tokens;
    }
    if (stream->message.has_finish()) {
      result_.prompt_tokens += stream->message.finish().usage().prompt_tokens();
    }
    stream->message.Clear();
  }

  void OnFinished(std::unique_ptr<Stream> stream) {
    if (stream->status.ok()) {
      ++result_.ok;
      return;
    }
    ++result_.failed;
    if (result_.first_error.empty()) {
      result_.first_error = std::string(CallStatus(flags_.server, stream->status).message());
    }
  }

  const BenchFlags& flags_;
  const std::string prompt_text_;
  const std::vector<std::string> adapters_;
  const std::unique_ptr<v1::GenerationService::Stub> stub_;
  grpc::CompletionQueue queue_;
  std::mt19937_64 random_;
  std::discrete_distribution<size_t> popularity_;  // of `adapters_`
  v1::GetModelResponse model_;
  BenchResult result_;
};

absl::Status WriteFile(const std::string& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary);
  file << content;
  file.close();
  if (file.fail()) return absl::UnavailableError(absl::StrCat("cannot write '", path, "'"));
  return absl::OkStatus();
}

}  // namespace

absl::Status RunBench(Arguments args) {
  BenchFlags flags;
  const OptionTable table = BenchOptions(&flags);
  if (PrintedHelp(args, kUsage, table)) return absl::OkStatus();
  LK_RETURN_IF_ERROR(ParseClientFlags(args, table, 0, 0).status());
  std::string prompt;
  if (!flags.prompt_file.empty()) {
    LK_ASSIGN_OR_RETURN(prompt, ReadTextFile(flags.prompt_file));
    if (prompt.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("--prompt ", flags.prompt_file, ": empty"));
    }
  }
  LK_ASSIGN_OR_RETURN(const BenchResult result, Bench(flags, std::move(prompt)).Run());
  std::printf("%s", BenchTable(result).c_str());
  if (!flags.json_file.empty()) LK_RETURN_IF_ERROR(WriteFile(flags.json_file, BenchJson(result)));
  if (result.failed == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(result.failed, " of ", result.ok + result.failed,
                                             " requests failed, the first: ", result.first_error));
}

}  // namespace lorikeet
