// The built program as a user runs it: `serve` in a process of its own on a real model, and every
// client subcommand against it.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/e2e/certificates.h"
#include "tests/e2e/http_get.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

constexpr char kModel[] = "tests/golden/models/llama";
const std::string kAdapters = "tests/golden/adapters/llama/";

struct Outcome {
  int code = -1;  // exit status; 128 + signal if one ended it
  std::string out, err;
};

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Starts the program with its outputs in files.
pid_t Spawn(std::vector<std::string> args, const std::string& out, const std::string& err) {
  args.insert(args.begin(), LORIKEET_BINARY);
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    const auto redirect = [](const std::string& path, int to) {
      dup2(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), to);
    };
    redirect(out, STDOUT_FILENO);
    redirect(err, STDERR_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  return pid;
}

int Wait(pid_t pid) {
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

class BinaryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / absl::StrCat("lorikeet_binary_", getpid());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override {
    if (server_ > 0) {
      kill(server_, SIGKILL);
      Wait(server_);
    }
    std::filesystem::remove_all(folder_);
  }

  std::string Path(const std::string& name) const { return (folder_ / name).string(); }

  Outcome Run(const std::vector<std::string>& args) {
    Outcome outcome;
    outcome.code = Wait(Spawn(args, Path("out"), Path("err")));
    outcome.out = ReadFile(Path("out"));
    outcome.err = ReadFile(Path("err"));
    return outcome;
  }
  // A client subcommand against the started server.
  Outcome Client(std::vector<std::string> args) {
    args.insert(args.end(), {"--server", grpc_});
    return Run(args);
  }
  std::string GrpcPort() const { return grpc_.substr(grpc_.find(':') + 1); }
  Outcome Health() { return Run({"health", "--grpc-port", GrpcPort(), "--timeout-s", "1"}); }
  void ExpectOneLineError(const Outcome& outcome, const std::string& part) {
    EXPECT_NE(outcome.code, 0) << outcome.out;
    EXPECT_LT(outcome.code, 128) << "ended by a signal";
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(part));
  }

  void Serve(std::vector<std::string> more = {}) {
    std::vector<std::string> args = {"serve",       "--model", kModel,           "--grpc-port", "0",
                                     "--http-port", "0",       "--adapter-root", kAdapters};
    for (const char* name : {"lora", "rslora", "dora", "lora_qv", "lora_bias"}) {
      args.insert(args.end(), {"--adapter", absl::StrCat(name, "=", kAdapters, name)});
    }
    args.insert(args.end(), more.begin(), more.end());
    std::filesystem::remove(Path("serve_out"));  // of a server before
    server_ = Spawn(args, Path("serve_out"), Path("serve_err"));
    std::string out;
    while ((out = ReadFile(Path("serve_out"))).find(" adapters\n") == std::string::npos) {
      ASSERT_EQ(waitpid(server_, nullptr, WNOHANG), 0) << ReadFile(Path("serve_err"));
      usleep(5000);
    }
    grpc_ = Word(out, "gRPC ");
    http_ = Word(out, "HTTP ");
  }
  // What follows `label` up to the next comma.
  static std::string Word(const std::string& text, const std::string& label) {
    const size_t begin = text.find(label) + label.size();
    return text.substr(begin, text.find(',', begin) - begin);
  }

  double Metric(const std::string& series) const {
    const int port = std::stoi(http_.substr(http_.find(':') + 1));
    return MetricValue(HttpExchange(port, "GET", "/metrics"), series);
  }

  json Generate(std::vector<std::string> args) {
    args.insert(args.begin(), {"generate", "--json", "--temperature", "0"});
    const Outcome outcome = Client(args);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(std::count(outcome.out.begin(), outcome.out.end(), '\n'), 1) << outcome.out;
    return json::parse(outcome.out, nullptr, /*allow_exceptions=*/false);
  }

  std::filesystem::path folder_;
  pid_t server_ = -1;
  std::string grpc_, http_;
};

TEST_F(BinaryTest, GenerateJsonKeepsItsContract) {
  Serve();
  const json plain = Generate({"--prompt-ids", "5,6,7", "--max-tokens", "6", "--ignore-eos"});
  EXPECT_THAT(plain["token_ids"], SizeIs(6));
  EXPECT_TRUE(plain["text"].is_string());
  EXPECT_EQ(plain["finish_reason"], "length");
  EXPECT_EQ(plain["usage"], json({{"prompt_tokens", 3}, {"completion_tokens", 6}}));
  EXPECT_EQ(plain["adapter_version"], "");

  const json full = Generate({"--prompt-ids", "5,6,7", "--max-tokens", "6", "--ignore-eos",
                              "--adapter", "dora", "--logprobs", "3"});
  EXPECT_THAT(full["adapter_version"].get<std::string>(), SizeIs(64));
  ASSERT_THAT(full["logprobs"], SizeIs(6));
  ASSERT_THAT(full["top_logprobs"], SizeIs(6));
  for (int i = 0; i < 6; ++i) {  // greedy: the chosen token is the most likely one
    ASSERT_THAT(full["top_logprobs"][i], SizeIs(3));
    EXPECT_EQ(full["top_logprobs"][i][0][0], full["token_ids"][i]);
    EXPECT_EQ(full["top_logprobs"][i][0][1], full["logprobs"][i]);
    EXPECT_GE(full["top_logprobs"][i][0][1], full["top_logprobs"][i][1][1]);
  }
}

TEST_F(BinaryTest, HealthTellsReadyFromGone) {
  Serve();
  EXPECT_EQ(Health().out, "ready\n");
  kill(server_, SIGKILL);
  Wait(std::exchange(server_, -1));
  ExpectOneLineError(Health(), absl::StrCat("lorikeet-", GrpcPort()));
}

TEST_F(BinaryTest, StopStringsEndingTokensAndStreamsAgree) {
  Serve();
  const std::vector<std::string> request = {"--prompt", "abc", "--max-tokens", "12",
                                            "--ignore-eos"};
  const json whole = Generate(request);
  std::vector<std::string> streamed = {"generate", "--temperature", "0"};
  streamed.insert(streamed.end(), request.begin(), request.end());
  EXPECT_EQ(Client(streamed).out, whole["text"].get<std::string>() + "\n");
  const int third = whole["token_ids"][2];
  std::vector<std::string> stopped = request;
  stopped.insert(stopped.end(), {"--stop-id", absl::StrCat(third)});
  const json short_answer = Generate(stopped);
  EXPECT_EQ(short_answer["finish_reason"], "stop");
  EXPECT_EQ(short_answer["token_ids"].back(), third);
  EXPECT_LE(short_answer["token_ids"].size(), 3);
}

TEST_F(BinaryTest, AMixedBatchAnswersAsOneAtATimeAndShowsItsAdapters) {
  Serve();
  const std::vector<std::string> names = {"", "lora", "rslora", "dora", "lora_qv", "lora_bias"};
  const auto request = [](const std::string& name) {
    std::vector<std::string> args = {"--prompt", "hello", "--max-tokens", "200", "--ignore-eos"};
    if (!name.empty()) args.insert(args.end(), {"--adapter", name});
    return args;
  };
  std::vector<json> alone;
  for (const std::string& name : names) alone.push_back(Generate(request(name)));
  for (size_t i = 1; i < names.size(); ++i) {
    EXPECT_NE(alone[i]["token_ids"], alone[0]["token_ids"]) << names[i] << " answers as the base";
  }
  const pid_t load =
      Spawn({"bench", "--server", grpc_, "--adapters", "base,lora,rslora,dora,lora_qv,lora_bias",
             "--concurrency", "12", "--requests", "240", "--max-tokens", "100", "--ignore-eos",
             "--json", Path("bench.json")},
            Path("bench_out"), Path("bench_err"));
  for (size_t i = 0; i < names.size(); ++i) {
    EXPECT_EQ(Generate(request(names[i]))["token_ids"], alone[i]["token_ids"])
        << "adapter '" << names[i] << "' under load";
  }
  EXPECT_EQ(Wait(load), 0) << ReadFile(Path("bench_err"));
  const json bench = json::parse(ReadFile(Path("bench.json")));
  EXPECT_EQ(bench["requests_ok"], 240);
  EXPECT_EQ(bench["completion_tokens"], 240 * 100);
  EXPECT_EQ(bench["prompt_tokens"], 240 * 37);
  for (const char* key : {"mean", "p50", "p90", "p99"}) {
    EXPECT_GT(bench["ttft_ms"][key], 0) << key;
    EXPECT_GT(bench["itl_ms"][key], 0) << key;
  }
  EXPECT_GT(Metric("lorikeet_step_distinct_adapters_bucket{le=\"+Inf\"}") -
                Metric("lorikeet_step_distinct_adapters_bucket{le=\"3\"}"),
            0)
      << "no step had 4 distinct adapters";
}

TEST_F(BinaryTest, BenchSendsAtARateAndSaysWhatFailed) {
  Serve();
  const Outcome open = Client({"bench", "--rate", "500", "--requests", "50", "--warmup", "3",
                               "--max-tokens", "4", "--ignore-eos", "--json", Path("bench.json")});
  EXPECT_EQ(open.code, 0) << open.err;
  EXPECT_EQ(open.err, "") << "a progress bar belongs on a terminal";
  for (const char* row : {"50 ok, 0 failed", "TTFT ms", "ITL ms", "p50", "p90", "p99"}) {
    EXPECT_THAT(open.out, HasSubstr(row));
  }
  const json bench = json::parse(ReadFile(Path("bench.json")));
  EXPECT_EQ(Client({"bench", "--adapters", "lora,nobody", "--zipf", "9", "--requests", "8",
                    "--max-tokens", "1"})
                .code,
            0)
      << "the second is drawn once in 500 times";
  EXPECT_EQ(bench["rate_per_s"], 500);
  EXPECT_EQ(bench["completion_tokens"], 50 * 4);
  EXPECT_GT(bench["wall_s"], 0.02) << "50 arrivals at 500/s were sent at once";
  ExpectOneLineError(
      Client({"bench", "--adapters", "lora,nobody", "--requests", "4", "--max-tokens", "1"}),
      "2 of 4 requests failed, the first: ");
}

TEST_F(BinaryTest, AdaptersAreListedLoadedAndUnloaded) {
  Serve();
  EXPECT_THAT(Client({"adapters", "list"}).out, HasSubstr("rslora"));
  EXPECT_THAT(Client({"adapters", "load", "again", "dora"}).out, HasSubstr("loaded again: dora"));
  const json with = Generate({"--prompt", "x", "--max-tokens", "1", "--adapter", "again"});
  EXPECT_THAT(Client({"adapters", "list"}).out, HasSubstr("again"));
  EXPECT_THAT(Client({"adapters", "unload", "again"}).out,
              HasSubstr(with["adapter_version"].get<std::string>()));
  ExpectOneLineError(Client({"generate", "--prompt", "x", "--adapter", "again"}), "NOT_FOUND");
  ExpectOneLineError(Client({"adapters", "unload", "again"}), "again");
  ExpectOneLineError(Client({"adapters", "load", "out", "/etc"}), "PERMISSION_DENIED");
}

TEST_F(BinaryTest, EveryVerbOfAdaptersDoesWhatItSays) {
  Serve({"--adapter-dir", Path("kept")});
  const auto out = [&](std::vector<std::string> args) {
    args.insert(args.begin(), "adapters");
    const Outcome outcome = Client(args);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return outcome.out;
  };
  const pid_t watch =
      Spawn({"adapters", "watch", "--server", grpc_}, Path("watch_out"), Path("watch_err"));
  // A change is printed once the watcher is there.
  for (int i = 0; ReadFile(Path("watch_out")).empty(); ++i) {
    out({"alias", absl::StrCat("probe", i), "lora"});
    usleep(20'000);
  }
  EXPECT_THAT(out({"get", "dora"}), HasSubstr("adapter dora: dora, rank"));
  EXPECT_THAT(out({"upload", "sent", kAdapters + "lora_bias"}), HasSubstr("loaded sent"));
  EXPECT_THAT(out({"load", "sent", "dora", "--replace", "--pin"}), HasSubstr("loaded sent: dora"));
  EXPECT_THAT(out({"list", "sent"}), HasSubstr("pinned"));
  EXPECT_THAT(out({"reload", "sent"}), HasSubstr("loaded sent: dora"));
  EXPECT_THAT(out({"unpin", "sent"}), HasSubstr("unpinned sent"));
  EXPECT_THAT(out({"pin", "sent"}), HasSubstr("pinned sent"));
  EXPECT_THAT(out({"prefetch", "sent"}), HasSubstr("fetched sent"));
  const std::string alias = out({"alias", "prod", "lora=9", "dora"});
  EXPECT_THAT(alias, HasSubstr("weight 9"));
  EXPECT_THAT(alias, HasSubstr("weight 1\n"));
  const json answer = Generate({"--prompt", "x", "--max-tokens", "1", "--adapter", "prod"});
  EXPECT_THAT(alias, HasSubstr(answer["adapter_version"].get<std::string>()));
  EXPECT_THAT(out({"plan", "8", "q_proj", "--tokens", "1000", "--adapters", "10"}),
              HasSubstr("tokens that fit beside 10 adapters: "));
  EXPECT_THAT(out({"unload", "sent", "--now"}), HasSubstr("unloaded sent: "));
  ExpectOneLineError(Client({"adapters", "get", "sent"}), "NOT_FOUND");
  ExpectOneLineError(Client({"adapters", "alias", "prod", "lora=many"}), "the weight");
  ExpectOneLineError(Client({"adapters", "plan", "8", "w_proj"}), "w_proj");
  ExpectOneLineError(Run({"adapters", "lsit"}), "'lsit'");
  while (ReadFile(Path("watch_out")).find("UNLOADED") == std::string::npos) usleep(5000);
  kill(watch, SIGTERM);
  Wait(watch);
}

TEST_F(BinaryTest, AnAdapterDirectoryHasOneServer) {
  Serve({"--adapter-dir", Path("kept")});
  const std::vector<std::string> second = {"serve",       "--model", kModel,          "--grpc-port", "0",
                                           "--http-port", "0",       "--adapter-dir", Path("kept")};
  ExpectOneLineError(Run(second), Path("kept") + " is another server's");
  kill(server_, SIGKILL);
  Wait(server_);
  Serve({"--adapter-dir", Path("kept")});
}

TEST_F(BinaryTest, KeysAreMadeAndUsed) {
  const std::string file = Path("keys.yaml");
  const auto add = [&](const std::string& id, std::vector<std::string> more) {
    more.insert(more.begin(), {"keys", "add", file, id});
    return Run(more);
  };
  const Outcome reader = add("reader", {"--role", "adapters:read"});
  EXPECT_EQ(reader.code, 0) << reader.err;
  EXPECT_THAT(reader.out, StartsWith("lk.reader."));
  const std::string first = ReadFile(file);
  EXPECT_THAT(first, Not(HasSubstr(reader.out.substr(0, reader.out.size() - 1))));
  EXPECT_EQ(std::filesystem::status(file).permissions(), std::filesystem::perms(0600));
  ExpectOneLineError(add("reader", {}), "id 'reader' is in two entries");
  ExpectOneLineError(add("x", {"--role", "root"}), "role 'root' is none of");
  EXPECT_EQ(ReadFile(file), first);
  const Outcome bot = add("bot", {"--adapter", "lora*"});
  Serve({"--keys", file});
  ExpectOneLineError(Client({"adapters", "list"}), "UNAUTHENTICATED");
  const auto use = [](const Outcome& made) {
    setenv("LORIKEET_API_KEY", made.out.substr(0, made.out.size() - 1).c_str(), 1);
  };
  use(reader);
  EXPECT_EQ(Client({"adapters", "list"}).code, 0);
  ExpectOneLineError(Client({"generate", "--prompt", "hi"}), "PERMISSION_DENIED");
  use(bot);
  EXPECT_EQ(Client({"generate", "--prompt", "hi", "--adapter", "lora_qv"}).code, 0);
  ExpectOneLineError(Client({"generate", "--prompt", "hi", "--adapter", "dora"}), "NOT_FOUND");
  unsetenv("LORIKEET_API_KEY");
}

TEST_F(BinaryTest, ClientsSpeakTls) {
  const Certificate root = MakeCertificate("root", nullptr);
  const Certificate server = MakeCertificate("server", &root, "IP:127.0.0.1");
  const Certificate own = MakeCertificate("client", &root);
  const auto write = [&](const std::string& name, const std::string& text) {
    std::ofstream(Path(name)) << text;
    return Path(name);
  };
  const std::string ca = write("root.pem", root.Pem());
  Serve({"--tls-cert", write("server.pem", server.Pem()), "--tls-key",
         write("server.key", server.KeyPem()), "--tls-client-ca", ca});
  const std::vector<std::string> list = {"adapters", "list", "--tls-ca", ca};
  ExpectOneLineError(Client(list), "UNAVAILABLE");
  std::vector<std::string> with_own = list;
  with_own.insert(with_own.end(), {"--tls-cert", write("client.pem", own.Pem()), "--tls-key",
                                   write("client.key", own.KeyPem())});
  const Outcome outcome = Client(with_own);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  ExpectOneLineError(Client({"adapters", "list", "--tls-ca", "/nowhere"}), "/nowhere");
  EXPECT_EQ(Health().out, "ready\n");  // with no certificate
}

TEST_F(BinaryTest, InspectNeedsNoServer) {
  const Outcome good = Run({"adapters", "inspect", kAdapters + "dora"});
  EXPECT_EQ(good.code, 0) << good.err;
  EXPECT_THAT(good.out, HasSubstr("dora"));
  const Outcome on_model = Run({"adapters", "inspect", kAdapters + "dora", "--model", kModel});
  EXPECT_EQ(on_model.code, 0) << on_model.err;
  EXPECT_THAT(on_model.out, HasSubstr("low rank, output scale"));
  EXPECT_THAT(on_model.out, HasSubstr("on a GPU"));
  ExpectOneLineError(Run({"adapters", "inspect", kAdapters + "dora", "--model", "tests/golden/models/qwen2"}),
                     "would be refused");
  ExpectOneLineError(Run({"adapters", "inspect", kModel}), "adapter_config.json");
}

TEST_F(BinaryTest, ConvertWritesAPlainLora) {
  const std::string out = Path("converted");
  const Outcome good = Run({"adapters", "convert", kAdapters + "rslora=0.5", kAdapters + "lora_qv", out,
                            "--model", kModel});
  EXPECT_EQ(good.code, 0) << good.err;
  const json config = json::parse(ReadFile(out + "/adapter_config.json"));
  EXPECT_EQ(config["peft_type"], "LORA");
  EXPECT_EQ(config["r"], config["lora_alpha"]);
  ExpectOneLineError(Run({"adapters", "convert", kAdapters + "dora", Path("other"), "--model", kModel}),
                     "output scale");
  ExpectOneLineError(Run({"adapters", "convert", kAdapters + "lora=x", Path("other"), "--model", kModel}),
                     "the weight in");
  ExpectOneLineError(Run({"adapters", "convert", kAdapters + "lora", Path("other")}), "--model");
}

TEST_F(BinaryTest, WithoutAGpuTheServerSaysWhy) {
  if (access("/dev/nvidia0", F_OK) == 0) GTEST_SKIP() << "there is a GPU";
  Serve({"--device", "auto"});
  EXPECT_THAT(ReadFile(Path("serve_out")), HasSubstr("\nno GPU: "));
}

// Clients that load, upload and unload until the server is gone; what they were told stays true.
class Changes {
 public:
  // Names begin with `prefix`; outputs go to files of that path.
  Changes(std::string prefix, std::string outputs, std::string server)
      : prefix_(std::move(prefix)), outputs_(std::move(outputs)), server_(std::move(server)) {
    for (int t = 0; t < 3; ++t) threads_.emplace_back([this, t] { Run(t); });
  }
  // Until so many loads were answered.
  void WaitFor(size_t loads) {
    for (bool there = false; !there; usleep(1000)) {
      const std::lock_guard lock(mutex_);
      there = loaded.size() >= loads || !unknown.empty();
    }
  }
  void Join() {
    for (std::thread& thread : threads_) thread.join();
  }
  std::set<std::string> loaded, unknown;  // unknown: the answer did not come

 private:
  bool Call(int t, std::vector<std::string> args) {
    args.insert(args.begin(), "adapters");
    args.insert(args.end(), {"--server", server_});
    const std::string output = absl::StrCat(outputs_, t);
    return Wait(Spawn(args, output, output)) == 0;
  }
  void Run(int t) {
    for (int i = 0;; ++i) {
      const std::string name = absl::StrCat(prefix_, ".", t, ".", i);
      const bool upload = i % 2 == 0;
      const bool done = Call(t, upload ? std::vector<std::string>{"upload", name, kAdapters + "lora"}
                                       : std::vector<std::string>{"load", name, "dora"});
      const bool gone = done && i % 3 == 0 && Call(t, {"unload", name});
      const std::lock_guard lock(mutex_);
      if (done && !gone && i % 3 != 0) loaded.insert(name);
      if (!done || (i % 3 == 0 && !gone)) unknown.insert(name);
      if (!unknown.empty()) return;
    }
  }

  const std::string prefix_, outputs_, server_;
  std::mutex mutex_;
  std::vector<std::thread> threads_;
};

TEST_F(BinaryTest, KilledInTheMiddleOfChangesItKnowsWhatItSaid) {
  std::set<std::string> loaded, unknown;
  for (const int loads : {1, 2, 4}) {
    Serve({"--adapter-dir", Path("kept")});
    const std::string prefix = absl::StrCat("n", loads);
    Changes changes(prefix, Path("change"), grpc_);
    changes.WaitFor(loads);
    usleep(5000 * loads);
    kill(server_, SIGKILL);
    Wait(server_);
    server_ = -1;
    changes.Join();
    loaded.merge(changes.loaded);
    unknown.merge(changes.unknown);

    Serve({"--adapter-dir", Path("kept")});
    const std::string list = Client({"adapters", "list", "n"}).out;
    std::set<std::string> there;
    std::istringstream lines(list);
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with("n")) there.insert(line.substr(0, line.find(' ')));
    }
    for (const std::string& name : loaded) EXPECT_TRUE(there.contains(name)) << name << "\n" << list;
    for (const std::string& name : there) {
      EXPECT_TRUE(loaded.contains(name) || unknown.contains(name)) << name;
      if (!name.starts_with(prefix)) continue;
      EXPECT_EQ(Client({"generate", "--prompt", "x", "--max-tokens", "1", "--adapter", name}).code, 0);
    }
    kill(server_, SIGTERM);
    EXPECT_EQ(Wait(server_), 0);
    server_ = -1;
  }
  EXPECT_GE(loaded.size(), 7u);
}

TEST_F(BinaryTest, ItHasAsManyFilesAsItMayHave) {
  rlimit given{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &given), 0);
  const rlimit few{.rlim_cur = 64, .rlim_max = given.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  Serve();
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &given), 0);
  EXPECT_EQ(Metric("process_max_fds"), static_cast<double>(given.rlim_max));
}

TEST_F(BinaryTest, SigtermEndsItCleanly) {
  Serve();
  kill(server_, SIGTERM);
  EXPECT_EQ(Wait(server_), 0);
  server_ = -1;
  EXPECT_EQ(ReadFile(Path("serve_err")), "");
  ExpectOneLineError(Client({"generate", "--prompt", "x"}), grpc_);
}

TEST_F(BinaryTest, FailuresAreOneLineOnStandardError) {
  ExpectOneLineError(Run({"sevre"}), "serve");
  ExpectOneLineError(Run({"serve"}), "--model");
  ExpectOneLineError(
      Run({"serve", "--model", "/no/such/model", "--grpc-port", "0", "--http-port", "0"}),
      "/no/such/model");
  ExpectOneLineError(Run({"serve", "--model", kModel, "--grpc-port", "0", "--http-port", "0",
                          "--adapter", "x=/no/such/adapter"}),
                     "/no/such/adapter");
  if (access("/dev/nvidia0", F_OK) != 0) {
    ExpectOneLineError(Run({"serve", "--model", kModel, "--grpc-port", "0", "--http-port", "0",
                            "--device", "cuda"}),
                       "CUDA");
  }
  std::ofstream(Path("bad.yaml")) << "model: [";
  ExpectOneLineError(Run({"serve", "--config", Path("bad.yaml")}), "bad.yaml: line");
  std::ofstream(Path("cut.gguf"), std::ios::binary) << "GGUF\x03";
  ExpectOneLineError(
      Run({"serve", "--model", Path("cut.gguf"), "--grpc-port", "0", "--http-port", "0"}),
      "cut.gguf");
  ExpectOneLineError(Run({"generate"}), "--prompt");
  ExpectOneLineError(Run({"adapters", "lod", "x", "y"}), "did you mean 'load'?");
  ExpectOneLineError(Run({"adapters", "list", "--server", "localhost"}),
                     "--server: 'localhost' is not HOST:PORT");
  ExpectOneLineError(Run({"generate", "--chat", Path("bad.yaml")}), "not JSON");
  Serve();
  ExpectOneLineError(Client({"generate", "--prompt", "ok\xff"}),
                     "text is not valid UTF-8 at byte 2");
  EXPECT_EQ(ReadFile(Path("serve_err")), "") << "the server goes on, so nothing failed";
  for (const char* value : {"nan", "-inf", "1e999", "-1"}) {
    ExpectOneLineError(Client({"generate", "--prompt", "x", "--temperature", value}),
                       "temperature is ");
  }
  ExpectOneLineError(Client({"generate", "--prompt", "x", "--top-p", "lots"}),
                     "--top-p: 'lots' is not a number");
  const std::string port = grpc_.substr(grpc_.find(':') + 1);
  ExpectOneLineError(Run({"serve", "--model", kModel, "--grpc-port", port, "--http-port", "0"}),
                     absl::StrCat("gRPC port 127.0.0.1:", port, " is already in use"));
}

}  // namespace
}  // namespace lorikeet
