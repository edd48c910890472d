// Thousands of damaged copies of valid requests, keys and answers, the same ones on every run.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/fuzz/mutator.h"
#include "tests/fuzz/requests.h"

namespace lorikeet {
namespace {

using testing::AsBytes;
using testing::Mutator;

constexpr char kCompletion[] =
    R"({"model":"m","prompt":["a","b"],"max_tokens":4,"temperature":0.5,"logit_bias":{"5":-1.5},)"
    R"("stop":["x"],"stream":true,"stream_options":{"include_usage":true},"logprobs":2,"n":2,)"
    R"("structured_outputs":{"regex":"[a-z]+"},"adapters":[{"id":"a","weight":0.5}],"seed":1})";
constexpr char kChat[] =
    R"({"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]},)"
    R"({"role":"assistant","tool_calls":[{"id":"1","type":"function","function":{"name":"w",)"
    R"("arguments":"{\"a\":1}"}}]},{"role":"tool","content":"x"}],"tools":[{"type":"function",)"
    R"("function":{"name":"w","description":"d",)"
    R"("parameters":{"type":"object","$defs":{"a":{}}}}}],)"
    R"("tool_choice":"required","parallel_tool_calls":false,"top_logprobs":1,"logprobs":true})";
constexpr char kEmbedding[] =
    R"({"model":"m","input":["a",[1,2]],"pooling":"mean","dimensions":8,"user":"u",)"
    R"("encoding_format":"base64","adapters":[{"id":"a","weight":0.5}]})";
constexpr char kLoad[] = R"({"name":"a","path":"b","replace":true,"pin":false})";
constexpr char kAlias[] = R"({"alias":"a","targets":[{"target":"b","weight":3},{"target":"c"}]})";
constexpr char kPlan[] = R"({"rank":8,"linears":["q_proj"],"bytes_per_value":2,"adapters":12345})";
constexpr char kQuery[] = "name_prefix=a%2Fb&page_size=10&in_host_only=true&page_token=%41";
constexpr char kAnswer[] =
    "Wait. \n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"a\": [1, 2]}}\n</tool_call>\n"
    "<tool_call>{\"name\": \"clock\", \"parameters\": \"{}\"}</tool_call> and";
constexpr char kArray[] =
    R"( [{"name": "clock", "arguments": {}}, {"name": "weather", "parameters": 1}])";
constexpr char kHttp[] =
    "POST /a?b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    "3\r\nabc\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

std::string Keys() {
  const std::string hash(64, 'a');
  return "- {id: a, sha256: " + hash + ", roles: [generate, adapters:read], adapters: [b-*, c]}\n" +
         "- id: b\n  certificate: x.y\n  tenant: \"t\\\"\"\n  roles: [metrics]\n" +
         "  requests_per_minute: 5\n";
}

struct Reader {
  const char* name;
  std::vector<std::string> valid;
  void (*property)(std::span<const std::byte>);
  uint32_t seeds;
};

class RequestMutationTest : public ::testing::TestWithParam<Reader> {};

TEST_P(RequestMutationTest, DamagedTextIsRefusedOrTaken) {
  for (const std::string& valid : GetParam().valid) {
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

// The byte before a body says whose it is.
std::string Body(char kind, const char* json) { return kind + std::string(json); }

INSTANTIATE_TEST_SUITE_P(
    Readers, RequestMutationTest,
    ::testing::Values(Reader{"RequestBody",
                             {Body(0, kCompletion), Body(1, kChat), Body(2, kChat), Body(3, kEmbedding),
                              Body(4, kLoad), Body(5, kAlias), Body(6, kPlan)},
                             testing::FuzzRequestBody, 2000},
                      Reader{"Query", {kQuery}, testing::FuzzQuery, 2000},
                      Reader{"Keys", {Keys()}, testing::FuzzKeys, 2000},
                      Reader{"ToolCalls", {kAnswer, kArray}, testing::FuzzToolCalls, 2000},
                      Reader{"Http", {kHttp}, testing::FuzzHttp, 1000}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lorikeet
