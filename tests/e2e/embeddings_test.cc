// /v1/embeddings over real HTTP with the golden model, against Transformers + PEFT.
#include <gmock/gmock.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <thread>

#include "absl/strings/escaping.h"
#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr float kTolerance = 2e-5f;  // of values of a vector of length 1, in float32

class EmbeddingsTest : public ServiceTest {
 protected:
  void Serve() {
    real_runner_ = true;
    Start();
    for (const char* name : {"dora", "lora_bias"}) ASSERT_TRUE(Load(name, name).ok());
    client_ = std::make_unique<HttpClient>(service_->http_port());
  }
  json Post(const json& body, int status = 200) { return PostTo("/v1/embeddings", body, status); }
  json PostTo(const std::string& path, const json& body, int status = 200) {
    return client_->Ask(path, body, status);
  }
  v1::EmbedResponse Embed(const v1::EmbedRequest& request) {
    grpc::ClientContext context;
    v1::EmbedResponse response;
    const grpc::Status status = generation().Embed(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  // What is said of the request once `spoil` has changed it.
  std::string Refused(v1::EmbedRequest request, void (*spoil)(v1::EmbedRequest*)) {
    spoil(&request);
    grpc::ClientContext context;
    v1::EmbedResponse response;
    const grpc::Status status = generation().Embed(&context, request, &response);
    EXPECT_FALSE(status.ok());
    return status.error_message();
  }
  static json Cases() {
    std::ifstream file("tests/golden/embeddings.json");
    EXPECT_TRUE(file.good()) << "run from the source root";
    return json::parse(file);
  }
  static std::string ModelOf(const json& one) {
    return one["adapter"].is_null() ? "llama" : one["adapter"].get<std::string>();
  }
  static void ExpectNear(const json& actual, const json& expected, const std::string& what) {
    ASSERT_EQ(actual.size(), expected.size()) << what;
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_NEAR(actual[i].get<float>(), expected[i].get<float>(), kTolerance) << what << " " << i;
    }
  }
  std::unique_ptr<HttpClient> client_;
};

TEST_F(EmbeddingsTest, AreTheOraclesByAnyAdapter) {
  config_.limits.max_batch_tokens = 16;  // prompts of several steps
  Serve();
  for (const json& one : Cases()) {
    for (const char* pooling : {"last", "mean"}) {
      const std::string what = ModelOf(one) + " " + pooling;
      const json answer =
          Post({{"model", ModelOf(one)}, {"input", one["input"]}, {"pooling", pooling}});
      EXPECT_EQ(answer["object"], "list");
      EXPECT_EQ(answer["model"], ModelOf(one));
      EXPECT_EQ(answer["usage"]["prompt_tokens"], one["input"].size());
      EXPECT_EQ(answer["usage"]["total_tokens"], one["input"].size());
      ASSERT_THAT(answer["data"], SizeIs(1));
      EXPECT_EQ(answer["data"][0]["object"], "embedding");
      ExpectNear(answer["data"][0]["embedding"], one[pooling], what);
    }
  }
}

TEST_F(EmbeddingsTest, TextsBytesAndFewerDimensions) {
  Serve();
  const json texts = {"hello", "the weather in spring", "hello"};
  const json all = Post({{"model", "dora"}, {"input", texts}});
  ASSERT_THAT(all["data"], SizeIs(3));
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(all["data"][i]["index"], i);
    const json alone = Post({{"model", "dora"}, {"input", texts[i]}});
    ExpectNear(all["data"][i]["embedding"], alone["data"][0]["embedding"], texts[i]);
  }
  EXPECT_NE(all["data"][0]["embedding"], all["data"][1]["embedding"]);

  const json bytes = Post({{"model", "dora"}, {"input", "hello"}, {"encoding_format", "base64"}});
  std::string decoded;
  ASSERT_TRUE(absl::Base64Unescape(bytes["data"][0]["embedding"].get<std::string>(), &decoded));
  std::vector<float> values(decoded.size() / sizeof(float));
  std::memcpy(values.data(), decoded.data(), decoded.size());
  ExpectNear(json(values), all["data"][0]["embedding"], "base64");

  const json few = Post({{"model", "dora"}, {"input", "hello"}, {"dimensions", 5}});
  const json& vector = few["data"][0]["embedding"];
  ASSERT_THAT(vector, SizeIs(5));
  double squares = 0;
  for (const json& value : vector) squares += std::pow(value.get<double>(), 2);
  EXPECT_NEAR(squares, 1, 1e-5);
  EXPECT_NEAR(vector[0].get<float>() / vector[1].get<float>(), values[0] / values[1], 1e-3);
}

// More inputs than run, wait or are begun at a time, beside answers that must not change.
TEST_F(EmbeddingsTest, ShareBatchesWithGeneration) {
  config_.limits.max_batch_tokens = 24;
  config_.limits.max_running_requests = 8;
  config_.limits.max_queued_requests = 64;
  Serve();
  const json ask = {{"model", "dora"},  {"prompt", "hello"},   {"max_tokens", 40},
                    {"temperature", 0}, {"ignore_eos", true}, {"skip_prefix_cache", true}};
  const json alone = PostTo("/v1/completions", ask)["choices"][0]["text"];
  const json cases = Cases();
  json answers = json::array();
  std::thread generation([&] {
    HttpClient client(service_->http_port());
    for (int i = 0; i < 4; ++i) {
      answers.push_back(client.Post("/v1/completions", ask.dump()).json()["choices"][0]["text"]);
    }
  });
  for (const json& one : cases) {
    const json inputs(90, one["input"]);
    const json answer =
        Post({{"model", ModelOf(one)}, {"input", inputs}, {"pooling", "mean"}});
    ASSERT_THAT(answer["data"], SizeIs(inputs.size()));
    for (const json& item : answer["data"]) ExpectNear(item["embedding"], one["mean"], "mean");
  }
  generation.join();
  ASSERT_THAT(answers, SizeIs(4));
  for (const json& text : answers) EXPECT_EQ(text, alone);
}

TEST_F(EmbeddingsTest, GrpcGivesTheSame) {
  Serve();
  for (const json& one : Cases()) {
    v1::EmbedRequest request;
    for (const int32_t id : one["input"]) request.mutable_token_ids()->add_ids(id);
    if (!one["adapter"].is_null()) request.set_adapter(one["adapter"].get<std::string>());
    for (const v1::Pooling pooling : {v1::POOLING_LAST, v1::POOLING_MEAN}) {
      request.set_pooling(pooling);
      const v1::EmbedResponse response = Embed(request);
      EXPECT_EQ(response.usage().prompt_tokens(), one["input"].size());
      EXPECT_EQ(response.adapter_version().empty(), one["adapter"].is_null());
      const json values(std::vector<float>(response.values().begin(), response.values().end()));
      ExpectNear(values, one[pooling == v1::POOLING_LAST ? "last" : "mean"], ModelOf(one));
    }
  }
  v1::EmbedRequest few;
  few.set_text("hello");
  few.set_dimensions(5);
  EXPECT_EQ(Embed(few).values_size(), 5);
  EXPECT_EQ(Refused(few, [](auto* r) { r->set_dimensions(65); }), "dimensions: 65 is not in [0, 64]");
  EXPECT_EQ(Refused(few, [](auto* r) { r->set_dimensions(-1); }), "dimensions: -1 is not in [0, 64]");
  EXPECT_THAT(Refused(few, [](auto* r) { r->clear_prompt(); }), HasSubstr("text or token_ids"));
  EXPECT_THAT(Refused(few, [](auto* r) { r->set_pooling(v1::Pooling(9)); }), HasSubstr("9"));
  EXPECT_THAT(Refused(few, [](auto* r) { r->set_adapter("nobody"); }), HasSubstr("nobody"));
}

TEST_F(EmbeddingsTest, RefusalsNameTheFieldAndTheBound) {
  Serve();
  const auto message = [&](const json& more, int status = 400) {
    json body = {{"model", "llama"}, {"input", "hello"}};
    body.update(more);
    return Post(body, status)["error"]["message"].get<std::string>();
  };
  EXPECT_THAT(message({{"input", nullptr}}), HasSubstr("input: missing"));
  EXPECT_THAT(message({{"input", ""}}), HasSubstr("input: empty"));
  EXPECT_THAT(message({{"input", {"a", ""}}}), HasSubstr("input[1]: empty"));
  EXPECT_THAT(message({{"input", {1, 1 << 20}}}), HasSubstr("input[1]: 1048576 is not in [0, "));
  EXPECT_THAT(message({{"input", json(2049, "a")}}), HasSubstr("input: 2049 of them; at most 2048"));
  EXPECT_THAT(message({{"input", json(300, 5)}}), HasSubstr("input: 300 tokens; at most 255"));
  EXPECT_THAT(message({{"dimensions", 65}}), HasSubstr("dimensions: 65 is not in [1, 64]"));
  EXPECT_THAT(message({{"dimensions", 0}}), HasSubstr("dimensions: 0 is not in [1, 64]"));
  EXPECT_THAT(message({{"pooling", "max"}}), HasSubstr("'max' is none of last, mean"));
  EXPECT_THAT(message({{"encoding_format", "hex"}}), HasSubstr("'hex' is none of float, base64"));
  EXPECT_THAT(message({{"temperature", 1}}), HasSubstr("temperature: this field is not supported"));
  EXPECT_THAT(message({{"model", "nobody"}}, 404), HasSubstr("nobody"));
}

}  // namespace
}  // namespace lorikeet
