// Every adapter variant against PEFT, through the engine: all adapters of a base at once, so that each
// runs in batches with many others (tests/golden/golden_variants.py makes the goldens).
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/mixer.h"
#include "adapters_cache/registry.h"
#include "engine/base/clock.h"
#include "engine/engine.h"
#include "engine/runner/model_runner.h"
#include "nlohmann/json.hpp"

namespace lorikeet {
namespace {

const std::filesystem::path kRoot = "tests/golden";
constexpr double kBound = 1e-3;  // of a log-probability

struct Prompt {
  std::vector<int32_t> tokens;
  std::vector<int32_t> greedy;
  std::vector<std::vector<std::pair<int32_t, double>>> top;  // [steps][8]
};

struct Case {
  std::string name;
  std::string base;
  std::vector<WeightedAdapter> adapters;  // itself, or the terms of a mixture
  std::vector<Prompt> prompts;
};

std::vector<Case> LoadCases() {
  std::ifstream file(kRoot / "variants" / "cases.json");
  LK_CHECK_MSG(file.good(), "run from the source root");
  std::vector<Case> cases;
  for (const nlohmann::json& item : nlohmann::json::parse(file)) {
    Case c{item["name"], item["base"], {}, {}};
    if (item.contains("adapters")) {
      for (const auto& [name, weight] : item["adapters"].items()) c.adapters.push_back({name, weight});
    } else {
      c.adapters.push_back({c.name, 1});
    }
    for (const nlohmann::json& p : item["prompts"]) {
      c.prompts.push_back({p["prompt"].get<std::vector<int32_t>>(),
                           p["greedy"].get<std::vector<int32_t>>(),
                           p["logprobs"].get<decltype(Prompt::top)>()});
    }
    cases.push_back(std::move(c));
  }
  return cases;
}

// A base model with its engine and registry.
class Server {
 public:
  explicit Server(const std::string& base) {
    auto source = ModelSource::Open(kRoot / "models" / base);
    LK_CHECK_MSG(source.ok(), source.status().ToString());
    RunnerOptions options{.device = "cpu", .precision = "exact", .threads = 2, .kv_bytes = 64 << 20};
    auto runner = ModelRunner::Create(std::shared_ptr<const ModelSource>(*std::move(source)), options);
    LK_CHECK_MSG(runner.ok(), runner.status().ToString());
    runner_ = *std::move(runner);
    auto registry = AdapterRegistry::Create(
        runner_->base_model(), {.base_name = "base", .allowed_roots = {}, .allow_dense = true});
    LK_CHECK_MSG(registry.ok(), registry.status().ToString());
    registry_ = *std::move(registry);
    mixer_ = std::make_unique<AdapterMixer>(runner_->base_model(), registry_.get());
    EngineOptions engine{.kv = runner_->kv(), .pages = runner_->pages()};
    engine.limits.max_context_tokens = 64;
    engine.limits.max_running_requests = 256;
    engine.vocab = runner_->base_model().vocab_size();
    auto started = Engine::Start(engine, runner_.get(), &clock_, nullptr);
    LK_CHECK_MSG(started.ok(), started.status().ToString());
    engine_ = *std::move(started);
  }

  absl::StatusOr<AdapterInfo> Load(const std::string& name) {
    return registry_->Load(name, std::filesystem::absolute(kRoot / "variants" / name),
                           AdapterRegistry::Origin::kOperator);
  }

  std::shared_ptr<TokenSink> Submit(const Case& c, const Prompt& prompt) {
    Request request;
    request.prompt = prompt.tokens;
    request.sampling.temperature = 0;
    request.sampling.top_logprobs = 20;
    request.max_new_tokens = static_cast<int32_t>(prompt.greedy.size());
    request.ignore_eos = true;
    // All of them are in host memory, so that the lease comes at once.
    absl::StatusOr<AdapterLease> lease = absl::UnavailableError("still to be read");
    mixer_->AcquireAsync(c.adapters, [&lease](auto acquired) { lease = std::move(acquired); });
    LK_CHECK_MSG(lease.ok(), lease.status().ToString());
    request.adapter = *lease;
    request.adapter_name = c.name;
    auto sink = std::make_shared<TokenSink>(request.max_new_tokens + 2, [] {});
    const auto id = engine_->Submit(std::move(request), sink);
    LK_CHECK_MSG(id.ok(), id.status().ToString());
    return sink;
  }

 private:
  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<AdapterRegistry> registry_;
  std::unique_ptr<AdapterMixer> mixer_;
  SteadyClock clock_;
  std::unique_ptr<Engine> engine_;
};

// All events up to the end.
std::vector<TokenEvent> Drain(TokenSink* sink) {
  std::vector<TokenEvent> events;
  while (events.empty() || events.back().kind != TokenEvent::Kind::kFinished) {
    TokenEvent event;
    if (sink->Pop(&event)) events.push_back(std::move(event));
    else std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return events;
}

// The largest difference of a log-probability, over the steps before the paths part (they must not).
double Compare(const Case& c, const Prompt& prompt, const std::vector<TokenEvent>& events) {
  EXPECT_TRUE(events.back().status.ok()) << c.name << ": " << events.back().status;
  double worst = 0;
  for (size_t step = 0; step + 1 < events.size(); ++step) {
    const TokenLogprobs& found = events[step].logprobs;
    for (const auto& [token, expected] : prompt.top[step]) {
      const auto it = std::find_if(found.top.begin(), found.top.end(),
                                   [token = token](const auto& top) { return top.first == token; });
      if (it == found.top.end()) return INFINITY;
      worst = std::max(worst, std::abs(it->second - expected));
    }
    if (events[step].token != prompt.greedy[step]) return INFINITY;
  }
  return events.size() == prompt.greedy.size() + 1 ? worst : INFINITY;
}

TEST(Variants, AllTogetherGiveWhatPeftGives) {
  const std::vector<Case> cases = LoadCases();
  std::map<std::string, std::unique_ptr<Server>> servers;
  std::map<std::string, std::vector<std::shared_ptr<TokenSink>>> sinks;
  std::set<std::string> loaded;
  for (const Case& c : cases) {
    auto& server = servers[c.base];
    if (!server) server = std::make_unique<Server>(c.base);
    if (c.adapters[0].name != c.name) {  // a mixture of what is loaded already
      loaded.insert(c.name);
      continue;
    }
    const auto info = server->Load(c.name);
    EXPECT_TRUE(info.ok()) << c.name << ": " << info.status();
    if (!info.ok()) continue;
    EXPECT_TRUE(info->warnings.empty()) << c.name << ": " << info->warnings.front();
    loaded.insert(c.name);
  }
  for (size_t prompt = 0; prompt < 3; ++prompt) {
    for (const Case& c : cases) {
      if (!loaded.contains(c.name)) continue;
      sinks[c.name].push_back(servers[c.base]->Submit(c, c.prompts[prompt]));
    }
  }
  std::vector<double> errors;
  for (const Case& c : cases) {
    if (!loaded.contains(c.name)) continue;
    double worst = 0;
    for (size_t i = 0; i < c.prompts.size(); ++i) {
      worst = std::max(worst, Compare(c, c.prompts[i], Drain(sinks[c.name][i].get())));
    }
    EXPECT_LE(worst, kBound) << c.name;
    std::printf("| `%s` | %s | %.1e |\n", c.name.c_str(), c.base.c_str(), worst);
    errors.push_back(worst);
  }
  std::sort(errors.begin(), errors.end());
  std::printf("%zu adapters, median %.1e\n", errors.size(), errors[errors.size() / 2]);
}

// PEFT 0.21.2's names, and BONE of older files.
constexpr const char* kPeftTypes[] = {
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT", "DEFT",
    "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING",
    "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "P_TUNING", "PEANUT",
    "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHADOW", "SHIRA",
    "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA"};

// Served means: with a golden. What is refused says why.
TEST(Variants, EveryPeftTypeHasAGoldenOrAReason) {
  std::set<std::string> golden = {"BONE"};  // MiSS under its old name; adapters_load_test has one
  for (const Case& c : LoadCases()) {
    std::ifstream file(kRoot / "variants" / c.adapters[0].name / "adapter_config.json");
    const nlohmann::json config = nlohmann::json::parse(file);
    if (config.contains("peft_type")) golden.insert(config["peft_type"]);
  }
  int served = 0;
  for (const char* type : kPeftTypes) {
    AdapterFiles files;
    files.config = {{"peft_type", type}};
    Problems problems;
    const RawAdapter raw = ParseAdapter(std::move(files), &problems);
    const bool refused = !problems.empty() && absl::IsUnimplemented(problems.list().front());
    EXPECT_NE(golden.contains(type), refused) << type << ": " << problems.ToStatus();
    served += refused ? 0 : 1;
    EXPECT_TRUE(!refused || problems.ToStatus().message().size() > 60) << problems.ToStatus();
  }
  EXPECT_EQ(served, 39);
  EXPECT_EQ(std::size(kPeftTypes), 46u);
}

// The table people read names every golden and none besides.
TEST(Variants, TheTableNamesEveryGolden) {
  std::ifstream file("adapters_cache/VARIANTS.md");
  std::set<std::string> rows;
  std::string line;
  while (std::getline(file, line)) {
    if (line.starts_with("| `")) rows.insert(line.substr(3, line.find('`', 3) - 3));
  }
  std::set<std::string> names;
  for (const Case& c : LoadCases()) names.insert(c.name);
  EXPECT_EQ(rows, names);
}

}  // namespace
}  // namespace lorikeet
