// HTTP itself, and clients that are slow, gone or hostile: the server answers or hangs up, and goes
// on.
#include <gmock/gmock.h>

#include <atomic>
#include <fstream>
#include <future>
#include <sstream>
#include <thread>

#include "server/http/http_server.h"
#include "server/http/late_reply.h"
#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"
#include "tests/support/sanitized.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;

constexpr char kStream[] =
    R"({"model":"llama","prompt":"hello","max_tokens":240,"ignore_eos":true,"stream":true})";

int64_t ResidentKiB() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) return std::stol(line.substr(6));
  }
  return 0;
}

class HttpTest : public ServiceTest {
 protected:
  void TearDown() override {
    if (service_ != nullptr) {
      EXPECT_EQ(HttpClient(service_->http_port()).Get("/ready").body, "ready\n")
          << "the server does not go on";
    }
    ServiceTest::TearDown();
  }
};

TEST_F(HttpTest, AConnectionIsKeptAndRequestsBehindOneAnotherAreAnsweredInOrder) {
  Start();
  HttpClient client(service_->http_port());
  EXPECT_EQ(client.Get("/health").body, "ok\n");
  client.Send("GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n"
              "HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nGET /ready HTTP/1.1\r\nHost: x\r\n"
              "Connection: close\r\n\r\n");
  EXPECT_THAT(client.Receive().body, HasSubstr("version"));
  EXPECT_EQ(client.Receive().body, "ok\n");
  // The answer to HEAD has a length and no body: what follows is the next answer.
  const std::string rest = client.Rest();
  EXPECT_THAT(rest, HasSubstr("Content-Length: 3\r\n"));
  EXPECT_EQ(rest.substr(rest.size() - 6), "ready\n");
}

TEST(HttpServerTest, ATargetMayNameItsServer) {
  auto server = HttpServer::Start({"127.0.0.1", 0}, [](HttpRequest request, auto) {
    return std::make_unique<HttpReply>(HttpResponse{
        .body = absl::StrCat(request.host, " ", request.path, " ", request.query)});
  });
  ASSERT_TRUE(server.ok()) << server.status();
  HttpClient client((*server)->port());  // whose header says "test"
  EXPECT_EQ(client.Get("http://a:81/b/c?d=/e").body, "a:81 /b/c d=/e");
  EXPECT_EQ(client.Get("HTTPS://a").body, "a / ");
  EXPECT_EQ(client.Get("http://a?b").body, "a / b");
  EXPECT_EQ(client.Get("/http://a").body, "test /http://a ");
  EXPECT_EQ(client.Get("ftp://a/b").body, "test ftp://a/b ");
}

TEST_F(HttpTest, AnOldClientGetsAStreamUpToTheClose) {
  Start();
  HttpClient client(service_->http_port());
  const std::string body = kStream;
  client.Send(absl::StrCat("POST /v1/completions HTTP/1.0\r\nContent-Length: ", body.size(),
                           "\r\n\r\n", body));
  const HttpResult result = client.Receive();
  EXPECT_EQ(result.status, 200);
  EXPECT_EQ(result.events().back(), "[DONE]");
}

TEST_F(HttpTest, AClientThatAsksFirstMaySend) {
  Start();
  HttpClient client(service_->http_port());
  const std::string body = R"({"prompt":"hi"})";
  client.Send(absl::StrCat("POST /tokenize HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                           "Content-Length: ",
                           body.size(), "\r\n\r\n"));
  EXPECT_EQ(client.Receive().status, 100);
  client.Send(body);
  EXPECT_EQ(client.Receive().status, 200);
}

TEST_F(HttpTest, WhatIsTooLargeIsRefusedBeforeItIsRead) {
  Start();
  HttpClient large(service_->http_port());
  large.Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n");
  HttpResult result = large.Receive();
  EXPECT_EQ(result.status, 413);
  EXPECT_THAT(result.json()["error"]["message"].get<std::string>(), HasSubstr("16777216"));

  HttpClient chunked(service_->http_port());
  chunked.Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
  const std::string chunk = absl::StrCat("100000\r\n", std::string(1 << 20, 'x'), "\r\n");
  int sent = 0;
  while (sent < 1024 && chunked.Send(chunk)) ++sent;  // 1 GiB, if it lets us
  EXPECT_LT(sent, 64);

  HttpClient flood(service_->http_port());
  std::string headers = "GET /health HTTP/1.1\r\n";
  for (int i = 0; i < 10'000; ++i) absl::StrAppend(&headers, "X-", i, ": y\r\n");
  flood.Send(headers);
  EXPECT_EQ(flood.Receive().status, 431);

  const std::string head =
      "POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  const std::string lines[] = {"1;" + std::string(100'000, 'a'), std::string(100'000, '0'),
                               "2\r\n{}\r\n0\r\n" + headers.substr(headers.find('\n') + 1)};
  for (const std::string& endless : lines) {  // a chunk's extension, its size, trailers
    HttpClient client(service_->http_port());
    client.Send(head + endless);
    EXPECT_EQ(client.Receive().status, 431) << endless.substr(0, 10);
  }
}

TEST_F(HttpTest, GarbageIsRefused) {
  Start();
  const std::string garbage[] = {
      "\x16\x03\x01 this is TLS\r\n\r\n",
      "GET\r\n\r\n",
      "GET /health HTTP/9.9\r\n\r\n",
      "GET /health HTTP/1.1\r\nBad Header\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
      "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
      std::string("GET /\0health HTTP/1.1\r\n\r\n", 24),
      "GET /health HTTP/1.1\r\n\r\n",
      "GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
  };
  for (const std::string& bytes : garbage) {
    HttpClient client(service_->http_port());
    client.Send(bytes);
    const HttpResult result = client.Receive();
    EXPECT_GE(result.status, 400) << bytes;
    EXPECT_LT(result.status, 500) << bytes;
    EXPECT_EQ(client.Receive().status, 0) << "the connection goes on after: " << bytes;
  }
  const std::pair<const char*, const char*> bodies[] = {
      {"gzip", ""}, {"identity", ""}, {"gzip, chunked", "2\r\n{}\r\n0\r\n\r\n"}};
  for (const auto& [coding, body] : bodies) {
    HttpClient client(service_->http_port());
    client.Send(absl::StrCat("POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: ", coding,
                             "\r\n\r\n", body, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"));
    EXPECT_EQ(client.Receive().status, 501) << coding;
    EXPECT_EQ(client.Receive().status, 0) << "what follows is no request";
  }
  HttpClient pipelined(service_->http_port());
  pipelined.Send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n\r\n\r\nrubbish rubbish\r\n\r\n");
  EXPECT_EQ(pipelined.Receive().status, 200);
  EXPECT_EQ(pipelined.Receive().status, 400);
}

TEST_F(HttpTest, AClientThatLeavesStopsItsWork) {
  Start();
  Hold();
  HttpClient client(service_->http_port());
  client.SendPost("/v1/completions", kStream);
  WaitFor([&] { return Metric("lorikeet_running_requests") == 1; });
  client.Close();
  WaitFor([&] { return Metric("lorikeet_requests_total{outcome=\"cancelled\"}") == 1; });
  Release();
  WaitFor([&] { return Metric("lorikeet_running_requests") == 0; });
  EXPECT_LE(Metric("lorikeet_generated_tokens_total"), 1) << "more than the held step ran";
}

TEST_F(HttpTest, AReaderThatWaitsGetsEverythingInTheEnd) {
  Start();
  HttpClient client(service_->http_port());
  client.SendPost("/v1/completions", kStream);
  WaitFor([&] { return Metric("lorikeet_generated_tokens_total") == 240; });
  const HttpResult result = client.Receive();
  EXPECT_EQ(result.events().back(), "[DONE]");
}

// Their requests come in after the first answer could not be written.
TEST_F(HttpTest, ClientsThatAskAndLeaveHarmNobody) {
  Start();
  std::string requests;
  for (int i = 0; i < 2000; ++i) requests += "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
  for (int i = 0; i < 100; ++i) {
    HttpClient client(service_->http_port());
    client.Send(requests);
    char first[60];
    EXPECT_GT(read(client.fd(), first, sizeof first), 0);
  }
}

TEST_F(HttpTest, ClientsThatSendAByteAtATimeAreClosedAndTheOthersServed) {
  config_.http_limits.read_s = 1;
  Start();
  std::vector<std::unique_ptr<HttpClient>> slow;
  for (int i = 0; i < 100; ++i) {
    slow.push_back(std::make_unique<HttpClient>(service_->http_port()));
    slow.back()->Send("POST /v1/completions HTTP/1.1\r\nContent-Le");
  }
  EXPECT_EQ(HttpClient(service_->http_port()).Get("/health").status, 200);
  for (const auto& client : slow) EXPECT_EQ(client->Receive().status, 0);
}

TEST_F(HttpTest, AReaderThatNeverReadsIsDroppedAndCostsLittle) {
  config_.http_limits.write_s = 1;
  Start();
  HttpClient client(service_->http_port());
  std::string requests;  // and answers, more than the sockets' buffers hold
  for (int i = 0; i < 200'000; ++i) requests += "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
  const int64_t before_kib = ResidentKiB();
  while (client.Send(requests)) continue;  // until it is dropped
  if (!kSanitized) {
    EXPECT_LT(ResidentKiB() - before_kib, 32 << 10);
  }
}

// The first answer takes a while, and more than is read ahead is there by then.
TEST(HttpServerTest, AnyNumberOfRequestsMayWaitBehindOne) {
  std::promise<std::function<void(HttpResponse)>> first;
  auto server = HttpServer::Start(
      {"127.0.0.1", 0}, [&](HttpRequest request, auto wake) -> std::unique_ptr<HttpAnswer> {
        if (request.path != "/first") {
          return std::make_unique<HttpReply>(HttpResponse{.body = request.path});
        }
        auto late = std::make_unique<LateReply>(wake);
        first.set_value(late->bring());
        return late;
      });
  ASSERT_TRUE(server.ok()) << server.status();
  HttpClient client((*server)->port());
  constexpr int kBehind = 5000;
  std::string requests = "GET /first HTTP/1.1\r\nHost: x\r\n\r\n";
  for (int i = 0; i < kBehind; ++i) requests += "GET /next HTTP/1.1\r\nHost: x\r\n\r\n";
  client.Send(requests);
  const auto bring = first.get_future().get();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // for it to read ahead
  bring({.body = "first"});
  EXPECT_EQ(client.Receive().body, "first");
  for (int i = 0; i < kBehind; ++i) ASSERT_EQ(client.Receive().body, "/next") << i;
}

// However many there are, and however long reading each of them takes.
TEST(HttpServerTest, LongBodiesKeepNobodyElseWaiting) {
  std::promise<void> release;
  std::atomic<int> begun{0};
  auto server = HttpServer::Start(
      {"127.0.0.1", 0}, [&, released = release.get_future().share()](HttpRequest request, auto) {
        ++begun;
        if (!request.body.empty()) released.wait();
        return std::make_unique<HttpReply>(HttpResponse{.body = request.method});
      });
  ASSERT_TRUE(server.ok()) << server.status();
  std::vector<std::unique_ptr<HttpClient>> clients;
  for (int i = 0; i < 6; ++i) {
    clients.push_back(std::make_unique<HttpClient>((*server)->port()));
    clients.back()->SendPost("/", std::string(1 << 20, 'x'));
  }
  while (begun < 2) std::this_thread::yield();
  EXPECT_EQ(HttpClient((*server)->port()).Get("/").body, "GET");
  clients.pop_back();  // leaves, begun or not
  release.set_value();
  for (const auto& client : clients) EXPECT_EQ(client->Receive().body, "POST");
}

TEST_F(HttpTest, ConnectionsOverTheLimitAreClosed) {
  config_.http_limits.connections = 4;
  Start();
  std::vector<std::unique_ptr<HttpClient>> open;
  for (int i = 0; i < 4; ++i) {
    open.push_back(std::make_unique<HttpClient>(service_->http_port()));
    EXPECT_EQ(open.back()->Get("/health").status, 200);
  }
  EXPECT_EQ(HttpClient(service_->http_port()).Get("/health").status, 0);
  open.clear();
  WaitFor([&] { return HttpClient(service_->http_port()).Get("/health").status == 200; });
}

}  // namespace
}  // namespace lorikeet
