// OpenAI's API over real HTTP: what is answered, streamed and refused.
#include <gmock/gmock.h>

#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

class OpenAiTest : public ServiceTest {
 protected:
  void Serve() {
    Start();
    ASSERT_TRUE(Load("style", "dora").ok());
    client_ = std::make_unique<HttpClient>(service_->http_port());
  }
  json Post(const std::string& path, const json& body, int status = 200) {
    return client_->Ask(path, body, status);
  }
  static json Completion(const json& more = json::object()) {
    json body = {{"model", "llama"},  {"prompt", "hello"},   {"max_tokens", 8},
                 {"temperature", 0}, {"ignore_eos", true}, {"seed", 1}};
    body.update(more);
    return body;
  }
  static json Chat(const json& more = json::object()) {
    json body = {{"model", "llama"},
                 {"messages", {{{"role", "user"}, {"content", "hi"}}}},
                 {"max_tokens", 8},
                 {"ignore_eos", true},
                 {"seed", 1}};
    body.update(more);
    return body;
  }
  std::unique_ptr<HttpClient> client_;
};

TEST_F(OpenAiTest, ACompletionIsWhatGrpcAnswers) {
  Serve();
  v1::GenerateRequest request = TextRequest("hello", 8);
  request.mutable_sampling()->set_temperature(0);
  v1::GenerateResponse grpc;
  ASSERT_TRUE(Unary(request, &grpc).ok());
  const json answer = Post("/v1/completions", Completion());
  EXPECT_EQ(answer["object"], "text_completion");
  EXPECT_THAT(answer["id"].get<std::string>(), HasSubstr("cmpl-"));
  EXPECT_EQ(answer["model"], "llama");
  ASSERT_THAT(answer["choices"], SizeIs(1));
  EXPECT_EQ(answer["choices"][0]["text"], grpc.text());
  EXPECT_EQ(answer["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(answer["choices"][0]["index"], 0);
  EXPECT_EQ(answer["usage"]["completion_tokens"], 8);
  EXPECT_EQ(answer["usage"]["prompt_tokens"], grpc.finish().usage().prompt_tokens());
}

TEST_F(OpenAiTest, TheModelChoosesTheAdapter) {
  Serve();
  const auto text = [&](const std::string& model) {
    return Post("/v1/completions", Completion({{"model", model}}))["choices"][0]["text"];
  };
  const json base = text("llama"), adapted = text("style");
  EXPECT_NE(base, adapted);
  EXPECT_EQ(text("llama:style"), adapted);
  const json models = client_->Get("/v1/models").json();
  ASSERT_THAT(models["data"], SizeIs(2));
  EXPECT_EQ(models["data"][0]["id"], "llama");
  EXPECT_EQ(models["data"][0]["parent"], nullptr);
  const json& card = models["data"][1];
  EXPECT_EQ(card["id"], "style");
  EXPECT_EQ(card["parent"], "llama");
  EXPECT_THAT(card["root"].get<std::string>(), HasSubstr("dora"));
  const std::string version = card["version"];
  EXPECT_EQ(text("style@" + version), adapted);
  EXPECT_EQ(text("llama:style@" + version.substr(0, 8)), adapted);
  for (const std::string& unknown :
       {std::string("nobody"), std::string("llama:nobody"), "style@0" + version.substr(0, 20),
        "style@" + version.substr(0, 7), std::string("style@"), std::string("other:style"),
        std::string("llama:")}) {
    const json error =
        Post("/v1/completions", Completion({{"model", unknown}}), 404)["error"];
    EXPECT_EQ(error["code"], "model_not_found") << unknown;
    EXPECT_EQ(error["type"], "not_found_error");
  }
}

TEST_F(OpenAiTest, AdaptersWithWeightsAreSummed) {
  Serve();
  ASSERT_TRUE(Load("plain", "lora").ok());
  const json sum = {{{"id", "plain"}, {"weight", 0.5}}};
  const json base = Post("/v1/completions", Completion())["choices"][0]["text"];
  EXPECT_NE(Post("/v1/completions", Completion({{"adapters", sum}}))["choices"][0]["text"], base);
  Post("/v1/completions", Completion({{"adapters", sum}, {"model", "plain"}}), 400);
  ASSERT_TRUE(Load("scaled", "rslora").ok());
  const auto digits = [&](const std::string& name) {
    return client_->Get("/v1/models/" + name).json()["version"].get<std::string>().substr(0, 16);
  };
  const json two = {{{"id", "plain"}, {"weight", 0.5}}, {{"id", "scaled"}, {"weight", 0.25}}};
  EXPECT_EQ(Post("/v1/completions", Completion({{"adapters", two}}))["system_fingerprint"],
            digits("plain") + "*0.5+" + digits("scaled") + "*0.25");
  // The sum's last request is gone, and so is its hold on what it was made of.
  grpc::ClientContext context;
  v1::UnloadAdapterRequest unload;
  unload.set_name("plain");
  unload.set_drain_ms(2000);
  v1::UnloadAdapterResponse unloaded;
  EXPECT_TRUE(adapters().UnloadAdapter(&context, unload, &unloaded).ok());
  EXPECT_GT(unloaded.host_bytes_freed(), 0);
  ASSERT_TRUE(Load("plain", "lora").ok());
  Post("/v1/completions", Completion({{"adapters", {{{"id", "nobody"}}}}}), 404);
  Post("/v1/completions", Completion({{"adapters", {{{"id", "plain"}, {"mass", 1}}}}}), 400);
  for (const double weight : {1000.5, -1e30, 1e39}) {
    const json error = Post("/v1/completions",
                            Completion({{"adapters", {{{"id", "plain"}, {"weight", weight}}}}}), 400);
    EXPECT_THAT(error["error"]["message"].get<std::string>(),
                HasSubstr("between -1000 and 1000"));
  }
}

TEST_F(OpenAiTest, AStreamAddsUpToTheWholeAnswer) {
  Serve();
  for (const bool chat : {false, true}) {
    const std::string path = chat ? "/v1/chat/completions" : "/v1/completions";
    json body = chat ? Chat() : Completion();
    body["skip_prefix_cache"] = true;  // the same usage twice
    const json whole = Post(path, body);
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}};
    const HttpResult result = client_->Post(path, body.dump());
    ASSERT_EQ(result.status, 200);
    EXPECT_THAT(result.head, HasSubstr("text/event-stream"));
    std::vector<std::string> events = result.events();
    ASSERT_GE(events.size(), 3);
    EXPECT_EQ(events.back(), "[DONE]");
    events.pop_back();
    const json usage = json::parse(events.back());
    EXPECT_THAT(usage["choices"], SizeIs(0));
    EXPECT_EQ(usage["usage"], whole["usage"]);
    events.pop_back();
    std::string text;
    for (const std::string& event : events) {
      const json choice = json::parse(event)["choices"][0];
      text += chat ? choice["delta"].value("content", "") : choice["text"].get<std::string>();
    }
    EXPECT_EQ(text, chat ? whole["choices"][0]["message"]["content"] : whole["choices"][0]["text"]);
    const json last = json::parse(events.back())["choices"][0];
    EXPECT_EQ(last["finish_reason"], "length");
    if (chat) {
      EXPECT_EQ(json::parse(events[0])["choices"][0]["delta"]["role"], "assistant");
    }
  }
}

TEST_F(OpenAiTest, ATokenIsSentBeforeTheNextIsMade) {
  Serve();
  Script(Encode("a b c d e f g h"));
  Hold();
  client_->SendPost("/v1/completions", Completion({{"stream", true}}).dump());
  Allow(1);
  char byte;
  EXPECT_EQ(recv(client_->fd(), &byte, 1, MSG_PEEK), 1) << "nothing came after one step";
  Release();
  EXPECT_EQ(client_->Receive().events().back(), "[DONE]");
}

TEST_F(OpenAiTest, StopsEndTheText) {
  Serve();
  Script(Encode("one two STOP never"));
  const json more = {{"stop", " STOP"}, {"max_tokens", 100}};
  json choice = Post("/v1/completions", Completion(more))["choices"][0];
  EXPECT_EQ(choice["text"], "one two");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_EQ(choice["stop_reason"], " STOP");
  json with = more;
  with["include_stop_str_in_output"] = true;
  with["stop"] = {"nothing", " STOP"};
  EXPECT_EQ(Post("/v1/completions", Completion(with))["choices"][0]["text"], "one two STOP");
  Script({100, 101, 2});
  choice = Post("/v1/completions", Completion({{"stop_token_ids", {101}}}))["choices"][0];
  EXPECT_EQ(choice["stop_reason"], 101);
  choice = Post("/v1/completions", Completion({{"ignore_eos", false}}))["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_EQ(choice["stop_reason"], nullptr);
}

TEST_F(OpenAiTest, SeveralPromptsAndChoicesAreNumberedInOrder) {
  Serve();
  const json prompt = {"hello", "good bye"};
  const json both =
      Post("/v1/completions", Completion({{"prompt", prompt}, {"n", 2}, {"temperature", 1}}));
  ASSERT_THAT(both["choices"], SizeIs(4));
  for (int i = 0; i < 4; ++i) EXPECT_EQ(both["choices"][i]["index"], i);
  // Choice i is the answer with the seed + i.
  const json second = Post(
      "/v1/completions", Completion({{"prompt", "good bye"}, {"seed", 2}, {"temperature", 1}}));
  EXPECT_EQ(both["choices"][3]["text"], second["choices"][0]["text"]);
  EXPECT_NE(both["choices"][2]["text"], both["choices"][3]["text"]);
  EXPECT_EQ(both["usage"]["completion_tokens"], 32);
  EXPECT_EQ(both["usage"]["prompt_tokens"], Encode("hello").size() + Encode("good bye").size());
}

TEST_F(OpenAiTest, BestOfGivesTheLikeliest) {
  Serve();
  const json more = {{"n", 4}, {"temperature", 1}, {"logprobs", 0}, {"max_tokens", 6}};
  const json all = Post("/v1/completions", Completion(more));
  const auto total = [](const json& choice) {
    double sum = 0;
    for (const json& logprob : choice["logprobs"]["token_logprobs"]) sum += logprob.get<double>();
    return sum;
  };
  std::vector<std::pair<double, std::string>> ranked;
  for (const json& choice : all["choices"]) ranked.emplace_back(-total(choice), choice["text"]);
  std::sort(ranked.begin(), ranked.end());
  json best = Completion(more);
  best["n"] = 2;
  best["best_of"] = 4;
  best.erase("logprobs");
  const json answer = Post("/v1/completions", best);
  ASSERT_THAT(answer["choices"], SizeIs(2));
  EXPECT_EQ(answer["choices"][0]["text"], ranked[0].second);
  EXPECT_EQ(answer["choices"][1]["text"], ranked[1].second);
  EXPECT_EQ(answer["choices"][0]["logprobs"], nullptr);
  EXPECT_EQ(answer["usage"]["completion_tokens"], 24) << "every candidate was computed";
}

TEST_F(OpenAiTest, LogprobsEchoAndTokenIds) {
  Serve();
  const std::vector<int32_t> prompt = Encode("hello");
  json answer = Post("/v1/completions",
                     Completion({{"prompt", prompt}, {"echo", true}, {"logprobs", 0},
                                 {"max_tokens", 3}, {"return_tokens_as_token_ids", true}}));
  const json& logprobs = answer["choices"][0]["logprobs"];
  ASSERT_THAT(logprobs["tokens"], SizeIs(prompt.size() + 3));
  EXPECT_EQ(logprobs["tokens"][0], "token_id:" + std::to_string(prompt[0]));
  EXPECT_EQ(logprobs["token_logprobs"][0], nullptr);
  EXPECT_LT(logprobs["token_logprobs"][1], 0);
  EXPECT_EQ(answer["choices"][0]["text"].get<std::string>().rfind("hello", 0), 0u);

  answer = Post("/v1/chat/completions", Chat({{"logprobs", true}, {"max_tokens", 2},
                                              {"prompt_logprobs", 0}}));
  const json& content = answer["choices"][0]["logprobs"]["content"];
  ASSERT_THAT(content, SizeIs(2));
  EXPECT_TRUE(content[0]["bytes"].is_array());
  EXPECT_LE(content[0]["logprob"], 0);
  EXPECT_EQ(answer["choices"][0]["prompt_logprobs"][0], nullptr);
  EXPECT_THAT(answer["choices"][0]["prompt_logprobs"],
              SizeIs(answer["usage"]["prompt_tokens"].get<int>()));
}

TEST_F(OpenAiTest, TokenizeIsUndoneByDetokenize) {
  Serve();
  const json tokens = Post("/tokenize", {{"prompt", "Grüße"}, {"add_special_tokens", false}});
  EXPECT_EQ(tokens["tokens"], Encode("Grüße"));
  EXPECT_EQ(tokens["count"], Encode("Grüße").size());
  EXPECT_EQ(Post("/detokenize", {{"tokens", tokens["tokens"]}})["prompt"], "Grüße");
  const json chat = Post("/tokenize", {{"messages", {{{"role", "user"}, {"content", "hi"}}}}});
  EXPECT_EQ(Post("/v1/chat/completions", Chat())["usage"]["prompt_tokens"], chat["count"]);
  EXPECT_EQ(client_->Get("/version").json()["version"], LORIKEET_VERSION);
}

TEST_F(OpenAiTest, AdaptersAreLoadedAndUnloadedAsOtherServersDo) {
  Serve();
  const json load = {{"lora_name", "extra"}, {"lora_path", "lora"}};
  const HttpResult loaded = client_->Post("/v1/load_lora_adapter", load.dump());
  EXPECT_EQ(loaded.status, 200);
  EXPECT_EQ(loaded.body, "Success: LoRA adapter 'extra' added successfully.");
  Post("/v1/completions", Completion({{"model", "extra"}}));
  Post("/v1/load_lora_adapter", {{"lora_name", "extra"}, {"lora_path", "dora"}}, 400);
  Post("/v1/load_lora_adapter", {{"lora_name", "out"}, {"lora_path", "/etc"}}, 403);
  Post("/v1/load_lora_adapter", {{"lora_name", "gone"}, {"lora_path", "not_there"}}, 404);
  EXPECT_EQ(Post("/v1/load_lora_adapter", {{"lora_path", "lora"}}, 400)["error"]["param"],
            "lora_name");
  EXPECT_EQ(client_->Post("/v1/unload_lora_adapter", R"({"lora_name": "extra"})").body,
            "Success: LoRA adapter 'extra' removed successfully.");
  Post("/v1/completions", Completion({{"model", "extra"}}), 404);
  Post("/v1/unload_lora_adapter", {{"lora_name", "extra"}}, 404);

  json answer = Post("/load_lora_adapter", load);
  EXPECT_EQ(answer["success"], true);
  EXPECT_THAT(answer["loaded_adapters"], SizeIs(2));
  EXPECT_THAT(answer["loaded_adapters"]["extra"].get<std::string>(), HasSubstr("lora"));
  answer = Post("/unload_lora_adapter", {{"lora_name", "extra"}});
  EXPECT_THAT(answer["loaded_adapters"], SizeIs(1));
  answer = Post("/unload_lora_adapter", {{"lora_name", "extra"}}, 404);
  EXPECT_EQ(answer["success"], false);
  EXPECT_THAT(answer["error_message"].get<std::string>(), HasSubstr("extra"));
}

struct BadField {
  std::string body;  // members that replace the good ones
  std::vector<std::string> parts;
  std::string param;
};

TEST_F(OpenAiTest, WhatIsNotHonouredIsNamed) {
  Serve();
  const BadField cases[] = {
      {R"({"frobnicate": 1})", {"frobnicate", "not supported"}, "frobnicate"},
      {R"({"suffix": "x"})", {"suffix"}, "suffix"},
      {R"({"model": null})", {"model", "missing"}, "model"},
      {R"({"prompt": null})", {"prompt", "missing"}, "prompt"},
      {R"({"prompt": ""})", {"prompt", "empty"}, "prompt"},
      {R"({"prompt": [1, 999]})", {"prompt[1]", "999", "320"}, "prompt[1]"},
      {R"({"prompt": {"a": 1}})", {"prompt"}, "prompt"},
      {R"({"max_tokens": 0})", {"max_tokens", "0", "1"}, "max_tokens"},
      {R"({"max_tokens": 1.5})", {"max_tokens", "1.5", "whole"}, "max_tokens"},
      {R"({"max_tokens": 99999999999})", {"max_tokens", "99999999999"}, "max_tokens"},
      {R"({"temperature": "hot"})", {"temperature", "hot", "number"}, "temperature"},
      {R"({"temperature": -1})", {"temperature", "-1"}, "temperature"},
      {R"({"top_p": 2})", {"top_p", "2", "1"}, "top_p"},
      {R"({"n": 0})", {"n", "0", "64"}, "n"},
      {R"({"n": 3, "best_of": 2})", {"best_of", "2", "3"}, "best_of"},
      {R"({"best_of": 2, "stream": true})", {"best_of", "stream"}, "best_of"},
      {R"({"logprobs": 21})", {"logprobs", "21", "20"}, "logprobs"},
      {R"({"stop": [""]})", {"stop[0]", "0 bytes"}, "stop[0]"},
      {R"({"stop": ["a", 5]})", {"stop[1]", "5", "string"}, "stop[1]"},
      {R"({"stream": 1})", {"stream", "true or false"}, "stream"},
      {R"({"stream_options": {}})", {"stream_options", "stream"}, "stream_options"},
      {R"({"stream": true, "stream_options": {"x": 1}})", {"stream_options.x"},
       "stream_options.x"},
      {R"({"skip_special_tokens": false})", {"skip_special_tokens"}, "skip_special_tokens"},
  };
  for (const BadField& bad : cases) {
    const json error =
        Post("/v1/completions", Completion(json::parse(bad.body)), 400)["error"];
    EXPECT_EQ(error["type"], "invalid_request_error") << bad.body;
    EXPECT_EQ(error["param"], bad.param) << bad.body;
    for (const std::string& part : bad.parts) {
      EXPECT_THAT(error["message"].get<std::string>(), HasSubstr(part)) << bad.body;
    }
  }
  const std::string chats[] = {R"({"messages": []})", R"({"messages": [{"role": "user"}]})",
                               R"({"messages": [{"content": "x"}]})",
                               R"({"messages": [{"role": "user", "content": [{"type": "image_url",
                                   "image_url": {"url": "x"}}]}]})",
                               R"({"messages": [{"role": "tool", "content": "x",
                                   "tool_call_id": 7}]})",
                               R"({"top_logprobs": 2})", R"({"audio": {}})"};
  for (const std::string& chat : chats) {
    Post("/v1/chat/completions", Chat(json::parse(chat)), 400);
  }
  EXPECT_EQ(Post("/v1/chat/completions", Chat({{"max_completion_tokens", 0}}), 400)["error"]["param"],
            "max_completion_tokens");
  const BadField calls[] = {
      {R"({})", {"missing"}, "messages[0].tool_calls[0].function"},
      {R"({"function": {"name": "f"}})", {"missing"}, "messages[0].tool_calls[0].function.arguments"},
      {R"({"function": {"arguments": "{}"}})", {"missing"},
       "messages[0].tool_calls[0].function.name"},
      {R"({"function": {"name": "f", "arguments": "{"}})", {},
       "messages[0].tool_calls[0].function.arguments"},
      {R"({"type": "custom", "function": {"name": "f", "arguments": "{}"}})", {"function"},
       "messages[0].tool_calls[0].type"},
  };
  for (const BadField& bad : calls) {
    const json message = {{"role", "assistant"}, {"tool_calls", json::array({json::parse(bad.body)})}};
    const json body = {{"model", "llama"}, {"messages", json::array({message})}};
    const json error = Post("/v1/chat/completions", body, 400)["error"];
    EXPECT_EQ(error["param"], bad.param) << error;
    for (const std::string& part : bad.parts) {
      EXPECT_THAT(error["message"].get<std::string>(), HasSubstr(part)) << bad.body;
    }
  }
  EXPECT_EQ(Post("/tokenize", json::object(), 400)["error"]["param"], "prompt");
  EXPECT_EQ(Post("/detokenize", json::object(), 400)["error"]["param"], "tokens");
  EXPECT_EQ(Metric("lorikeet_generated_tokens_total"), 0);
}

TEST_F(OpenAiTest, BodiesThatAreNoJsonObjectAreRefused) {
  Serve();
  const std::string deep = std::string(100, '[') + std::string(100, ']');
  std::string wide = "{";
  for (int i = 0; i < 5000; ++i) wide += "\"k" + std::to_string(i) + "\":1,";
  const std::string bodies[] = {"", "{", "[]", "nul", "{\"model\":\"a\",\"model\":\"b\"}",
                                "{\"x\":" + deep + "}", wide + "\"z\":1}", "{\"model\":\"\xff\"}"};
  for (const std::string& body : bodies) {
    const HttpResult result = client_->Post("/v1/completions", body);
    EXPECT_EQ(result.status, 400) << body.substr(0, 40);
    EXPECT_EQ(result.json()["error"]["type"], "invalid_request_error");
  }
}

TEST_F(OpenAiTest, UnknownPathsAndMethodsSayWhatThereIs) {
  Serve();
  EXPECT_EQ(client_->Get("/v1/nothing").status, 404);
  const HttpResult wrong = client_->Get("/v1/completions");
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(HttpClient::Header(wrong.head, "Allow"), "POST");
}

TEST_F(OpenAiTest, WhatFailsBeforeTheFirstTokenHasAStatus) {
  Serve();
  Fail(absl::InternalError("out of magic smoke"));
  const json error = Post("/v1/completions", Completion({{"stream", true}}), 503)["error"];
  EXPECT_THAT(error["message"].get<std::string>(), HasSubstr("magic smoke"));
}

TEST_F(OpenAiTest, AFullQueueIs429) {
  config_.limits.max_running_requests = 1;
  config_.limits.max_queued_requests = 0;
  Serve();
  Hold();
  HttpClient first(service_->http_port());
  first.SendPost("/v1/completions", Completion().dump());
  WaitFor([&] { return Metric("lorikeet_running_requests") == 1; });
  EXPECT_EQ(Post("/v1/completions", Completion(), 429)["error"]["type"], "rate_limit_error");
  Release();
  EXPECT_EQ(first.Receive().status, 200);
}

}  // namespace
}  // namespace lorikeet
