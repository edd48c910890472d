// The option table, flags and YAML of `serve`, and the statistics of `bench`.
#include "server/config.h"

#include <gmock/gmock.h>

#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "server/cli/bench_stats.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

std::string ErrorOf(const std::vector<std::string>& args) {
  const auto config = ParseServerConfig(args);
  return config.ok() ? "no error" : std::string(config.status().message());
}

std::string YamlError(const std::string& yaml) {
  ServerConfig config;
  const absl::Status status = ApplyYaml(yaml, ServerOptions(&config));
  return status.ok() ? "no error" : std::string(status.message());
}

TEST(ServerConfigTest, AModelIsAllItNeeds) {
  const auto config = ParseServerConfig(std::vector<std::string>{"--model", "m.gguf"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model, "m.gguf");
  EXPECT_EQ(config->host, "127.0.0.1");
  EXPECT_THAT(ErrorOf({}), HasSubstr("--model"));
}

TEST(ServerConfigTest, FlagsOverrideTheFile) {
  const std::string path = ::testing::TempDir() + "/lorikeet_config_test.yaml";
  FILE* file = fopen(path.c_str(), "w");
  fputs("model: from_file\ngrpc_port: 1\nthreads: 3\nadapter: {a: /file/a, b: /file/b}\n", file);
  fclose(file);
  const auto config = ParseServerConfig(std::vector<std::string>{
      "--grpc-port=2", "--adapter", "b=/flag/b", "--config", path, "--adapter-root", "/r"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model, "from_file");
  EXPECT_EQ(config->grpc_port, 2);
  EXPECT_EQ(config->threads, 3);
  EXPECT_THAT(config->adapters, ElementsAre(Pair("a", "/file/a"), Pair("b", "/flag/b")));
  EXPECT_THAT(config->adapter_roots, ElementsAre("/r"));
}

TEST(ServerConfigTest, LayersAreStackedByRanges) {
  const auto config = ParseServerConfig(
      std::vector<std::string>{"--model", "m.gguf", "--layer-replication", "[[0, 4], [2, 6]]"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(ToString(config->layer_replication), "[[0,4],[2,6]]");
  for (const char* bad : {"x", "[0,4]", "[[4,4]]", "[[-1,4]]", "[[0,4,6]]", "[[0,4.5]]", "[[0,4000],[0,97]]"}) {
    EXPECT_EQ(ErrorOf({"--layer-replication", bad}),
              absl::StrCat("--layer-replication: '", bad,
                           "' is not a list of ranges of layers like [[0,4],[2,6]], of at most 4096 layers in all"));
  }
}

TEST(ServerConfigTest, FlagErrorsNameTheFlagTheValueAndTheBound) {
  EXPECT_THAT(ErrorOf({"--grpc-prot", "5"}), HasSubstr("did you mean '--grpc-port'"));
  EXPECT_THAT(ErrorOf({"--confg", "f"}), HasSubstr("did you mean '--config'"));
  EXPECT_EQ(ErrorOf({"--grpc-port", "65536"}), "--grpc-port: 65536 is not in [0, 65535]");
  EXPECT_EQ(ErrorOf({"--threads", "99999999999999999999"}),
            "--threads: 99999999999999999999 is not in [0, 1024]");
  EXPECT_EQ(ErrorOf({"--threads", "2x"}), "--threads: '2x' is not a whole number");
  EXPECT_EQ(ErrorOf({"--device", "gpu"}), "--device: 'gpu' is none of auto|cpu|cuda");
  EXPECT_EQ(ErrorOf({"--adapter", "justaname"}), "--adapter: 'justaname' is not NAME=PATH");
  EXPECT_EQ(ErrorOf({"--model"}), "--model needs a value PATH");
  EXPECT_EQ(ErrorOf({"--model", "m", "extra"}), "unexpected argument 'extra'");
  EXPECT_THAT(ErrorOf({"--config", "/no/such/file"}), HasSubstr("/no/such/file"));
}

TEST(ServerConfigTest, FileErrorsNameTheLineAndTheKey) {
  EXPECT_EQ(YamlError("model: m\ngrcp_port: 5\n"),
            "line 2: unknown key 'grcp_port'; did you mean 'grpc_port'?");
  EXPECT_EQ(YamlError("http_port: -1"), "line 1: http_port: -1 is not in [0, 65535]");
  EXPECT_EQ(YamlError("model: a\nmodel: b"), "line 2: model is given twice");
  EXPECT_EQ(YamlError("model: [a]"), "line 1: model: expected one value");
  EXPECT_EQ(YamlError("adapter: [a]"), "line 1: adapter: expected a map of names to paths");
  EXPECT_EQ(YamlError("adapter_root: /r"), "line 1: adapter_root: expected a sequence");
  EXPECT_THAT(YamlError("model: m\n  bad: : indent"), HasSubstr("line 2"));
  EXPECT_THAT(YamlError("model: 'open"), HasSubstr("line"));
  EXPECT_THAT(YamlError("just words"), HasSubstr("expected a map"));
  EXPECT_EQ(YamlError(""), "no error");
}

TEST(ServerConfigTest, HelpHasEveryOptionWithItsDefault) {
  ServerConfig defaults;
  const OptionTable table = ServerOptions(&defaults);
  const std::string help = ServerHelp();
  for (const OptionTable::Row& row : table.rows()) {
    EXPECT_THAT(help, HasSubstr("--" + row.name + " "));
  }
  EXPECT_THAT(help, HasSubstr("default 50051"));
  EXPECT_THAT(help, HasSubstr("0 to 1024 threads"));
}

TEST(BenchStatsTest, PercentilesInterpolateBetweenRanks) {
  std::vector<double> samples;
  for (int i = 100; i >= 0; --i) samples.push_back(i);
  const Distribution d = Summarise(samples);
  EXPECT_DOUBLE_EQ(d.mean, 50);
  EXPECT_DOUBLE_EQ(d.p50, 50);
  EXPECT_DOUBLE_EQ(d.p90, 90);
  EXPECT_DOUBLE_EQ(d.p99, 99);
  EXPECT_DOUBLE_EQ(Summarise({1, 2}).p90, 1.9);
  EXPECT_DOUBLE_EQ(Summarise({}).p99, 0);
}

TEST(ServerConfigTest, TheReferenceHasEverySetting) {
  std::ifstream file("docs/configuration.md");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  ServerConfig config;
  const OptionTable table = ServerOptions(&config);
  for (const OptionTable::Row& row : table.rows()) {
    const std::string line = absl::StrCat("| `", row.Key(), "` | ", row.help, " |\n");
    EXPECT_THAT(text, ::testing::HasSubstr(line)) << "run docs/generate.py";
  }
}

}  // namespace
}  // namespace lorikeet
