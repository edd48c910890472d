// Tools in chat completions: told to the model, found in what it says, forced.
#include <gmock/gmock.h>

#include "server/openai/tools.h"
#include "server/text/grammar.h"
#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// Names the tools and writes earlier calls: short, for the model's context is.
constexpr char kTagged[] =
    "{% for t in tools or [] %}{{ t.function.name }},{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.arguments.city }}</tool_call>{% endfor %}{% endfor %}";
constexpr char kWhole[] = "{{ tools and tools[0].function.name }}{{ messages[0].content }}";

json Tool(const std::string& name, const json& parameters) {
  return {{"type", "function"}, {"function", {{"name", name}, {"parameters", parameters}}}};
}

const json kWeather = Tool("weather", {{"type", "object"},
                                       {"properties", {{"city", {{"enum", {"Oslo", "Rome"}}}}}},
                                       {"required", {"city"}},
                                       {"additionalProperties", false}});
const json kClock = Tool("clock", {{"type", "object"}, {"additionalProperties", false}});

class ToolsTest : public ServiceTest {
 protected:
  // The answer of a model that says `text`, whole and streamed.
  json Say(const std::string& text, const json& more = json::object()) {
    Script(Encode(text + "#"));
    const json body = Body(more);
    const json choice = Post(body)["choices"][0];
    json streamed = body;
    streamed["stream"] = true;
    ExpectSame(choice, HttpClient(service_->http_port())
                           .Post("/v1/chat/completions", streamed.dump()).events());
    return choice;
  }
  static json Body(const json& more) {
    json body = {{"model", "llama"},
                 {"messages", {{{"role", "user"}, {"content", "hi"}}}},
                 {"tools", {kWeather, kClock}},
                 {"stop", "#"},
                 {"seed", 1}};
    body.update(more);
    return body;
  }
  json Post(const json& body, int status = 200) {
    return HttpClient(service_->http_port()).Ask("/v1/chat/completions", body, status);
  }
  // A stream's deltas add up to the whole choice, but for the calls' ids.
  static void ExpectSame(const json& choice, const std::vector<std::string>& events) {
    std::string text;
    json calls = json::array(), finish;
    for (const std::string& event : events) {
      if (event == "[DONE]") continue;
      const json part = json::parse(event)["choices"][0];
      text += part["delta"].value("content", "");
      for (json call : part["delta"].value("tool_calls", json::array())) {
        EXPECT_EQ(call["index"], calls.size());
        call.erase("index");
        call.erase("id");
        calls.push_back(call);
      }
      if (!part["finish_reason"].is_null()) finish = part["finish_reason"];
    }
    json whole = choice["message"].value("tool_calls", json::array());
    for (json& call : whole) {
      EXPECT_THAT(call["id"].get<std::string>(), HasSubstr("call_"));
      call.erase("id");
    }
    EXPECT_EQ(calls, whole);
    EXPECT_EQ(finish, choice["finish_reason"]);
    const json& content = choice["message"]["content"];
    EXPECT_EQ(text, content.is_null() ? "" : content.get<std::string>());
  }
};

TEST_F(ToolsTest, TaggedCallsAreFoundAmongText) {
  chat_template_ = kTagged;
  Start();
  const json choice = Say(
      "Wait.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n"
      "</tool_call>\n<tool_call>{\"name\": \"clock\", \"arguments\": {}}</tool_call>\n");
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_EQ(choice["message"]["content"], "Wait.");
  const json& calls = choice["message"]["tool_calls"];
  ASSERT_THAT(calls, SizeIs(2));
  EXPECT_EQ(calls[0]["type"], "function");
  EXPECT_EQ(calls[0]["function"]["name"], "weather");
  EXPECT_EQ(calls[0]["function"]["arguments"], R"({"city":"Oslo"})");
  EXPECT_EQ(calls[1]["function"]["name"], "clock");
  const json one = Say("<tool_call>{\"name\": \"clock\", \"arguments\": {}}</tool_call>"
                       "<tool_call>{\"name\": \"clock\", \"arguments\": {}}</tool_call>",
                       {{"parallel_tool_calls", false}});
  EXPECT_THAT(one["message"]["tool_calls"], SizeIs(1));
  EXPECT_EQ(one["message"]["content"], nullptr);
}

TEST_F(ToolsTest, WhatIsNoCallStaysText) {
  chat_template_ = kTagged;
  Start();
  for (const std::string text :
       {"<tool_call>{\"name\": \"rm\", \"arguments\": {}}</tool_call>", "<tool_call>{]</tool_call>",
        "<tool_call>{\"name\": \"clock\"}</tool_call>", "a <tool_call> b", "a <tool", "a \n"}) {
    const json choice = Say(text);
    EXPECT_EQ(choice["message"]["content"], text);
    EXPECT_FALSE(choice["message"].contains("tool_calls")) << text;
    EXPECT_EQ(choice["finish_reason"], "stop");
  }
  const std::string call = "<tool_call>{\"name\": \"clock\", \"arguments\": {}}</tool_call>";
  EXPECT_EQ(Say(call, {{"tool_choice", "none"}})["message"]["content"], call);
}

TEST_F(ToolsTest, AWholeAnswerIsACall) {
  chat_template_ = kWhole;
  Start();
  const json choice = Say(R"( {"name": "weather", "parameters": {"city": "Rome"}})");
  ASSERT_THAT(choice["message"]["tool_calls"], SizeIs(1));
  EXPECT_EQ(choice["message"]["tool_calls"][0]["function"]["arguments"], R"({"city":"Rome"})");
  EXPECT_EQ(choice["message"]["content"], nullptr);
  const std::string clock = R"({"name": "clock", "arguments": {}})";
  const json two = Say("[" + clock + ", " + clock + "]");
  EXPECT_THAT(two["message"]["tool_calls"], SizeIs(2));
  for (const std::string text : {"{\"a\": 1}", "It is {\"name\": 1}", "[1]", "{"}) {
    EXPECT_EQ(Say(text)["message"]["content"], text);
  }
}

TEST_F(ToolsTest, TheTemplateTellsTheModelOfThem) {
  chat_template_ = kTagged;
  Start();
  const auto prompt_tokens = [&](const json& more) {
    return Post(Body(more))["usage"]["prompt_tokens"].get<int>();
  };
  const int with = prompt_tokens(json::object());
  EXPECT_EQ(with, prompt_tokens({{"tool_choice", "none"}}) +
                      static_cast<int>(Encode("weather,clock,").size()));
  const json talk = {{{"role", "user"}, {"content", "hi"}},
                     {{"role", "assistant"},
                      {"tool_calls",
                       {{{"id", "call_1"},
                         {"type", "function"},
                         {"function",
                          {{"name", "weather"}, {"arguments", R"({"city": "Oslo"})"}}}}}}},
                     {{"role", "tool"}, {"tool_call_id", "call_1"}, {"content", "rain"}}};
  EXPECT_GT(prompt_tokens({{"messages", talk}}), with);
}

TEST_F(ToolsTest, AModelThatKnowsNothingMakesForcedCalls) {
  chat_template_ = kTagged;
  real_runner_ = true;
  Start();
  const json named = {{"type", "function"}, {"function", {{"name", "weather"}}}};
  for (int seed = 0; seed < 4; ++seed) {
    for (const json& choice : {json("required"), named}) {
      const json answer = Post(Body({{"tool_choice", choice},
                                     {"parallel_tool_calls", false},
                                     {"seed", seed},
                                     {"stop", json::array()},
                                     {"max_tokens", 200}}))["choices"][0];
      EXPECT_EQ(answer["finish_reason"], "tool_calls") << answer;
      ASSERT_THAT(answer["message"]["tool_calls"], SizeIs(1)) << answer;
      const json call = answer["message"]["tool_calls"][0]["function"];
      const json arguments = json::parse(call["arguments"].get<std::string>());
      if (choice == named || call["name"] == "weather") {
        EXPECT_EQ(call["name"], "weather");
        EXPECT_THAT(arguments["city"].get<std::string>(), AnyOf("Oslo", "Rome"));
      } else {
        EXPECT_EQ(call["name"], "clock");
        EXPECT_EQ(arguments, json::object());
      }
    }
  }
}

// Token by token, as a model would be kept from everything else.
bool Takes(const GrammarSource& grammar, const std::string& text) {
  const auto tokenizer = *Tokenizer::FromDirectory(kGoldenModel);
  const std::vector<int32_t> ends = {2};
  const int32_t vocab = tokenizer->vocab_size();
  const auto grammars = Grammars::Create(*tokenizer, vocab, ends);
  EXPECT_TRUE(grammars.ok()) << grammars.status();
  const auto matcher = (*grammars)->Compile(grammar);
  EXPECT_TRUE(matcher.ok()) << matcher.status() << "\n" << grammar.text;
  if (!matcher.ok()) return false;
  std::vector<int32_t> ids = *tokenizer->Encode(text, /*add_special=*/false);
  ids.push_back(ends[0]);
  std::vector<uint32_t> allowed((vocab + 31) / 32);
  for (const int32_t id : ids) {
    if (!(*matcher)->Allowed(allowed).ok() || (allowed[id / 32] >> (id % 32) & 1) == 0) return false;
    if (id != ends[0] && !(*matcher)->Accept(id).ok()) return false;
  }
  return true;
}

TEST_F(ToolsTest, StrictToolsAreCalledAsTheirSchemasSayOrNotAtAll) {
  json weather = kWeather;
  weather["function"]["strict"] = true;
  const json body = {{"tools", {weather, Tool("clock", {{"type", "object"},
                                                        {"additionalProperties", false}})}}};
  const auto grammar = [&](ToolStyle style) {
    const Json read = Json::parse(body.dump());
    Fields fields(read);
    const ToolOptions options = ReadTools(fields, style);
    EXPECT_TRUE(fields.Finish().ok()) << fields.Finish();
    EXPECT_EQ(options.style, style);
    return options.grammar.value_or(GrammarSource());
  };
  const std::string oslo = R"({"name": "weather", "arguments": {"city": "Oslo"}})";
  const std::string paris = R"({"name": "weather", "arguments": {"city": "Paris"}})";
  const std::string clock = R"({"name": "clock", "arguments": {"zone": 1}})";
  const auto call = [](const std::string& json) { return "<tool_call>\n" + json + "\n</tool_call>"; };
  const GrammarSource tagged = grammar(ToolStyle::kTagged);
  EXPECT_TRUE(Takes(tagged, ""));
  EXPECT_TRUE(Takes(tagged, "2 < 3, {} and <tool_cal"));
  EXPECT_TRUE(Takes(tagged, "Wait.\n" + call(oslo) + "\n" + call(clock) + " and"));
  EXPECT_FALSE(Takes(tagged, call(paris)));
  EXPECT_FALSE(Takes(tagged, "Wait. " + call(oslo) + call(paris)));
  EXPECT_FALSE(Takes(tagged, call("{}")));
  EXPECT_FALSE(Takes(tagged, "<tool_call>" + oslo));

  const GrammarSource whole = grammar(ToolStyle::kWhole);
  EXPECT_TRUE(Takes(whole, ""));
  EXPECT_TRUE(Takes(whole, " It is [not] {that}."));
  EXPECT_TRUE(Takes(whole, oslo));
  EXPECT_TRUE(Takes(whole, R"({"name": "weather", "parameters": {"city": "Rome"}})"));
  EXPECT_TRUE(Takes(whole, "[" + clock + ", " + oslo + "]"));
  EXPECT_FALSE(Takes(whole, paris));
  EXPECT_FALSE(Takes(whole, "[" + oslo + ", " + paris + "]"));
  EXPECT_FALSE(Takes(whole, R"({"weather": 1})"));
}

TEST_F(ToolsTest, AnAnswerWithStrictToolsMayBeText) {
  chat_template_ = kTagged;
  Start();
  json strict = kWeather;
  strict["function"]["strict"] = true;
  const json body = {{"tools", {strict}}};
  EXPECT_EQ(Say("It rains.", body)["message"]["content"], "It rains.");
  const json choice =
      Say("<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}</tool_call>",
          body);
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_EQ(choice["message"]["tool_calls"][0]["function"]["name"], "weather");
}

TEST_F(ToolsTest, WhatIsWrongIsNamed) {
  chat_template_ = kTagged;
  Start();
  const auto refused = [&](const json& more) {
    return Post(Body(more), 400)["error"]["message"].get<std::string>();
  };
  const auto tool = [](const json& function) {
    return json{{"tools", {{{"type", "function"}, {"function", function}}}}};
  };
  EXPECT_THAT(refused({{"tools", 1}}), HasSubstr("tools"));
  EXPECT_THAT(refused({{"tools", {{{"type", "browser"}}}}}), HasSubstr("tools[0].type"));
  EXPECT_THAT(refused(tool({{"name", ""}})), HasSubstr("tools[0].function.name"));
  EXPECT_THAT(refused(tool({{"name", "x"}, {"kind", 1}})), HasSubstr("tools[0].function.kind"));
  const json strict_of_nothing = {{"type", "strange"}};
  EXPECT_THAT(refused(tool({{"name", "x"}, {"strict", true}, {"parameters", strict_of_nothing}})),
              HasSubstr("strange"));
  EXPECT_THAT(refused({{"tools", {kClock, kClock}}}), HasSubstr("'clock' is there twice"));
  EXPECT_THAT(refused({{"tool_choice", "maybe"}}), HasSubstr("tool_choice"));
  EXPECT_THAT(refused({{"tool_choice", Tool("rm", json::object())}}), HasSubstr("'rm' is none"));
  EXPECT_THAT(refused({{"tools", json::array()}, {"tool_choice", "required"}}),
              HasSubstr("tool_choice"));
  EXPECT_THAT(refused({{"tool_choice", "required"}, {"guided_regex", "a"}}),
              HasSubstr("tool_choice"));
}

TEST_F(ToolsTest, ATemplateWithoutToolsCannotTellOfThem) {
  Start();
  EXPECT_THAT(Post(Body(json::object()), 400)["error"]["message"].get<std::string>(),
              HasSubstr("tools: the model's chat template"));
}

}  // namespace
}  // namespace lorikeet
