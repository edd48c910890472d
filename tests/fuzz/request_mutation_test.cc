// Thousands of damaged copies of valid requests, keys and answers, the same ones on every run.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/fuzz/mutator.h"
#include "tests/fuzz/requests.h"

namespace lorikeet {
namespace {

using testing::AsBytes;
using testing::Mutator;

// The valid ones, from which libFuzzer begins as well.
std::vector<std::string> Corpus(const std::string& name) {
  std::vector<std::string> texts;
  for (const auto& entry : std::filesystem::directory_iterator("tests/fuzz/corpus/" + name)) {
    std::ifstream file(entry.path(), std::ios::binary);
    texts.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  std::ranges::sort(texts);
  return texts;
}

struct Reader {
  const char* name;
  const char* corpus;
  void (*property)(std::span<const std::byte>);
  uint32_t seeds;
};

class RequestMutationTest : public ::testing::TestWithParam<Reader> {};

TEST_P(RequestMutationTest, DamagedTextIsRefusedOrTaken) {
  const std::vector<std::string> corpus = Corpus(GetParam().corpus);
  ASSERT_FALSE(corpus.empty()) << "run from the source root";
  for (const std::string& valid : corpus) {
    GetParam().property(AsBytes(valid));
    for (uint32_t seed = 0; seed < GetParam().seeds; ++seed) {
      SCOPED_TRACE(seed);
      const std::string damaged = Mutator(seed).Mutate(valid);
      // Of the exact size on the heap, where the sanitizer guards both ends.
      const std::vector<char> bytes(damaged.begin(), damaged.end());
      GetParam().property(AsBytes({bytes.data(), bytes.size()}));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Readers, RequestMutationTest,
    ::testing::Values(Reader{"RequestBody", "request_body", testing::FuzzRequestBody, 2000},
                      Reader{"Query", "query", testing::FuzzQuery, 2000},
                      Reader{"Keys", "keys", testing::FuzzKeys, 2000},
                      Reader{"ToolCalls", "tool_calls", testing::FuzzToolCalls, 2000},
                      Reader{"Http", "http", testing::FuzzHttp, 1000}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lorikeet
