// Every adapter variant against PEFT, through the engine: all adapters of a base at once, so that each
// runs in batches with many others (tests/golden/golden_variants.py makes the goldens).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "adapters_cache/convert.h"
#include "adapters_cache/formats/format_table.h"
#include "tests/support/checkpoint_bytes.h"
#include "tests/support/compare_variants.h"
#include "tests/support/test_device.h"

namespace lorikeet {
namespace {

using Case = VariantCase;

// Brings a case's adapter to its server; false: it does not.
using LoadCase = std::function<bool(VariantServer* server, const Case& c)>;

bool Loaded(const Case& c, const absl::StatusOr<AdapterInfo>& info) {
  EXPECT_TRUE(info.ok()) << c.name << ": " << info.status();
  if (!info.ok()) return false;
  EXPECT_TRUE(info->warnings.empty()) << c.name << ": " << info->warnings.front();
  return true;
}

// A mixture is of what is loaded already.
bool LoadAsSaved(VariantServer* server, const Case& c) {
  return c.mixture() || Loaded(c, server->Load(c.name));
}

// All cases at once, each against its golden.
void CompareAll(std::vector<Case> cases, const std::string& precision, Bounds bounds,
                const LoadCase& load) {
  std::erase_if(cases, [](const Case& c) { return !RunsOnTestDevice(c); });
  std::map<std::string, std::unique_ptr<VariantServer>> servers;
  std::map<std::string, std::vector<std::shared_ptr<TokenSink>>> sinks;
  std::set<std::string> loaded;
  for (const Case& c : cases) {
    auto& server = servers[c.base];
    const RunnerOptions options{
        .device = kTestDevice, .precision = precision, .threads = 2, .kv_bytes = 64 << 20};
    if (!server) server = std::make_unique<VariantServer>(c.base, options);
    if (load(server.get(), c)) loaded.insert(c.name);
  }
  for (size_t prompt = 0; prompt < 3; ++prompt) {
    for (const Case& c : cases) {
      if (!loaded.contains(c.name)) continue;
      sinks[c.name].push_back(Submit(servers[c.base].get(), c, c.prompts[prompt]));
    }
  }
  std::vector<double> largest;
  int steps = 0, all_steps = 0;
  for (const Case& c : cases) {
    if (!loaded.contains(c.name)) continue;
    Errors errors;
    for (size_t i = 0; i < c.prompts.size(); ++i) {
      Compare(c, c.prompts[i], Drain(sinks[c.name][i].get()), bounds, &errors);
      all_steps += static_cast<int>(c.prompts[i].greedy.size());
    }
    EXPECT_LE(errors.mean(), bounds.mean) << c.name;
    EXPECT_LE(errors.largest, bounds.largest) << c.name;
    std::printf("| `%s` | %s | %.1e | %.1e |\n", c.name.c_str(), c.base.c_str(), errors.largest,
                errors.mean());
    largest.push_back(errors.largest);
    steps += errors.steps;
  }
  std::sort(largest.begin(), largest.end());
  std::printf("%s %s: %zu adapters, median %.1e, %d of %d steps compared\n", kTestDevice,
              precision.c_str(), largest.size(), largest[largest.size() / 2], steps, all_steps);
  EXPECT_GE(steps, all_steps / 2);
}

TEST(Variants, AllTogetherGiveWhatPeftGives) {
  CompareAll(LoadVariantCases(), "exact", {1e-3, 1e-3}, LoadAsSaved);
}

// Routers and gates of random weights, which give some tokens to other experts when what they read is rounded.
bool IsRouted(const Case& c) {
  const auto is_any = [](const std::string& name, std::initializer_list<const char*> of) {
    return std::any_of(of.begin(), of.end(), [&](const char* start) { return name.starts_with(start); });
  };
  return is_any(c.base, {"mixtral", "qwen3-moe"}) || is_any(c.name, {"xlora", "arrow", "mole", "mixlora"});
}

// Keys and values in 16 bits on the CPU, all that layers hand on in bfloat16 on a GPU: eight bits of
// logits that spread over tens. Of what is routed a GPU's arithmetic in bfloat16 is cuda_experts_test's,
// cuda_mixture_test's and, with gates, cuda_kernels_test's.
TEST(Variants, AllTogetherStayNearPeftInFastPrecision) {
  std::vector<Case> cases = LoadVariantCases();
  std::erase_if(cases, [](const Case& c) { return kTestDevice != std::string("cpu") && IsRouted(c); });
  CompareAll(std::move(cases), "fast", {0.1, 1.5}, LoadAsSaved);
}

// As one plain LoRA each, mixtures too; what is no LoRA is refused and leaves nothing behind.
TEST(Variants, ConvertedToLoraTheyGiveTheSame) {
  const testing::TempDir directory;
  std::vector<Case> cases = LoadVariantCases();
  std::map<std::string, std::vector<WeightedAdapter>> terms;
  for (Case& c : cases) terms[c.name] = std::exchange(c.adapters, {{c.name, 1}});
  std::set<std::string> refused;
  CompareAll(cases, "exact", {1e-3, 1e-3}, [&](VariantServer* server, const Case& c) {
    std::vector<ConvertTerm> sum;
    for (const auto& [name, weight] : terms[c.name]) {
      sum.push_back({kGoldenRoot / "variants" / name, weight});
    }
    const std::filesystem::path out = directory.path() / c.name;
    const absl::Status status = ConvertToLora(server->base(), sum, out);
    if (status.ok()) {
      EXPECT_TRUE(absl::IsAlreadyExists(ConvertToLora(server->base(), sum, out)));
      return Loaded(c, server->Load(c.name, out));
    }
    EXPECT_FALSE(std::filesystem::exists(out)) << c.name;
    EXPECT_GT(status.message().size(), 40u) << c.name << ": " << status;
    refused.insert(c.name);
    return false;
  });
  for (const char* name : {"lora", "rslora", "lora_embedding", "lora_head", "pissa", "kasa", "adalora",
                           "loha", "vera", "vblora", "tinylora", "hra", "qlora", "mixture_three"}) {
    EXPECT_FALSE(refused.contains(name)) << name;
  }
  for (const char* name : {"dora", "ia3", "oft", "lokr", "bias_all", "prompt_tuning", "houlsby",
                           "alora", "hira", "added_tokens", "fewer_tokens"}) {
    EXPECT_TRUE(refused.contains(name)) << name;
  }
}

// Tokens drawn from a row's own vocabulary, in one batch: the base's 320, more, fewer.
TEST(Variants, RowsSampleFromVocabulariesOfTheirOwn) {
  VariantServer server("llama", {.device = kTestDevice, .precision = "exact", .threads = 2, .kv_bytes = 64 << 20});
  ASSERT_TRUE(server.Load("added_tokens_kept").ok());
  ASSERT_TRUE(server.Load("fewer_tokens").ok());
  const std::map<std::string, int32_t> vocabularies = {
      {"", 320}, {"added_tokens_kept", 390}, {"fewer_tokens", 300}};
  const auto request_of = [&](const std::string& name, uint64_t seed) {
    Request request;
    request.prompt = {5, 6, 7};
    request.sampling = {.temperature = 4, .top_k = 200, .seed = seed, .top_logprobs = 20};
    request.max_new_tokens = 24;
    request.ignore_eos = true;
    if (!name.empty()) request.adapter = server.Lease({{name, 1}});
    request.adapter_name = name;
    return request;
  };
  const auto submit = [&](Request request) {
    auto sink = std::make_shared<TokenSink>(request.max_new_tokens + 2, [] {});
    const auto id = server.engine()->Submit(std::move(request), sink);
    return id.ok() ? absl::StatusOr<std::shared_ptr<TokenSink>>(sink) : id.status();
  };
  std::vector<std::pair<std::string, std::shared_ptr<TokenSink>>> sinks;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    for (const auto& [name, vocabulary] : vocabularies) {
      const auto sink = submit(request_of(name, seed));
      ASSERT_TRUE(sink.ok()) << sink.status();
      sinks.emplace_back(name, *sink);
    }
  }
  std::map<std::string, int32_t> largest;
  for (const auto& [name, sink] : sinks) {
    for (const TokenEvent& event : Drain(sink.get())) {
      if (event.kind != TokenEvent::Kind::kToken) continue;
      largest[name] = std::max(largest[name], event.token);
      for (const auto& [token, logprob] : event.logprobs.top) {
        EXPECT_LT(token, vocabularies.at(name)) << name;
      }
    }
  }
  EXPECT_LT(largest[""], 320);
  EXPECT_LT(largest["fewer_tokens"], 300);
  EXPECT_GE(largest["added_tokens_kept"], 320);
  EXPECT_LT(largest["added_tokens_kept"], 390);

  // What a request says is of its own vocabulary too.
  for (const auto& [name, vocabulary] : vocabularies) {
    for (const int32_t token : {vocabulary - 1, vocabulary}) {
      Request biased = request_of(name, 1);
      biased.sampling.temperature = 0;
      biased.sampling.logit_bias = {{token, 100.0f}};
      const auto sink = submit(std::move(biased));
      EXPECT_EQ(sink.ok(), token < vocabulary) << name << " " << token;
      if (sink.ok()) {
        EXPECT_EQ(Drain(sink->get()).front().token, token) << name;
      } else {
        EXPECT_THAT(std::string(sink.status().message()),
                    ::testing::HasSubstr("ids 0 to " + std::to_string(vocabulary - 1)));
      }
      Request prompted = request_of(name, 1);
      prompted.prompt = {5, token};
      EXPECT_EQ(submit(std::move(prompted)).ok(), token < vocabulary) << name << " " << token;
    }
  }
}

// PEFT 0.21.2's names, and BONE of older files.
constexpr const char* kPeftTypes[] = {
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT", "DEFT",
    "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING",
    "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "P_TUNING", "PEANUT",
    "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHADOW", "SHIRA",
    "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA"};

// The list of all variants (adapters_cache/variants.json): name, PEFT's type, and whether it is exact,
// with its goldens; to be converted, with the goldens of what that gives; or refused. Of the last two
// a configuration, and words of the refusal it gets.
nlohmann::ordered_json VariantList() {
  std::ifstream file("adapters_cache/variants.json");
  return nlohmann::ordered_json::parse(file);
}

std::string PeftTypeOf(const std::string& golden) {
  std::ifstream file(kGoldenRoot / "variants" / golden / "adapter_config.json");
  if (!file.good()) return "";  // a mixture
  return nlohmann::json::parse(file).value("peft_type", "");
}

TEST(Variants, EveryEntryOfTheListIsWhatItSays) {
  std::set<std::string> goldens, named, types;
  for (const Case& c : LoadVariantCases()) goldens.insert(c.name);
  for (const auto& entry : VariantList()) {
    SCOPED_TRACE(entry.dump());
    const std::string how = entry["how"], type = entry.value("peft_type", "");
    types.insert(type);
    for (const auto& golden : entry.value("goldens", nlohmann::ordered_json::array())) {
      EXPECT_TRUE(goldens.contains(golden)) << golden;
      named.insert(golden);
      const std::string of = PeftTypeOf(golden);
      EXPECT_TRUE(type.empty() || type == "BONE" || type == of) << golden << ": " << of;
    }
    if (how == "exact") {
      EXPECT_FALSE(entry["goldens"].empty());
      continue;
    }
    ASSERT_TRUE(how == "converted" || how == "refused");
    AdapterFiles files;
    files.config = entry["config"];
    Problems problems;
    ParseAdapter(std::move(files), &problems);
    ASSERT_FALSE(problems.empty());
    EXPECT_EQ(problems.list().front().code(), absl::StatusCode::kUnimplemented);
    EXPECT_THAT(std::string(problems.ToStatus().message()),
                ::testing::HasSubstr(entry["reason"].get<std::string>()));
  }
  EXPECT_EQ(named, goldens);
  types.erase("");
  EXPECT_EQ(types, std::set<std::string>(std::begin(kPeftTypes), std::end(kPeftTypes)));
}

// Errors by golden, as adapters_cache/VARIANTS.md states them.
std::map<std::string, double> StatedErrors() {
  std::ifstream file("adapters_cache/VARIANTS.md");
  std::map<std::string, double> errors;
  for (std::string line; std::getline(file, line);) {
    if (line == "## Every variant") break;
    if (!line.starts_with("| `")) continue;
    errors[line.substr(3, line.find('`', 3) - 3)] = std::stod(line.substr(line.rfind('|', line.size() - 2) + 1));
  }
  return errors;
}

// The table people read names every golden and none besides, and says of every variant what the list
// says.
TEST(Variants, TheTablesAreOfTheGoldensAndTheList) {
  std::map<std::string, double> errors = StatedErrors();
  std::set<std::string> rows, names;
  for (const auto& [name, error] : errors) rows.insert(name);
  for (const Case& c : LoadVariantCases()) names.insert(c.name);
  EXPECT_EQ(rows, names);
  std::string table;
  for (const auto& entry : VariantList()) {
    double largest = 0;
    std::string what;
    for (const auto& golden : entry.value("goldens", nlohmann::ordered_json::array())) {
      largest = std::max(largest, errors[golden]);
      what += (what.empty() ? "`" : ", `") + golden.get<std::string>() + "`";
    }
    if (entry.contains("reason")) what = entry["reason"].get<std::string>() + (what.empty() ? "" : ": ") + what;
    if (entry.contains("note")) what += "; " + entry["note"].get<std::string>();
    char error[16] = "";
    if (largest > 0) std::snprintf(error, sizeof(error), "%.1e", largest);
    table += "| " + entry["variant"].get<std::string>() + " | " + entry["how"].get<std::string>() +
             " | " + error + " | " + what + " |\n";
  }
  std::ifstream file("adapters_cache/VARIANTS.md");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_NE(text.find(table), std::string::npos) << "the table should be:\n" << table;
}

}  // namespace
}  // namespace lorikeet
