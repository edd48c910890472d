// /metrics as those read it who act on it: the Gateway API Inference Extension's endpoint picker
// (proposal 003, names of its vLLM engine) and routers that place requests by residency.
#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "server/auth/keys_file.h"
#include "tests/e2e/service_fixture.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::Gt;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::SizeIs;

struct Series {
  std::map<std::string, std::string> labels;
  double value = 0;
};
using Scrape = std::map<std::string, std::vector<Series>>;  // by metric name

// Label values here have no quotes, backslashes or braces.
std::map<std::string, std::string> ParseLabels(const std::string& text) {
  std::map<std::string, std::string> labels;
  std::string_view rest = text;
  while (!rest.empty()) {
    const size_t equals = rest.find("=\"");
    const size_t end = rest.find('"', equals + 2);
    labels[std::string(rest.substr(0, equals))] =
        std::string(rest.substr(equals + 2, end - equals - 2));
    rest.remove_prefix(std::min(rest.size(), end + 2));
  }
  return labels;
}

Scrape Parse(const std::string& text) {
  Scrape scrape;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    const size_t space = line.rfind(' ');
    std::string name = line.substr(0, space);
    Series series{.labels = {}, .value = std::stod(line.substr(space + 1))};
    if (const size_t brace = name.find('{'); brace != std::string::npos) {
      series.labels = ParseLabels(name.substr(brace + 1, name.size() - brace - 2));
      name.resize(brace);
    }
    scrape[name].push_back(std::move(series));
  }
  return scrape;
}

// What the picker keeps of one scrape.
struct Picked {
  double waiting = -1;
  double running = -1;
  double kv_usage = -1;
  int block_size = -1;
  int blocks = -1;
  int max_lora = -1;
  std::vector<std::string> running_adapters;
  std::vector<std::string> waiting_adapters;
};

std::vector<std::string> Names(const std::string& joined) {
  return absl::StrSplit(joined, ',', absl::SkipEmpty());
}

class MetricsTest : public ServiceTest {
 protected:
  void SetUp() override {
    ServiceTest::SetUp();
    config_.adapter_roots = {kGoldenAdapters};
  }

  Scrape Get() { return Parse(HttpGet("/metrics")); }

  Picked Pick() {
    const Scrape scrape = Get();
    Picked picked;
    picked.waiting = scrape.at("vllm:num_requests_waiting").at(0).value;
    picked.running = scrape.at("vllm:num_requests_running").at(0).value;
    picked.kv_usage = scrape.at("vllm:kv_cache_usage_perc").at(0).value;
    const Series& cache = scrape.at("vllm:cache_config_info").at(0);
    picked.block_size = std::stoi(cache.labels.at("block_size"));
    picked.blocks = std::stoi(cache.labels.at("num_gpu_blocks"));
    // Of several series the one with the largest value is the newest.
    const std::vector<Series>& infos = scrape.at("vllm:lora_requests_info");
    const Series& info = *std::ranges::max_element(infos, {}, &Series::value);
    picked.max_lora = std::stoi(info.labels.at("max_lora"));
    picked.running_adapters = Names(info.labels.at("running_lora_adapters"));
    picked.waiting_adapters = Names(info.labels.at("waiting_lora_adapters"));
    return picked;
  }

  v1::GenerateRequest For(const std::string& adapter, int32_t max_tokens) {
    v1::GenerateRequest request = TextRequest("hello", max_tokens);
    request.set_adapter(adapter);
    return request;
  }

  void Ask(const std::string& adapter, int times = 1) {
    v1::GenerateResponse response;
    for (int i = 0; i < times; ++i) {
      const grpc::Status status = Unary(For(adapter, 3), &response);
      ASSERT_TRUE(status.ok()) << status.error_message();
    }
  }

  // Of a family with one label `adapter`.
  std::map<std::string, double> ByAdapter(const std::string& name) {
    std::map<std::string, double> values;
    for (const Series& series : Get()[name]) values[series.labels.at("adapter")] = series.value;
    return values;
  }
};

TEST_F(MetricsTest, ThePickerSeesQueueAndCache) {
  config_.limits.max_running_requests = 1;
  Start();
  Picked idle = Pick();
  EXPECT_EQ(idle.waiting, 0);
  EXPECT_EQ(idle.running, 0);
  EXPECT_EQ(idle.kv_usage, 0);
  EXPECT_EQ(idle.block_size, KvLayout::kPageTokens);
  EXPECT_THAT(idle.blocks, AllOf(Gt(0), Le(kPages)));

  Hold();
  grpc::ClientContext contexts[3];
  std::vector<std::unique_ptr<grpc::ClientReaderInterface<v1::GenerateResponse>>> streams;
  for (grpc::ClientContext& context : contexts) {
    streams.push_back(generation().Generate(&context, TextRequest("hello", 20)));
  }
  Allow(1);
  WaitFor([&] { return Pick().running == 1 && Pick().waiting == 2 && Pick().kv_usage > 0; });
  EXPECT_LE(Pick().kv_usage, 1);
}

TEST_F(MetricsTest, ThePickerSeesWhichAdaptersAreLoadedAndWaitedFor) {
  Start();
  EXPECT_THAT(Pick().running_adapters, IsEmpty());
  ASSERT_TRUE(Load("one", "lora").ok());
  ASSERT_TRUE(Load("two", "rslora").ok());
  Picked picked = Pick();
  EXPECT_THAT(picked.running_adapters, ElementsAre("one", "two"));
  EXPECT_GT(picked.max_lora, 2) << "a third one would find room";

  grpc::ClientContext context;
  v1::UnloadAdapterRequest unload;
  unload.set_name("one");
  v1::UnloadAdapterResponse response;
  ASSERT_TRUE(adapters().UnloadAdapter(&context, unload, &response).ok());
  const Scrape scrape = Get();
  EXPECT_THAT(scrape.at("vllm:lora_requests_info"), SizeIs(1)) << "no series of the past";
  EXPECT_THAT(Pick().running_adapters, ElementsAre("two"));
  const std::vector<Series>& loaded = scrape.at("vllm:lora_adapter_loaded");
  ASSERT_THAT(loaded, SizeIs(1));
  EXPECT_EQ(loaded[0].labels.at("adapter_name"), "two");
  EXPECT_EQ(loaded[0].labels.at("level"), "cpu") << "there is no device";
  EXPECT_EQ(loaded[0].labels.at("pinned"), "false");
  EXPECT_GT(std::stoi(loaded[0].labels.at("rank")), 0);
  EXPECT_EQ(loaded[0].value, 1);
}

// A picker sends no key.
TEST_F(MetricsTest, ThePickerSeesThemWhereThereAreKeysAndTheMetricsAreOpen) {
  const testing::TempDir dir;
  const std::string key = MakeKey("user");
  config_.keys = dir.Write("keys", absl::StrCat("- {id: user, sha256: ", HashKey(key),
                                                ", roles: [generate]}\n")).string();
  config_.adapters = {{"one", absl::StrCat(kGoldenAdapters, "/lora")}};
  Start();
  EXPECT_NE(HttpGet("/metrics", 401), "");
  service_.reset();
  config_.open_metrics = true;
  Start();
  EXPECT_THAT(Pick().running_adapters, ElementsAre("one"));
  for (const char* path : {"/v1/adapters", "/v1/models"}) EXPECT_NE(HttpGet(path, 401), "") << path;
}

TEST_F(MetricsTest, RoutersNamesCanBeLeftOut) {
  config_.no_vllm_metrics = true;
  Start();
  for (const auto& [name, series] : Get()) EXPECT_FALSE(name.starts_with("vllm:")) << name;
}

TEST_F(MetricsTest, AdaptersAreCountedOneByOneUpToACapAndRetired) {
  config_.metrics_adapters = 2;
  Start();
  ASSERT_TRUE(Load("hot", "lora").ok());
  ASSERT_TRUE(Load("cold", "rslora").ok());
  Ask("");
  Ask("hot", 3);
  Ask("cold");
  EXPECT_THAT(ByAdapter("lorikeet_adapter_requests_total"),
              ElementsAre(std::pair("base", 1), std::pair("hot", 3), std::pair("other", 1)));
  EXPECT_EQ(ByAdapter("lorikeet_adapter_generated_tokens_total")["hot"], 9);
  EXPECT_EQ(ByAdapter("lorikeet_adapter_prompt_tokens_total")["hot"], 3 * Encode("hello").size());

  Ask("cold", 2);  // hotter than the base now by more than twice
  Ask("cold");
  EXPECT_THAT(ByAdapter("lorikeet_adapter_requests_total"),
              ElementsAre(std::pair("cold", 2), std::pair("hot", 3), std::pair("other", 2)));

  grpc::ClientContext context;
  v1::UnloadAdapterRequest unload;
  unload.set_name("hot");
  v1::UnloadAdapterResponse response;
  ASSERT_TRUE(adapters().UnloadAdapter(&context, unload, &response).ok());
  EXPECT_THAT(ByAdapter("lorikeet_adapter_requests_total"),
              ElementsAre(std::pair("cold", 2), std::pair("other", 2)));
  v1::GenerateResponse answer;
  EXPECT_FALSE(Unary(For("hot", 3), &answer).ok());
  EXPECT_EQ(ByAdapter("lorikeet_adapter_requests_total").count("hot"), 0u) << "unknown names";
}

TEST_F(MetricsTest, CancelsSayWho) {
  Start();
  Hold();
  {
    grpc::ClientContext context;
    const auto stream = generation().Generate(&context, TextRequest("hello", 20));
    Allow(1);
    v1::GenerateResponse message;
    ASSERT_TRUE(stream->Read(&message));
    context.TryCancel();
    stream->Finish();
  }
  WaitFor([&] { return Metric("lorikeet_canceled_requests_total{reason=\"client\"}") == 1; });
  Release();
}

TEST_F(MetricsTest, HostLoadsAreCountedWithTimeAndBytes) {
  Start();
  ASSERT_TRUE(Load("one", "lora").ok());
  EXPECT_EQ(Metric("lorikeet_adapter_loads_total{tier=\"host\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_adapter_load_bytes_total{tier=\"host\"}"),
            Metric("lorikeet_adapter_bytes"));
  EXPECT_GT(Metric("lorikeet_adapter_load_seconds_total{tier=\"host\"}"), 0);
  EXPECT_EQ(Metric("lorikeet_adapters_resident{tier=\"host\"}"), 1);
  Ask("one");
  EXPECT_EQ(Metric("lorikeet_adapter_hits_total{tier=\"host\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_queue_seconds_count"), 1);
}

std::string FileText(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TEST_F(MetricsTest, TheBoardAndTheRulesAskForMetricsThereAre) {
  Start();
  Ask("");
  v1::GenerateResponse answer;
  EXPECT_FALSE(Unary(TextRequest("", 3), &answer).ok());
  const std::string scrape = HttpGet("/metrics");
  const std::regex name("(lorikeet|vllm|process)[_:][a-z_]+");
  for (const char* path : {"deploy/grafana/lorikeet.json", "deploy/prometheus/rules.yml"}) {
    const std::string text = FileText(path);
    int names = 0;
    for (std::sregex_iterator it(text.begin(), text.end(), name), end; it != end; ++it) {
      // instance:lorikeet_x:rate5m is a rule's own name.
      if (it->position() > 0 && text[it->position() - 1] == ':') continue;
      ++names;
      // A family without samples yet is described all the same.
      EXPECT_TRUE(scrape.find("\n" + it->str()) != std::string::npos ||
                  scrape.find("# TYPE " + it->str() + " ") != std::string::npos)
          << path << ": " << it->str();
    }
    EXPECT_GT(names, 10) << path;
  }
}

TEST(Runbooks, AreThere) {
  const std::string rules = FileText("deploy/prometheus/rules.yml");
  const std::string page = FileText("docs/operations.md");
  const std::regex alert("alert: (\\w+)"), runbook("runbook: docs/operations\\.md#(\\w+)");
  std::vector<std::string> names, anchors;
  for (std::sregex_iterator it(rules.begin(), rules.end(), alert), end; it != end; ++it) {
    EXPECT_THAT(page, ::testing::HasSubstr("\n### " + (*it)[1].str() + "\n"));
    names.push_back(absl::AsciiStrToLower((*it)[1].str()));
  }
  for (std::sregex_iterator it(rules.begin(), rules.end(), runbook), end; it != end; ++it) {
    anchors.push_back((*it)[1]);
  }
  EXPECT_EQ(anchors, names);
}

}  // namespace
}  // namespace lorikeet
