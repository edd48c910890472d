// Chat templates against what Transformers renders.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "server/text/chat_template.h"
#include "tests/unit/text_golden.h"

namespace lorikeet {
namespace {

using testing::GoldenTokenizer;
using ::testing::HasSubstr;
using testing::Json;
using testing::kTokenizerGoldens;
using testing::ReadJson;

absl::StatusOr<std::unique_ptr<ChatTemplate>> Compile(std::string text,
                                                      std::string with_tools = "") {
  NamedTokens named;
  named.bos = NamedToken{0, "<s>"};
  named.eos = NamedToken{1, "</s>"};
  return ChatTemplate::Create({std::move(text), std::move(with_tools)}, named);
}

absl::StatusOr<std::string> Render(const std::string& source, const ChatRequest& request) {
  const auto chat = Compile(source);
  if (!chat.ok()) return chat.status();
  return (*chat)->Render(request);
}

ChatRequest Hello() { return {.messages_json = R"([{"role": "user", "content": "Hello"}])"}; }

TEST(ChatTemplateTest, RendersWhatTransformersRenders) {
  setenv("TZ", "UTC", 1);
  tzset();
  const Json golden = ReadJson(kTokenizerGoldens / "chat.json");
  const auto real = GoldenTokenizer("smollm2", "gguf");
  ASSERT_TRUE(real.ok()) << real.status();
  ASSERT_GE(golden["cases"].size(), 80u);
  for (const Json& test : golden["cases"]) {
    const std::string name = test["template"];
    SCOPED_TRACE(test.dump());
    const std::string source = name == "smollm2" ? (*real)->chat_template().text
                                                 : golden["templates"][name].get<std::string>();
    const auto chat = Compile(source, golden["with_tools"].value(name, ""));
    ChatRequest request;
    request.messages_json = test["messages"].dump();
    if (!test["tools"].is_null()) request.tools_json = test["tools"].dump();
    request.variables_json = test["variables"].dump();
    request.add_generation_prompt = test["add_generation_prompt"];
    request.now_unix_s = golden["now_unix_s"];
    const auto text = chat.ok() ? (*chat)->Render(request) : chat.status();
    if (test.contains("text")) {
      ASSERT_TRUE(text.ok()) << text.status();
      EXPECT_EQ(*text, test["text"].get<std::string>());
    } else {
      EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(text.status().message()),
                  HasSubstr(test.value("raised", "template")));
    }
  }
}

TEST(ChatTemplateTest, MessagesOfAnyTextSurviveTheJson) {
  const std::string text = "\"\\\n\t\x01\x7f é 中 😀 \u2028 </s> {{ x }} {% if %}";
  const std::vector<ChatMessage> messages = {{"user", text}, {"assistant", ""}};
  const auto got = Render("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}",
                          {.messages_json = MessagesJson(messages)});
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(*got, "user=" + text + ";assistant=;");
}

TEST(ChatTemplateTest, VariablesOverrideTokensAndMessagesOverrideVariables) {
  ChatRequest request = Hello();
  request.variables_json = R"({"bos_token": "B", "messages": [], "tools": 1, "own": {"a": 2}})";
  const auto got = Render(
      "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ messages | length }}{{ tools }}"
      "{{ own.a }}",
      request);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(*got, "B</s>False1None2");
}

TEST(ChatTemplateTest, SaysWhatIsWrongWithTheJson) {
  const auto status = [](ChatRequest request) { return Render("x", request).status(); };
  for (const char* bad : {"", "[", "null", "{}", "[1]", "[{}] []", "[{\"role\": \"\xff\"}]"}) {
    const absl::Status got = status({.messages_json = bad});
    EXPECT_EQ(got.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(got.message()), HasSubstr("messages")) << bad;
  }
  ChatRequest request = Hello();
  request.tools_json = "[,]";
  EXPECT_THAT(std::string(status(request).message()), HasSubstr("tools"));
  request = Hello();
  request.variables_json = "[]";
  EXPECT_THAT(std::string(status(request).message()), HasSubstr("variables"));
}

// Hostile input ends in a status, never in a crash or an endless loop.
TEST(ChatTemplateTest, SurvivesHostileMessagesAndTemplates) {
  const std::string deep(1'000'000, '[');
  EXPECT_FALSE(Render("x", {.messages_json = deep}).ok());
  EXPECT_FALSE(
      Render("{{ messages[0].a | tojson }}", {.messages_json = R"([{"a": )" + deep + "}]"}).ok());
  const auto endless = Render(
      "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}"
      "{% endfor %}",
      Hello());
  EXPECT_THAT(std::string(endless.status().message()), HasSubstr("fuel"));
  const auto recursion = Render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", Hello());
  EXPECT_EQ(recursion.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(Render(std::string(100'000, '('), Hello()).ok() &&
               Render("{{ " + std::string(100'000, '(') + " }}", Hello()).ok());
}

TEST(ChatTemplateTest, AModelWithoutATemplateIsRefused) {
  const auto chat = Compile("");
  EXPECT_EQ(chat.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(chat.status().message(), "the model has no chat template");
}

TEST(ChatTemplateTest, SyntaxErrorsNameTheLine) {
  const auto chat = Compile("ok\n\n{% if %}");
  EXPECT_EQ(chat.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(chat.status().message()), HasSubstr(":3"));
}

}  // namespace
}  // namespace lorikeet
