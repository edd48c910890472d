// What an answer must look like, and what must not come in it, by a model that knows neither: its
// weights are random, so only the constraint can give the form.
#include <gmock/gmock.h>

#include <regex>

#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;

class FormTest : public ServiceTest {
 protected:
  void Serve() {
    real_runner_ = true;
    Start();
    client_ = std::make_unique<HttpClient>(service_->http_port());
  }
  json Complete(const json& more, int status = 200) {
    json body = {{"model", "llama"}, {"prompt", "hello"}, {"max_tokens", 100}, {"seed", 3}};
    body.update(more);
    return client_->Ask("/v1/completions", body, status);
  }
  json Choice(const json& more) { return Complete(more)["choices"][0]; }

  std::unique_ptr<HttpClient> client_;
};

TEST_F(FormTest, ASchemaGivesJsonThatFitsIt) {
  Serve();
  const json schema = json::parse(R"({
      "type": "object", "additionalProperties": false, "required": ["kind", "count", "on"],
      "properties": {"kind": {"enum": ["bird", "fish"]},
                     "count": {"type": "integer", "minimum": 10, "maximum": 99},
                     "on": {"type": "boolean"}}})");
  const json format = {{"type", "json_schema"},
                       {"json_schema", {{"name", "x"}, {"schema", schema}}}};
  for (int seed = 0; seed < 8; ++seed) {
    const json choice = Choice({{"response_format", format}, {"seed", seed}, {"max_tokens", 200}});
    ASSERT_EQ(choice["finish_reason"], "stop") << choice;
    EXPECT_EQ(choice["stop_reason"], nullptr);
    const json answer = json::parse(choice["text"].get<std::string>(), nullptr, false);
    ASSERT_THAT(answer, SizeIs(3)) << choice;
    EXPECT_THAT(answer["kind"].get<std::string>(), AnyOf("bird", "fish"));
    EXPECT_GE(answer["count"], 10);
    EXPECT_LE(answer["count"], 99);
    EXPECT_TRUE(answer["on"].is_boolean());
  }
}

TEST_F(FormTest, RegexChoiceAndGrammarEachInABatchOfAll) {
  Serve();
  std::vector<std::unique_ptr<HttpClient>> clients;
  const std::vector<json> forms = {{{"guided_regex", "[0-9]{3}-[a-c]{4}"}},
                                   {{"structured_outputs", {{"choice", {"a.b", "x|y/z"}}}}},
                                   {{"guided_grammar", "start: \"<\" /[p-r]{5}/ \">\""}},
                                   json::object()};
  const std::vector<std::string> patterns = {"[0-9]{3}-[a-c]{4}", R"(a\.b|x\|y/z)", "<[p-r]{5}>"};
  for (const json& form : forms) {
    json body = {{"model", "llama"}, {"prompt", "hi"}, {"max_tokens", 60}, {"n", 3}, {"seed", 5}};
    body.update(form);
    clients.push_back(std::make_unique<HttpClient>(service_->http_port()));
    clients.back()->SendPost("/v1/completions", body.dump());
  }
  for (size_t i = 0; i < patterns.size(); ++i) {
    const json answer = clients[i]->Receive().json();
    ASSERT_THAT(answer["choices"], SizeIs(3)) << answer;
    for (const json& choice : answer["choices"]) {
      EXPECT_TRUE(std::regex_match(choice["text"].get<std::string>(), std::regex(patterns[i])))
          << choice;
    }
  }
  EXPECT_EQ(clients.back()->Receive().status, 200);
}

TEST_F(FormTest, GrpcHasTheSameForms) {
  Serve();
  v1::GenerateRequest request = TextRequest("hello", 60);
  request.mutable_form()->set_regex("[xyz]{6}");
  request.set_n(2);
  v1::GenerateResponse response;
  const grpc::Status status = Unary(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_THAT(response.more_choices(), SizeIs(1));
  for (const std::string& text : {response.text(), response.more_choices(0).text()}) {
    EXPECT_TRUE(std::regex_match(text, std::regex("[xyz]{6}"))) << text;
  }
  EXPECT_EQ(response.finish().reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(response.finish().stop_case(), v1::Finish::STOP_NOT_SET);
}

TEST_F(FormTest, ABiasDecides) {
  Serve();
  const json choice = Choice({{"logit_bias", {{"77", 100}}}, {"max_tokens", 5}, {"logprobs", 0},
                              {"return_tokens_as_token_ids", true}});
  for (const json& token : choice["logprobs"]["tokens"]) EXPECT_EQ(token, "token_id:77");
  EXPECT_LT(choice["logprobs"]["token_logprobs"][0], 0) << "of the model's own distribution";
}

TEST_F(FormTest, BadWordsDoNotComeAndTheAnswerIsLongEnough) {
  Serve();
  const json plain = {{"temperature", 0}, {"max_tokens", 12}, {"ignore_eos", true}};
  const std::string text = Choice(plain)["text"];
  json without = plain;
  without["bad_words"] = {text.substr(0, 2)};
  EXPECT_THAT(Choice(without)["text"].get<std::string>().substr(0, 2), Not(text.substr(0, 2)));

  const json biased = {{"logit_bias", {{"2", 100}}}, {"max_tokens", 12}};  // end of sequence
  EXPECT_EQ(Complete(biased)["usage"]["completion_tokens"], 1);
  json longer = biased;
  longer["min_tokens"] = 7;
  EXPECT_EQ(Complete(longer)["usage"]["completion_tokens"], 8);
}

TEST_F(FormTest, WhatCannotBeCompiledIsNamed) {
  Serve();
  const std::vector<std::pair<json, std::string>> cases = {
      {{{"guided_regex", "[0-9"}}, "guided_regex: "},
      {{{"guided_json", "{"}}, "guided_json: "},
      {{{"guided_grammar", "start: nothing"}}, "guided_grammar: "},
      {{{"guided_choice", json::array()}}, "guided_choice: empty"},
      {{{"structured_outputs", {{"regex", "("}}}}, "structured_outputs.regex: "},
      {{{"response_format",
         {{"type", "json_schema"}, {"json_schema", {{"schema", {{"type", "x"}}}}}}}},
       "response_format: "},
      {{{"response_format",
         {{"type", "json_schema"}, {"json_schema", {{"schema", true}, {"strct", true}}}}}},
       "response_format.json_schema.strct"},
      {{{"guided_json", {{"type", "no such type"}}}}, "no such type"},
      {{{"guided_regex", "a"}, {"guided_json", json::object()}}, "form already"},
      {{{"response_format", {{"type", "xml"}}}}, "xml"},
      {{{"response_format", {{"type", "json_schema"}}}}, "json_schema.schema"},
      {{{"response_format", {{"type", "text"}, {"json_schema", json::object()}}}},
       "response_format.json_schema: only with"},
      {{{"logit_bias", {{"400", 1}}}}, "400"},
      {{{"logit_bias", {{"4", 101}}}}, "101"},
      {{{"logit_bias", {{"x", 1}}}}, "logit_bias.x"},
      {{{"min_tokens", -1}}, "-1"},
      {{{"min_tokens", 9}, {"max_tokens", 8}}, "min_tokens: 9; at most max_tokens, which is 8"},
      {{{"max_tokens", 0}}, "max_tokens: 0; at least 1"},
      {{{"bad_words", {""}}}, "bad_words[0]"},
      {{{"bad_words", {std::string(257, 'x')}}}, "bad_words[0]: 257 bytes; 1 to 256"},
      {{{"bad_words", std::vector<std::string>(1025, "x")}}, "1025 words; at most 1024"}};
  for (const auto& [more, part] : cases) {
    EXPECT_THAT(Complete(more, 400)["error"]["message"].get<std::string>(), HasSubstr(part))
        << more;
  }
}

}  // namespace
}  // namespace lorikeet
