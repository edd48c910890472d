// Adapters with tokens, a tokenizer and a chat template of their own, over both ports.
#include <gmock/gmock.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "server/adapter_texts.h"
#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::HasSubstr;

constexpr int32_t kBaseTokens = 320;
constexpr int32_t kOwnTokens = 390;  // of the golden adapter added_tokens_kept
constexpr char kOwnTemplate[] =
    "{% for message in messages %}<|own_0|>{{ message['content'] }}{% endfor %}";

void Write(const fs::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

json ReadJson(const fs::path& path) { return json::parse(std::ifstream(path)); }

// The base's tokenizer with "<|own_0|>" and so on behind its tokens.
json OwnTokenizer(int32_t tokens) {
  json tokenizer = ReadJson(fs::path(kGoldenModel) / "tokenizer.json");
  json added = tokenizer["added_tokens"][0];
  for (int32_t id = kBaseTokens; id < tokens; ++id) {
    added["id"] = id;
    added["content"] = "<|own_" + std::to_string(id - kBaseTokens) + "|>";
    added["special"] = false;
    tokenizer["added_tokens"].push_back(added);
  }
  return tokenizer;
}

class AdapterTextTest : public ServiceTest {
 protected:
  void SetUp() override {
    ServiceTest::SetUp();
    config_.adapter_roots.push_back(root_.path().string());
    real_runner_ = true;
  }

  // A copy of a golden adapter in a folder of the root.
  fs::path Copy(const std::string& golden, const std::string& name) {
    const fs::path to = root_.path() / name;
    fs::copy(fs::path("tests/golden/variants") / golden, to);
    return to;
  }

  void Serve() {
    const fs::path own = Copy("added_tokens_kept", "own");
    Write(own / "tokenizer.json", OwnTokenizer(kOwnTokens).dump());
    Write(own / "tokenizer_config.json", R"({"eos_token":"<|own_1|>"})");
    Write(own / "chat_template.jinja", kOwnTemplate);
    Start();
    ASSERT_TRUE(Load("own", own).ok());
    ASSERT_TRUE(Load("style", "dora").ok());
    client_ = std::make_unique<HttpClient>(service_->http_port());
  }

  json Post(const std::string& path, const json& body, int status = 200) {
    return client_->Ask(path, body, status);
  }

  std::string Version(const std::string& name) {
    grpc::ClientContext context;
    v1::GetAdapterRequest request;
    request.set_name(name);
    v1::GetAdapterResponse reply;
    EXPECT_TRUE(adapters().GetAdapter(&context, request, &reply).ok()) << name;
    return reply.adapter().version();
  }

  json Tokens(const std::string& model, const json& what) {
    json body = what;
    body["model"] = model;
    return Post("/tokenize", body)["tokens"];
  }

  testing::TempDir root_;
  std::unique_ptr<HttpClient> client_;
};

TEST_F(AdapterTextTest, ItsRequestsAreTokenizedByItsTokenizer) {
  Serve();
  const json prompt = {{"prompt", "hello<|own_5|>"}};
  const json own = Tokens("own", prompt), base = Tokens("llama", prompt);
  EXPECT_EQ(own.back(), kBaseTokens + 5);
  EXPECT_GT(base.size(), own.size());
  EXPECT_EQ(Tokens("style", prompt), base);
  EXPECT_EQ(Post("/detokenize", {{"model", "own"}, {"tokens", own}})["prompt"], "hello<|own_5|>");
  const json refused = Post("/detokenize", {{"model", "llama"}, {"tokens", own}}, 400);
  EXPECT_THAT(refused.dump(), HasSubstr("is not in [0, 320)"));
}

TEST_F(AdapterTextTest, ChatsAreWrittenByItsTemplate) {
  Serve();
  const json messages = {{{"role", "user"}, {"content", "hello"}}};
  const json own = Tokens("own", {{"messages", messages}});
  const json base = Tokens("llama", {{"messages", messages}});
  EXPECT_EQ(own, Tokens("own", {{"prompt", "<|own_0|>hello"}, {"add_special_tokens", false}}));
  EXPECT_NE(own, base);
  const auto chat = [&](const std::string& model, const json& bias) {
    return Post("/v1/chat/completions", {{"model", model},
                                         {"messages", messages},
                                         {"max_tokens", 3},
                                         {"temperature", 0},
                                         {"logprobs", true},
                                         {"top_logprobs", 2},
                                         {"logit_bias", bias}});
  };
  const json answer = chat("own", {{"325", 100}});
  EXPECT_EQ(answer["usage"]["prompt_tokens"], own.size());
  EXPECT_EQ(answer["choices"][0]["message"]["content"], "<|own_5|><|own_5|><|own_5|>");
  EXPECT_EQ(answer["choices"][0]["logprobs"]["content"][0]["token"], "<|own_5|>");
  EXPECT_EQ(chat("llama", json::object())["usage"]["prompt_tokens"], base.size());
  // Its tokenizer's end of sequence is its requests'.
  const json ended = chat("own", {{"321", 100}});
  EXPECT_EQ(ended["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(ended["usage"]["completion_tokens"], 1);
  EXPECT_THAT(Post("/v1/chat/completions",
                   {{"model", "llama"}, {"messages", messages}, {"logit_bias", {{"325", 1}}}}, 400)
                  .dump(),
              HasSubstr("token 325 is not in [0, 320)"));
}

TEST_F(AdapterTextTest, AnUploadBringsItsTextAndKeepsItOverARestart) {
  config_.adapter_dir = root_.path() / "kept";
  Serve();
  const fs::path own = root_.path() / "own";
  fs::create_directories(own / "additional_chat_templates");
  Write(own / "additional_chat_templates/tool_use.jinja", kOwnTemplate);
  ASSERT_TRUE(Load("whole", own).ok());
  const std::string command = absl::StrCat(
      LORIKEET_BINARY, " adapters upload sent ", own.string(), " --server 127.0.0.1:",
      service_->grpc_port(), " > /dev/null");
  ASSERT_EQ(std::system(command.c_str()), 0);
  EXPECT_EQ(Version("sent"), Version("whole"));
  const json chat = {{"messages", {{{"role", "user"}, {"content", "hello<|own_5|>"}}}}};
  for (const bool again : {false, true}) {
    if (again) {
      service_.reset();
      Start();
      client_ = std::make_unique<HttpClient>(service_->http_port());
    }
    EXPECT_EQ(Tokens("sent", chat), Tokens("whole", chat)) << again;
    EXPECT_NE(Tokens("sent", chat), Tokens("llama", chat)) << again;
  }
}

TEST_F(AdapterTextTest, GrpcSpeaksItToo) {
  Serve();
  v1::GenerateRequest request = TextRequest("hello<|own_5|>", 3);
  request.mutable_sampling()->set_temperature(0);
  request.set_echo(true);
  v1::GenerateResponse base, own;
  ASSERT_TRUE(Unary(request, &base).ok());
  request.set_adapter("own");
  (*request.mutable_sampling()->mutable_logit_bias())[kOwnTokens - 1] = 100;
  ASSERT_TRUE(Unary(request, &own).ok());
  EXPECT_GT(base.finish().usage().prompt_tokens(), own.finish().usage().prompt_tokens());
  EXPECT_THAT(own.text(), HasSubstr("<|own_69|><|own_69|><|own_69|>"));
  // Beside rows of another vocabulary the same: all of them at once.
  std::vector<std::thread> callers;
  std::vector<v1::GenerateResponse> answers(8);
  for (size_t i = 0; i < answers.size(); ++i) {
    callers.emplace_back([&, i] {
      v1::GenerateRequest one = request;
      if (i % 2 == 1) one.clear_adapter(), one.mutable_sampling()->clear_logit_bias();
      EXPECT_TRUE(Unary(one, &answers[i]).ok());
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (size_t i = 0; i < answers.size(); ++i) {
    EXPECT_EQ(answers[i].text(), i % 2 == 1 ? base.text() : own.text());
  }
  request.mutable_token_ids()->add_ids(kOwnTokens);
  v1::GenerateResponse none;
  const grpc::Status refused = Unary(request, &none);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("390 is not in [0, 390)"));
}

TEST_F(AdapterTextTest, FormsAreOfItsTokens) {
  Serve();
  const json answer = Post("/v1/completions", {{"model", "own"},
                                               {"prompt", "hello"},
                                               {"max_tokens", 8},
                                               {"temperature", 0},
                                               {"logit_bias", {{"327", 50}}},
                                               {"structured_outputs", {{"regex", "(<\\|own_7\\|>)+"}}}});
  EXPECT_THAT(answer["choices"][0]["text"].get<std::string>(), HasSubstr("<|own_7|>"));
}

TEST_F(AdapterTextTest, DamagedTextIsRefusedByName) {
  Start();
  const auto load = [&](const std::string& name, const std::string& file,
                        const std::string& content) {
    const fs::path folder = Copy("lora", name);
    Write(folder / file, content);
    return Load(name, folder).error_message();
  };
  EXPECT_THAT(load("a", "tokenizer.json", "{"), HasSubstr("tokenizer.json"));
  EXPECT_THAT(load("b", "tokenizer.json", OwnTokenizer(kBaseTokens + 1).dump()),
              HasSubstr("its tokenizer has 321 tokens and its model 320"));
  EXPECT_THAT(load("c", "chat_template.jinja", "{% for %}"), HasSubstr("chat template"));
  EXPECT_THAT(load("d", "tokenizer_config.json", "[]"), HasSubstr("tokenizer_config.json"));
  EXPECT_EQ(load("e", "special_tokens_map.json", "{}"), "");
}

TEST(AdapterTexts, AreOneForAllWithTheSameFiles) {
  const auto tokenizer = Tokenizer::FromDirectory(kGoldenModel);
  ASSERT_TRUE(tokenizer.ok());
  AdapterTexts texts(**tokenizer, {2});
  const TokenizerFiles files = {{"tokenizer.json", OwnTokenizer(kOwnTokens).dump()}};
  const auto first = texts.Read(files, "a", kOwnTokens), second = texts.Read(files, "b", kOwnTokens);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(*first, *second);
  const auto other = texts.Read(files, "c", kOwnTokens + 1);
  ASSERT_TRUE(other.ok());
  EXPECT_NE(*first, *other);
}

}  // namespace
}  // namespace lorikeet
