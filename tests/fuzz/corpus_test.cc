// The corpus of every fuzz target as plain tests: seeds made of the goldens, and tests/fuzz/corpus,
// which has what libFuzzer found.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "tests/fuzz/adapters.h"
#include "tests/fuzz/parsers.h"
#include "tests/fuzz/requests.h"
#include "tests/fuzz/seeds.h"
#include "tests/fuzz/texts.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet::testing {
namespace {

namespace fs = std::filesystem;

struct Target {
  const char* name;
  void (*property)(std::span<const std::byte>);
  size_t least_seeds;
};

constexpr Target kTargets[] = {
    {"safetensors", FuzzSafetensors, 80}, {"gguf", FuzzGguf, 10},
    {"hf_config", FuzzHfConfig, 30},      {"checkpoint", FuzzCheckpoint, 5},
    {"adapter", FuzzAdapterFiles, 80},    {"text", FuzzText, 80},
    {"request_body", FuzzRequestBody, 0}, {"query", FuzzQuery, 0},
    {"keys", FuzzKeys, 0},                {"tool_calls", FuzzToolCalls, 0},
    {"http", FuzzHttp, 0}};

void Try(const Target& target, const std::string& name, const std::string& input) {
  SCOPED_TRACE(name);
  const std::vector<char> bytes(input.begin(), input.end());  // the sanitizer guards both ends
  target.property(AsBytes({bytes.data(), bytes.size()}));
}

class Corpus : public ::testing::TestWithParam<Target> {};

TEST_P(Corpus, HoldsTheProperty) {
  const Target& target = GetParam();
  const Seeds seeds = GoldenSeeds();
  const auto own = seeds.find(target.name);
  EXPECT_GE(own == seeds.end() ? 0 : own->second.size(), target.least_seeds);
  if (own != seeds.end()) {
    for (const auto& [name, input] : own->second) Try(target, name, input);
  }
  const fs::path found = fs::path("tests/fuzz/corpus") / target.name;
  if (!fs::exists(found)) return;
  for (const auto& entry : fs::directory_iterator(found)) {
    std::ifstream file(entry.path(), std::ios::binary);
    std::ostringstream content;
    content << file.rdbuf();
    Try(target, entry.path().string(), content.str());
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, Corpus, ::testing::ValuesIn(kTargets),
                         [](const auto& info) { return std::string(info.param.name); });

// A folder that no target reads would be tested by nobody.
TEST(CorpusFolders, BelongToTargets) {
  const fs::path corpus = "tests/fuzz/corpus";
  if (!fs::exists(corpus)) return;
  for (const auto& entry : fs::directory_iterator(corpus)) {
    bool known = false;
    for (const Target& target : kTargets) known |= entry.path().filename() == target.name;
    EXPECT_TRUE(known) << entry.path();
  }
}

}  // namespace
}  // namespace lorikeet::testing
