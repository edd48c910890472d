// Keys over both ports: who may do what, which adapters there are for whom, the audit log.
#include <gmock/gmock.h>

#include "server/auth/keys_file.h"
#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

class AuthTest : public ServiceTest {
 protected:
  void Serve() {
    config_.keys = dir_.Write("keys", keys_).string();
    config_.audit_log = (dir_.path() / "audit").string();
    Start();
    for (const char* name : {"a-one", "b-one"}) {
      ASSERT_EQ(LoadAs(admin_, name, name[0] == 'a' ? "lora" : "dora").error_code(),
                grpc::StatusCode::OK);
    }
  }
  std::string Key(const std::string& id, const std::string& rest) {
    const std::string key = MakeKey(id);
    keys_ += absl::StrCat("- {id: ", id, ", sha256: ", HashKey(key), ", ", rest, "}\n");
    return key;
  }
  template <typename Request, typename Reply>
  grpc::Status Call(grpc::Status (v1::AdapterService::StubInterface::*method)(
                        grpc::ClientContext*, const Request&, Reply*),
                    const std::string& key, const Request& request, Reply* reply) {
    grpc::ClientContext context;
    if (!key.empty()) context.AddMetadata("authorization", "Bearer " + key);
    return (adapters().*method)(&context, request, reply);
  }
  grpc::Status LoadAs(const std::string& key, const std::string& name, const std::string& path) {
    v1::LoadAdapterRequest request;
    request.set_name(name);
    request.set_path(path);
    v1::LoadAdapterResponse reply;
    return Call(&v1::AdapterService::StubInterface::LoadAdapter, key, request, &reply);
  }
  std::vector<std::string> ListAs(const std::string& key) {
    v1::ListAdaptersResponse reply;
    EXPECT_TRUE(
        Call(&v1::AdapterService::StubInterface::ListAdapters, key, v1::ListAdaptersRequest(),
             &reply).ok());
    std::vector<std::string> names;
    for (const v1::Adapter& adapter : reply.adapters()) names.push_back(adapter.name());
    return names;
  }
  grpc::Status GenerateAs(const std::string& key, const std::string& adapter) {
    v1::GenerateRequest request = TextRequest("hello", 2);
    request.set_adapter(adapter);
    grpc::ClientContext context;
    if (!key.empty()) context.AddMetadata("authorization", "Bearer " + key);
    v1::GenerateResponse response;
    return generation().GenerateUnary(&context, request, &response);
  }
  HttpResult Http(const std::string& key, const std::string& path, const json& body = nullptr) {
    HttpClient client(service_->http_port());
    if (!key.empty()) client.set_headers("Authorization: Bearer " + key + "\r\n");
    return body.is_null() ? client.Get(path) : client.Post(path, body.dump());
  }
  HttpResult Complete(const std::string& key, const std::string& model) {
    return Http(key, "/v1/completions",
                {{"model", model}, {"prompt", "hi"}, {"max_tokens", 2}, {"ignore_eos", true}});
  }

  testing::TempDir dir_;
  std::string keys_;
  const std::string admin_ =
      Key("admin", "roles: [generate, adapters:read, adapters:write, metrics]");
  const std::string a_ =
      Key("a", "roles: [generate, adapters:read, adapters:write], adapters: [a-*]");
  const std::string user_ = Key("user", "roles: [generate], tenant: u");
};

// The answer comes although nothing of the body does.
TEST_F(AuthTest, ABodyIsReadForWhoMaySendIt) {
  Serve();
  const auto announce = [&](const std::string& key, const std::string& path) {
    HttpClient client(service_->http_port());
    client.Send(absl::StrCat("POST ", path, " HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer ",
                             key, "\r\nContent-Length: 16000000\r\n",
                             "Expect: 100-continue\r\n\r\n"));
    return client.Receive().status;
  };
  EXPECT_EQ(announce(user_, "/v1/completions"), 100);
  EXPECT_EQ(announce(MakeKey("user"), "/v1/completions"), 401);
  EXPECT_EQ(announce(user_, "/v1/adapters"), 403);
  EXPECT_EQ(announce(user_, "/nowhere"), 404);
  EXPECT_EQ(announce(user_, "/metrics"), 405);
}

TEST_F(AuthTest, EveryCallNeedsAKeyWithItsRole) {
  Serve();
  EXPECT_EQ(GenerateAs("", "").error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(GenerateAs(MakeKey("user"), "").error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(GenerateAs(user_, "a-one").ok());
  EXPECT_EQ(LoadAs(user_, "x", "lora").error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(LoadAs("", "x", "lora").error_code(), grpc::StatusCode::UNAUTHENTICATED);
  v1::ListAdaptersResponse listed;
  EXPECT_EQ(Call(&v1::AdapterService::StubInterface::ListAdapters, user_,
                 v1::ListAdaptersRequest(), &listed).error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
  {
    grpc::ClientContext context;
    v1::GetModelResponse model;
    EXPECT_EQ(generation().GetModel(&context, {}, &model).error_code(),
              grpc::StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(model.name(), "");
  }
  for (const char* open : {"/health", "/ready", "/version"}) {
    EXPECT_EQ(Http("", open).status, 200) << open;
  }
  EXPECT_EQ(Http("", "/metrics").status, 401);
  EXPECT_EQ(Http(user_, "/metrics").status, 403);
  EXPECT_EQ(Http(admin_, "/metrics").status, 200);
  EXPECT_EQ(Http("", "/v1/models").status, 401);
  EXPECT_EQ(Http(user_, "/v1/models").status, 200);
}

TEST_F(AuthTest, ErrorsHaveOpenAisShape) {
  const std::string slow = Key("slow", "roles: [generate], requests_per_minute: 1");
  Serve();
  const HttpResult unknown = Complete("sk-nobody", "llama");
  EXPECT_EQ(unknown.status, 401);
  EXPECT_EQ(HttpClient::Header(unknown.head, "WWW-Authenticate"), "Bearer");
  EXPECT_EQ(unknown.json()["error"]["code"], "invalid_api_key");
  EXPECT_THAT(unknown.body, Not(HasSubstr("nobody")));
  const HttpResult forbidden = Http(user_, "/v1/unload_lora_adapter", {{"lora_name", "a-one"}});
  EXPECT_EQ(forbidden.status, 403);
  EXPECT_EQ(forbidden.json()["error"]["type"], "permission_error");
  EXPECT_THAT(forbidden.json()["error"]["message"].get<std::string>(),
              HasSubstr("key 'user' does not have the role adapters:write"));
  EXPECT_EQ(Complete(slow, "llama").status, 200);
  const HttpResult limited = Complete(slow, "llama");
  EXPECT_EQ(limited.status, 429);
  EXPECT_EQ(limited.json()["error"]["code"], "rate_limit_exceeded");
  EXPECT_EQ(HttpClient::Header(limited.head, "Retry-After"), "1");
  EXPECT_EQ(GenerateAs(slow, "").error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(AuthTest, WhereAdaptersLieIsForWhoMayReadOfThem) {
  Serve();
  const std::string path = Http(admin_, "/v1/models/a-one").json()["root"];
  EXPECT_THAT(path, HasSubstr("/lora"));
  EXPECT_EQ(Http(a_, "/v1/models").json()["data"][1]["root"], path);
  EXPECT_EQ(Http(user_, "/v1/models").json()["data"][1]["root"], "a-one");
  EXPECT_EQ(Http(user_, "/v1/models/b-one").json()["root"], "b-one");
}

TEST_F(AuthTest, WhatAKeyMayNotUseIsNotThere) {
  Serve();
  EXPECT_THAT(ListAs(admin_), ElementsAre("a-one", "b-one"));
  EXPECT_THAT(ListAs(a_), ElementsAre("a-one"));
  EXPECT_TRUE(GenerateAs(a_, "a-one").ok());
  // A hidden adapter and one that does not exist are answered alike.
  const grpc::Status hidden = GenerateAs(a_, "b-one"), absent = GenerateAs(a_, "b-two");
  EXPECT_EQ(hidden.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(hidden.error_message(), "adapter 'b-one' is not loaded");
  EXPECT_EQ(absent.error_message(), "adapter 'b-two' is not loaded");
  EXPECT_EQ(Complete(a_, "a-one").status, 200);
  EXPECT_EQ(Complete(a_, "llama").status, 200);
  for (const char* model : {"b-one", "llama:b-one", "b-one@00000000"}) {
    EXPECT_EQ(Complete(a_, model).status, 404) << model;
  }
  const json mixed = {{"model", "llama"}, {"prompt", "x"}, {"adapters", {{{"id", "a-one"}}, {{"id", "b-one"}}}}};
  EXPECT_EQ(Http(a_, "/v1/completions", mixed).status, 404);
  EXPECT_EQ(Http(a_, "/tokenize", {{"model", "b-one"}, {"prompt", "x"}}).status, 404);
  EXPECT_THAT(Http(a_, "/v1/models").body, Not(HasSubstr("b-one")));
  const HttpResult loaded =
      Http(a_, "/load_lora_adapter", {{"lora_name", "a-two"}, {"lora_path", "rslora"}});
  EXPECT_EQ(loaded.status, 200) << loaded.body;
  EXPECT_THAT(loaded.body, HasSubstr("a-two"));
  EXPECT_THAT(loaded.body, Not(HasSubstr("b-one")));
}

TEST_F(AuthTest, AdminReachesOnlyWhatTheKeySees) {
  Serve();
  using Stub = v1::AdapterService::StubInterface;
  const auto code = [](const grpc::Status& status) { return status.error_code(); };
  v1::GetAdapterRequest get;
  get.set_name("b-one");
  v1::GetAdapterResponse got;
  EXPECT_EQ(code(Call(&Stub::GetAdapter, a_, get, &got)), grpc::StatusCode::NOT_FOUND);
  ASSERT_TRUE(Call(&Stub::GetAdapter, admin_, get, &got).ok());
  const std::string hidden_version = got.adapter().version();
  v1::PinAdapterRequest pin;
  pin.set_name("b-one");
  v1::PinAdapterResponse pinned;
  EXPECT_EQ(code(Call(&Stub::PinAdapter, a_, pin, &pinned)), grpc::StatusCode::NOT_FOUND);
  v1::PrefetchAdapterRequest prefetch;
  prefetch.set_name("b-one");
  v1::PrefetchAdapterResponse prefetched;
  EXPECT_EQ(code(Call(&Stub::PrefetchAdapter, a_, prefetch, &prefetched)),
            grpc::StatusCode::NOT_FOUND);
  v1::ReloadAdapterRequest reload;
  reload.set_name("b-one");
  v1::LoadAdapterResponse reloaded;
  EXPECT_EQ(code(Call(&Stub::ReloadAdapter, a_, reload, &reloaded)), grpc::StatusCode::NOT_FOUND);
  v1::UnloadAdapterRequest unload;
  unload.set_name("b-one");
  v1::UnloadAdapterResponse unloaded;
  EXPECT_EQ(code(Call(&Stub::UnloadAdapter, a_, unload, &unloaded)), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(code(LoadAs(a_, "b-two", "lora")), grpc::StatusCode::PERMISSION_DENIED);
  const auto alias = [&](const std::string& name, const std::string& target) {
    v1::SetAliasRequest request;
    request.set_alias(name);
    v1::AdapterTarget* added = request.add_targets();
    added->set_target(target);
    added->set_weight(1);
    v1::SetAliasResponse reply;
    return code(Call(&Stub::SetAlias, a_, request, &reply));
  };
  EXPECT_EQ(alias("b-x", "a-one"), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(alias("a-x", "b-one"), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(alias("a-x", hidden_version), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(alias("a-x", "a-one"), grpc::StatusCode::OK);
  EXPECT_THAT(ListAs(admin_), ElementsAre("a-one", "a-x", "b-one"));
}

// The log is of all tenants.
TEST_F(AuthTest, TheLogsLevelIsForWhoSeesEveryAdapter) {
  Serve();
  const json level = {{"level", "warning"}};
  const HttpResult refused = Http(a_, "/log_level", level);
  EXPECT_EQ(refused.status, 403);
  EXPECT_THAT(refused.body, HasSubstr("key 'a'"));
  EXPECT_EQ(Http(a_, "/log_level").json()["level"], "info");
  EXPECT_EQ(Http(admin_, "/log_level", level).status, 200);
  EXPECT_EQ(Http(admin_, "/log_level", {{"level", "info"}}).status, 200);
}

TEST_F(AuthTest, AWatcherSeesItsOwnAdapters) {
  Serve();
  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer " + a_);
  const auto reader = adapters().WatchAdapters(&context, {});
  reader->WaitForInitialMetadata();
  ASSERT_TRUE(LoadAs(admin_, "b-two", "rslora").ok());
  ASSERT_TRUE(LoadAs(admin_, "a-two", "rslora").ok());
  v1::AdapterEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.name(), "a-two");
  context.TryCancel();
}

TEST_F(AuthTest, TheKeysFileIsReadAgainWhileServing) {
  Serve();
  EXPECT_TRUE(GenerateAs(user_, "").ok());
  const std::string fresh = MakeKey("fresh");
  const auto keys = [&](const std::string& text) { dir_.Write("keys", text); };
  keys(absl::StrCat("- {id: fresh, sha256: ", HashKey(fresh), ", roles: [generate]}\n"));
  WaitFor([&] { return GenerateAs(fresh, "").ok(); });
  EXPECT_EQ(GenerateAs(user_, "").error_code(), grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(AuthTest, AnUploadBeyondItsTenantsDiskIsRefusedByItsHeader) {
  config_.adapter_dir = (dir_.path() / "kept").string();
  config_.tenant_adapter_disk_mib = 1;
  Serve();
  const auto announce = [&](int64_t bytes) {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer " + a_);
    v1::LoadAdapterResponse reply;
    const auto writer = adapters().UploadAdapter(&context, &reply);
    v1::UploadAdapterRequest part;
    part.mutable_header()->set_name("a-sent");
    part.mutable_header()->set_weights_bytes(bytes);
    part.mutable_header()->set_weights_sha256(std::string(64, '0'));
    part.mutable_header()->set_config_sha256(std::string(64, '0'));
    writer->Write(part);
    writer->WritesDone();
    return writer->Finish();
  };
  const grpc::Status refused = announce((1 << 20) + 1);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.error_message(), AllOf(HasSubstr("1048577"), HasSubstr("1048576")));
  for (int i = 0; i < 2; ++i) {  // an upload that ends early gives back what it took
    EXPECT_EQ(announce(1 << 20).error_code(), grpc::StatusCode::DATA_LOSS) << i;
  }
}

TEST_F(AuthTest, ChangesAreWrittenDown) {
  Serve();
  LoadAs(a_, "b-two", "lora");
  LoadAs(user_, "b-two", "lora");
  Http(user_, "/v1/adapters/a-one/pin", {{"pinned", true}});
  Http(admin_, "/log_level", {{"level", "info"}});
  Http(a_, "/log_level", {{"level", "info"}});
  std::vector<json> lines;
  std::istringstream log(testing::ReadFile(config_.audit_log));
  for (std::string line; std::getline(log, line);) lines.push_back(json::parse(line));
  ASSERT_EQ(lines.size(), 7u);
  EXPECT_EQ(lines[0]["action"], "LoadAdapter");
  EXPECT_EQ(lines[0]["adapter"], "a-one");
  EXPECT_EQ(lines[0]["path"], "lora");
  EXPECT_EQ(lines[0]["outcome"], "OK");
  EXPECT_EQ(lines[0]["key"], "admin");
  EXPECT_THAT(lines[0]["peer"].get<std::string>(), HasSubstr("127.0.0.1"));
  EXPECT_EQ(lines[2]["outcome"], "PERMISSION_DENIED");
  EXPECT_EQ(lines[2]["adapter"], "b-two");
  EXPECT_EQ(lines[3]["action"], "refused");
  EXPECT_EQ(lines[3]["call"], "LoadAdapter");
  EXPECT_EQ(lines[3]["tenant"], "u");
  EXPECT_EQ(lines[4]["action"], "refused");
  EXPECT_EQ(lines[4]["call"], "POST /v1/adapters/{name}/pin");
  EXPECT_EQ(lines[5]["action"], "SetLogLevel");
  EXPECT_EQ(lines[5]["level"], "info");
  EXPECT_EQ(lines[5]["key"], "admin");
  EXPECT_EQ(lines[6]["outcome"], "PERMISSION_DENIED");
  for (const std::string& key : {admin_, a_, user_}) {
    EXPECT_THAT(testing::ReadFile(config_.audit_log), Not(HasSubstr(key)));
  }
}

class OpenTest : public ServiceTest {};

TEST_F(OpenTest, BeyondLoopbackNobodyChangesAdaptersWithoutKeys) {
  config_.host = "0.0.0.0";
  Start();
  const grpc::Status refused = Load("x", "lora");
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_THAT(refused.error_message(), HasSubstr("--keys"));
  HttpClient client(service_->http_port());
  const std::string load = R"({"lora_name": "x", "lora_path": "lora"})";
  EXPECT_EQ(client.Post("/v1/load_lora_adapter", load).status, 403);
  v1::GenerateResponse response;
  EXPECT_TRUE(Unary(TextRequest("hello", 1), &response).ok());
}

TEST_F(OpenTest, PagesOfOthersDoNotChangeAdapters) {
  testing::TempDir dir;
  config_.audit_log = (dir.path() / "audit").string();
  Start();
  const auto load = [&](const std::string& origin, const std::string& host) {
    const std::string body = R"({"lora_name": "x", "lora_path": "lora", "load_inplace": true})";
    HttpClient client(service_->http_port());
    client.Send(absl::StrCat("POST /v1/load_lora_adapter HTTP/1.1\r\nHost: ", host,
                             "\r\nOrigin: ", origin, "\r\nContent-Length: ", body.size(),
                             "\r\n\r\n", body));
    return client.Receive().status;
  };
  for (const char* origin : {"https://example.com", "null", "http://localhost.example.com"}) {
    EXPECT_EQ(load(origin, "localhost:8080"), 403) << origin;
  }
  EXPECT_THAT(testing::ReadFile(config_.audit_log),
              AllOf(HasSubstr("a page of https://example.com"),
                    HasSubstr("POST /v1/load_lora_adapter")));
  // Whoever owns a name may have led it here.
  for (const char* name :
       {"example.com", "example.com:8080", "127.0.0.1.example.com", "localhost.", "[x]"}) {
    EXPECT_EQ(load(absl::StrCat("http://", name), name), 403) << name;
  }
  for (const char* own : {"localhost:8080", "127.0.0.1", "10.0.0.7:8080", "[::1]:8080"}) {
    EXPECT_EQ(load(absl::StrCat("http://", own), own), 200) << own;
  }
  EXPECT_EQ(load("https://example.com", "example.com"), 200);  // a certificate vouches for it
  HttpClient client(service_->http_port());
  client.set_headers("Origin: https://example.com\r\n");
  EXPECT_EQ(client.Get("/v1/models").status, 200);
}

TEST_F(OpenTest, UnlessItIsToldThatAnyoneMay) {
  config_.host = "0.0.0.0";
  config_.open_admin = true;
  Start();
  EXPECT_TRUE(Load("x", "lora").ok());
}

}  // namespace
}  // namespace lorikeet
