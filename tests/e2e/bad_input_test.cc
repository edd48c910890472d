// What a client or its files can get wrong: a status that names the value and the bound, and a
// server that goes on.
#include <gmock/gmock.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>

#include "absl/strings/str_cat.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using grpc::StatusCode;
using ::testing::HasSubstr;

class BadInputTest : public ServiceTest {
 protected:
  void TearDown() override {
    if (service_ != nullptr) {  // whatever happened, the next good request is served
      v1::GenerateResponse response;
      EXPECT_TRUE(Unary(TextRequest("still there?", 2), &response).ok());
    }
    ServiceTest::TearDown();
  }
};

struct BadRequest {
  const char* name;
  std::function<void(v1::GenerateRequest*)> spoil;
  std::vector<std::string> message_parts;
};

std::vector<BadRequest> BadRequests() {
  using R = v1::GenerateRequest;
  const float nan = std::nanf("");
  const float infinity = std::numeric_limits<float>::infinity();
  return {
      {"no prompt", [](R* r) { r->clear_prompt(); }, {"prompt"}},
      {"empty text", [](R* r) { r->set_text(""); }, {"text", "empty"}},
      {"empty chat", [](R* r) { r->mutable_chat(); }, {"chat", "empty"}},
      {"no ids", [](R* r) { r->mutable_token_ids(); }, {"token_ids", "empty"}},
      {"id too large", [](R* r) { r->mutable_token_ids()->add_ids(320); }, {"320"}},
      {"id negative", [](R* r) { r->mutable_token_ids()->add_ids(-5); }, {"-5", "320"}},
      {"prompt too long",
       [](R* r) {
         for (int i = 0; i < 256; ++i) r->mutable_token_ids()->add_ids(5);
       },
       {"256", "255"}},
      {"temperature", [](R* r) { r->mutable_sampling()->set_temperature(-0.5); }, {"-0.5", "0"}},
      {"NaN", [=](R* r) { r->mutable_sampling()->set_temperature(nan); }, {"temperature", "nan"}},
      {"infinite", [=](R* r) { r->mutable_sampling()->set_temperature(infinity); }, {"inf"}},
      {"top_p zero", [](R* r) { r->mutable_sampling()->set_top_p(0); }, {"top_p", "0"}},
      {"top_p", [](R* r) { r->mutable_sampling()->set_top_p(1.5); }, {"top_p", "1.5", "1"}},
      {"top_k", [](R* r) { r->mutable_sampling()->set_top_k(-3); }, {"top_k", "-3"}},
      {"min_p", [](R* r) { r->mutable_sampling()->set_min_p(2); }, {"min_p", "2", "1"}},
      {"repetition",
       [](R* r) { r->mutable_sampling()->set_repetition_penalty(0); },
       {"repetition_penalty", "0"}},
      {"presence",
       [](R* r) { r->mutable_sampling()->set_presence_penalty(3); },
       {"presence_penalty", "3", "2"}},
      {"frequency",
       [=](R* r) { r->mutable_sampling()->set_frequency_penalty(nan); },
       {"frequency_penalty", "nan"}},
      {"max_tokens", [](R* r) { r->mutable_stop()->set_max_tokens(0); }, {"max_tokens", "0", "1"}},
      {"logprobs", [](R* r) { r->set_logprobs(21); }, {"logprobs", "21", "20"}},
      {"logprobs negative", [](R* r) { r->set_logprobs(-1); }, {"logprobs", "-1"}},
      {"stop strings",
       [](R* r) {
         for (int i = 0; i < 17; ++i) r->mutable_stop()->add_strings("x");
       },
       {"17", "16"}},
      {"empty stop", [](R* r) { r->mutable_stop()->add_strings(""); }, {"stop.strings[0]", "1"}},
      {"long stop",
       [](R* r) { r->mutable_stop()->add_strings(std::string(257, 'x')); },
       {"257", "256"}},
      {"stop ids",
       [](R* r) {
         for (int i = 0; i < 65; ++i) r->mutable_stop()->add_token_ids(1);
       },
       {"65", "64"}},
      {"stop id", [](R* r) { r->mutable_stop()->add_token_ids(4000); }, {"4000", "320"}},
  };
}

TEST_F(BadInputTest, RequestsOutOfRangeNameValueAndBound) {
  Start();
  for (const BadRequest& bad : BadRequests()) {
    v1::GenerateRequest request = TextRequest("hello", 3);
    bad.spoil(&request);
    std::vector<v1::GenerateResponse> messages;
    const grpc::Status status = Stream(request, &messages);
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << bad.name;
    EXPECT_TRUE(messages.empty()) << bad.name;
    for (const std::string& part : bad.message_parts) {
      EXPECT_THAT(status.error_message(), HasSubstr(part)) << bad.name;
    }
  }
  EXPECT_EQ(Metric("lorikeet_generated_tokens_total"), 0);
}

TEST_F(BadInputTest, TextThatIsNotUtf8IsNamedWithItsOffset) {
  Start();
  const auto field = [](int number, const std::string& bytes) {
    return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(bytes.size())} + bytes;
  };
  const std::string bad = "ok\xff";
  const struct {
    std::string method, request, name;
  } cases[] = {
      {"GenerationService/Generate", field(1, bad), "text"},
      {"GenerationService/GenerateUnary", field(1, bad), "text"},
      {"GenerationService/Generate", field(1, "fine") + field(4, bad), "adapter"},
      {"GenerationService/Generate", field(2, field(1, field(2, bad))), "chat.messages.content"},
      {"AdapterService/LoadAdapter", field(1, bad), "name"},
      {"AdapterService/GetAdapter", field(1, bad), "name"},
      {"AdapterService/UnloadAdapter", field(1, bad), "name"},
  };
  for (const auto& [method, request, name] : cases) {
    std::string response;
    const grpc::Status status = Raw("/lorikeet.v1." + method, request, &response);
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << method;
    EXPECT_THAT(status.error_message(), HasSubstr(name + " is not valid UTF-8 at byte 2"))
        << method;
  }
}

TEST_F(BadInputTest, BytesThatAreNoMessageAreRefused) {
  Start();
  std::string response;
  const grpc::Status status =
      Raw("/lorikeet.v1.GenerationService/Generate", "\x0a\x7ftoo short", &response);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("GenerateRequest"));
}

TEST_F(BadInputTest, AMessageOverTheLimitIsRefused) {
  Start();
  v1::GenerateResponse response;
  const grpc::Status status =
      Unary(TextRequest(std::string(Limits::kMaxRequestBytes, 'x'), 1), &response);
  EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr(absl::StrCat(Limits::kMaxRequestBytes)));
}

TEST_F(BadInputTest, AnErrorMessageLongerThanAHeaderStillArrives) {
  Start();
  v1::GenerateRequest request = TextRequest("hello", 1);
  request.set_adapter(std::string(100'000, 'x'));
  v1::GenerateResponse response;
  EXPECT_EQ(Unary(request, &response).error_code(), StatusCode::NOT_FOUND);
}

// Copies of a good adapter directory, each spoiled in one way.
class BadAdapterTest : public BadInputTest {
 protected:
  void SetUp() override {
    BadInputTest::SetUp();
    root_ =
        std::filesystem::temp_directory_path() / absl::StrCat("lorikeet_bad_adapter_", ::getpid());
    std::filesystem::remove_all(root_);
    std::filesystem::create_directories(root_);
    config_.adapter_roots.push_back(root_.string());
  }
  void TearDown() override {
    BadInputTest::TearDown();
    std::filesystem::remove_all(root_);
  }

  std::filesystem::path Copy(const std::string& name) {
    const std::filesystem::path to = root_ / name;
    std::filesystem::copy(std::string(kGoldenAdapters) + "/lora", to);
    return to;
  }
  // Replaces all of `from` in the file by as many bytes.
  static void Replace(const std::filesystem::path& path, const std::string& from,
                      const std::string& to) {
    ASSERT_EQ(from.size(), to.size());
    std::string content = Read(path);
    size_t at = content.find(from);
    ASSERT_NE(at, std::string::npos) << from << " is not in " << path;
    for (; at != std::string::npos; at = content.find(from, at)) content.replace(at, to.size(), to);
    std::ofstream(path, std::ios::binary) << content;
  }
  static std::string Read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void ExpectRefused(const std::string& path, StatusCode code, const std::string& part) {
    const grpc::Status status = Load("bad", path);
    EXPECT_EQ(status.error_code(), code) << path << ": " << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(part)) << path;
    EXPECT_EQ(Metric("lorikeet_adapters"), 0) << path;
  }

  std::filesystem::path root_;
};

TEST_F(BadAdapterTest, DirectoriesThatCannotBeLoadedSayWhy) {
  Start();
  constexpr char kWeights[] = "adapter_model.safetensors";
  ExpectRefused("not_there", StatusCode::NOT_FOUND, "not_there");
  ExpectRefused("/etc", StatusCode::PERMISSION_DENIED, "/etc");
  ExpectRefused("../models/llama", StatusCode::PERMISSION_DENIED, "root");

  const auto truncated = Copy("truncated");
  std::filesystem::resize_file(truncated / kWeights,
                               std::filesystem::file_size(truncated / kWeights) - 10);
  ExpectRefused("truncated", StatusCode::DATA_LOSS, kWeights);

  Replace(Copy("misplaced") / kWeights, "q_proj", "z_proj");
  ExpectRefused("misplaced", StatusCode::NOT_FOUND, "z_proj");

  Replace(Copy("wrong_rank") / "adapter_config.json", "\"r\": 3", "\"r\": 5");
  ExpectRefused("wrong_rank", StatusCode::INVALID_ARGUMENT, "5");

  const auto infinite = Copy("infinite");
  std::string weights = Read(infinite / kWeights);
  weights.replace(weights.size() - 4, 4, std::string("\x00\x00\x80\x7f", 4));
  std::ofstream(infinite / kWeights, std::ios::binary) << weights;
  ExpectRefused("infinite", StatusCode::INVALID_ARGUMENT, "inf");

  const auto pickle = Copy("pickle");
  std::filesystem::rename(pickle / kWeights, pickle / "adapter_model.bin");
  ExpectRefused("pickle", StatusCode::UNIMPLEMENTED, "adapter_model.bin");

  std::ofstream(Copy("no_json") / "adapter_config.json") << "{";
  ExpectRefused("no_json", StatusCode::DATA_LOSS, "adapter_config.json");
}

TEST_F(BadAdapterTest, NamesAreCheckedAndNotTakenTwice) {
  Start();
  for (const std::string& name :
       {std::string(), std::string("a b"), std::string("llama"), std::string(129, 'x')}) {
    EXPECT_EQ(Load(name, "lora").error_code(), StatusCode::INVALID_ARGUMENT) << "'" << name << "'";
  }
  ASSERT_TRUE(Load("style", "lora").ok());
  EXPECT_TRUE(Load("style", "lora").ok()) << "the same weights";
  EXPECT_EQ(Load("style", "dora").error_code(), StatusCode::ALREADY_EXISTS);
  grpc::ClientContext context;
  v1::GetAdapterRequest request;
  request.set_name("style");
  v1::GetAdapterResponse response;
  ASSERT_TRUE(adapters().GetAdapter(&context, request, &response).ok());
  EXPECT_EQ(response.adapter().variant(), "lora") << "a refused load changed it";
}

TEST_F(BadAdapterTest, WithoutARootNothingIsLoadedAtRunTime) {
  config_.adapter_roots.clear();
  Start();
  const grpc::Status status = Load("style", std::filesystem::absolute(kGoldenAdapters) / "lora");
  EXPECT_EQ(status.error_code(), StatusCode::PERMISSION_DENIED) << status.error_message();
}

TEST_F(BadAdapterTest, UnknownNamesAreNotFound) {
  Start();
  grpc::ClientContext get_context, unload_context;
  v1::GetAdapterRequest get;
  get.set_name("nobody");
  v1::GetAdapterResponse got;
  EXPECT_EQ(adapters().GetAdapter(&get_context, get, &got).error_code(), StatusCode::NOT_FOUND);
  v1::UnloadAdapterRequest unload;
  unload.set_name("nobody");
  v1::UnloadAdapterResponse unloaded;
  const grpc::Status status = adapters().UnloadAdapter(&unload_context, unload, &unloaded);
  EXPECT_EQ(status.error_code(), StatusCode::NOT_FOUND);
  EXPECT_THAT(status.error_message(), HasSubstr("nobody"));
}

}  // namespace
}  // namespace lorikeet
