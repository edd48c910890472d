// AdapterService over HTTP: the same answers as over gRPC, and what is refused.
#include <gmock/gmock.h>

#include <filesystem>
#include <fstream>

#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

class RestTest : public ServiceTest {
 protected:
  json Ask(const std::string& verb, const std::string& path, const json& body = nullptr,
           int status = 200) {
    HttpClient client(service_->http_port());
    const std::string text = body.is_null() ? "" : body.dump();
    client.Send(absl::StrCat(verb, " ", path, " HTTP/1.1\r\nHost: test\r\nContent-Length: ",
                             text.size(), "\r\n\r\n", text));
    const HttpResult result = client.Receive();
    EXPECT_EQ(result.status, status) << verb << " " << path << ": " << result.body;
    return result.json();
  }
  std::string Refused(const std::string& verb, const std::string& path, const json& body,
                      int status = 400) {
    return Ask(verb, path, body, status)["error"]["message"].get<std::string>();
  }
  std::vector<std::string> Names(const std::string& query, std::string* next = nullptr) {
    const json page = Ask("GET", "/v1/adapters" + query);
    if (next != nullptr) *next = page["next_page_token"];
    std::vector<std::string> names;
    for (const json& adapter : page["adapters"]) names.push_back(adapter["name"]);
    return names;
  }
};

// Keys that PEFT may have come to know and this server not are named to whoever loads.
TEST_F(RestTest, ALoadNamesWhatItIgnores) {
  const testing::TempDir root;
  for (const char* golden : {"lora", "adalora"}) {
    const std::filesystem::path to = root.path() / golden;
    std::filesystem::copy(std::filesystem::path("tests/golden/variants") / golden, to);
    json config = json::parse(std::ifstream(to / "adapter_config.json"));
    config["use_zeta"] = true;
    config["eta"] = {{"of", 3}};
    config["not_set"] = nullptr;
    std::ofstream(to / "adapter_config.json") << config;
  }
  config_.adapter_roots.push_back(root.path().string());
  Start();
  const std::vector<std::string> expected = {
      "adapter_config.json: unknown key 'eta' is ignored",
      "adapter_config.json: unknown key 'use_zeta' is ignored"};
  const json loaded =
      Ask("POST", "/v1/adapters", {{"name", "a"}, {"path", (root.path() / "lora").string()}});
  EXPECT_EQ(loaded["adapter"]["warnings"].get<std::vector<std::string>>(), expected);
  v1::LoadAdapterRequest request;
  request.set_name("b");
  request.set_path((root.path() / "adalora").string());
  grpc::ClientContext context;
  v1::LoadAdapterResponse reply;
  ASSERT_TRUE(adapters().LoadAdapter(&context, request, &reply).ok());
  EXPECT_THAT(reply.adapter().warnings(), ::testing::ElementsAreArray(expected));
}

TEST_F(RestTest, AnAdaptersWholeLife) {
  Start();
  const json loaded = Ask("POST", "/v1/adapters", {{"name", "a/b:1"}, {"path", "lora"}});
  const json& adapter = loaded["adapter"];
  EXPECT_EQ(adapter["name"], "a/b:1");
  EXPECT_EQ(adapter["variant"], "lora");
  EXPECT_THAT(adapter["path"].get<std::string>(), HasSubstr("lora"));
  EXPECT_TRUE(adapter["in_host"].get<bool>());
  EXPECT_GT(adapter["bytes"].get<int64_t>(), 0);
  EXPECT_THAT(adapter["targets"], SizeIs(1));
  v1::GetAdapterRequest request;
  request.set_name("a/b:1");
  grpc::ClientContext context;
  v1::GetAdapterResponse same;
  ASSERT_TRUE(adapters().GetAdapter(&context, request, &same).ok());
  const json got = Ask("GET", "/v1/adapters/a%2Fb%3A1")["adapter"];
  EXPECT_EQ(got["version"], same.adapter().version());
  EXPECT_EQ(got["loaded_at_unix_us"], same.adapter().loaded_at_unix_us());
  EXPECT_TRUE(Ask("POST", "/v1/adapters/a%2fb:1/pin", {{"pinned", true}})["adapter"]["pinned"]);
  EXPECT_FALSE(Ask("POST", "/v1/adapters/a%2fb:1/pin", {{"pinned", false}})["adapter"]["pinned"]);
  EXPECT_EQ(Ask("POST", "/v1/adapters/a%2fb:1/reload")["adapter"]["version"], got["version"]);
  EXPECT_TRUE(Ask("POST", "/v1/adapters/a%2fb:1/prefetch", json::object())["adapter"]["in_host"]);
  const json alias = Ask("POST", "/v1/adapters/other/alias",
                         {{"targets", {{{"target", "a/b:1"}, {"weight", 2}}}}})["adapter"];
  EXPECT_EQ(alias["version"], got["version"]);
  EXPECT_EQ(alias["targets"][0]["weight"], 2);
  EXPECT_EQ(Ask("GET", "/v1/models/other")["version"], got["version"]);
  EXPECT_EQ(Ask("GET", "/v1/models/llama")["parent"], nullptr);
  EXPECT_EQ(Ask("DELETE", "/v1/adapters/other")["host_bytes_freed"], 0);
  EXPECT_GT(Ask("DELETE", "/v1/adapters/a%2Fb%3A1?drain_ms=0")["host_bytes_freed"].get<int64_t>(),
            0);
  Ask("GET", "/v1/adapters/other", nullptr, 404);
  Ask("GET", "/v1/models/other", nullptr, 404);
}

TEST_F(RestTest, AListIsFilteredAndComesInPages) {
  Start();
  for (const char* name : {"a1", "a2", "b1"}) ASSERT_TRUE(Load(name, "lora").ok());
  EXPECT_THAT(Names(""), ElementsAre("a1", "a2", "b1"));
  EXPECT_THAT(Names("?name_prefix=a&in_host_only=true"), ElementsAre("a1", "a2"));
  std::string next;
  EXPECT_THAT(Names("?page_size=2", &next), ElementsAre("a1", "a2"));
  EXPECT_THAT(Names("?page_size=2&page_token=" + next, &next), ElementsAre("b1"));
  EXPECT_EQ(next, "");
}

TEST_F(RestTest, WhatIsWrongIsNamed) {
  Start();
  ASSERT_TRUE(Load("x", "lora").ok());
  EXPECT_THAT(Refused("POST", "/v1/adapters", {{"nme", "x"}}), HasSubstr("nme"));
  EXPECT_THAT(Refused("POST", "/v1/adapters", {{"name", 7}}), HasSubstr("name: 7 is not a string"));
  EXPECT_THAT(Refused("POST", "/v1/adapters/x/pin", {{"name", "x"}}), HasSubstr("name"));
  EXPECT_THAT(Refused("POST", "/v1/adapters/x/alias", {{"targets", {{{"mass", 1}}}}}),
              HasSubstr("targets[0].mass"));
  EXPECT_THAT(Refused("GET", "/v1/adapters?page_size=9999", nullptr), HasSubstr("page_size"));
  EXPECT_THAT(Refused("GET", "/v1/adapters?page_size=x", nullptr), HasSubstr("page_size"));
  EXPECT_THAT(Refused("GET", "/v1/adapters?size=1", nullptr), HasSubstr("size"));
  EXPECT_THAT(Refused("GET", "/v1/adapters?in_host_only=1", nullptr), HasSubstr("true or false"));
  EXPECT_THAT(Refused("DELETE", "/v1/adapters/x?drain_ms=%zz", nullptr), HasSubstr("%"));
  EXPECT_THAT(Refused("DELETE", "/v1/adapters/x?drain_ms=-1", nullptr), HasSubstr("-1 is not in [0, "));
  EXPECT_THAT(Refused("POST", "/v1/adapters", {{"name", "y"}, {"path", "/etc"}}, 403),
              HasSubstr("/etc"));
  EXPECT_THAT(Refused("POST", "/v1/adapters", {{"name", "x"}, {"path", "dora"}}, 409),
              HasSubstr("x"));
  Ask("POST", "/v1/adapters/x", nullptr, 405);
  Ask("GET", "/v1/adapters/x/y", nullptr, 404);
  Ask("GET", "/v1/adapters/%2", nullptr, 404);
}

TEST_F(RestTest, Plans) {
  Start();
  const json plan = Ask("POST", "/v1/plan_capacity", {{"rank", 8}, {"linears", {"q_proj"}}});
  EXPECT_GT(plan["adapter_bytes"].get<int64_t>(), 0);
  EXPECT_EQ(plan["host_adapters"], -1);
  EXPECT_THAT(Refused("POST", "/v1/plan_capacity", {{"rank", 0}}), HasSubstr("rank: 0"));
}

}  // namespace
}  // namespace lorikeet
