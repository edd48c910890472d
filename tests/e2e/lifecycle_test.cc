// Start, health, metrics, drain and ports.
#include <gmock/gmock.h>

#include <atomic>
#include <future>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class LifecycleTest : public ServiceTest {
 protected:
  // grpc.health.v1.Health/Check: the answer's `status` field, -1 for an error.
  int Health(const std::string& service) {
    std::string request, response;
    if (!service.empty()) {
      request = std::string{'\x0a', static_cast<char>(service.size())} + service;
    }
    const grpc::Status status = Raw("/grpc.health.v1.Health/Check", request, &response);
    if (!status.ok()) return -1;
    return response.size() == 2 && response[0] == '\x08' ? response[1] : 0;
  }
  // Asks until a request is refused, as every one is from the moment the engine drains. While steps
  // are held an accepted one ends by its deadline.
  grpc::Status FirstRefusal() {
    grpc::Status status;
    WaitFor([&] {
      grpc::ClientContext context;
      context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
      v1::GenerateResponse response;
      status = generation().GenerateUnary(&context, TextRequest("late", 5), &response);
      return status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED;
    });
    return status;
  }

  static constexpr int kServing = 1;
  static constexpr int kNotServing = 2;
};

TEST_F(LifecycleTest, ReadyOnlyOnceItServes) {
  auto service = Service::Open(config_);
  ASSERT_TRUE(service.ok()) << service.status();
  service_ = *std::move(service);
  EXPECT_EQ(HttpGet("/health"), "ok\n");
  EXPECT_EQ(HttpGet("/ready", 503), "not ready\n");
  EXPECT_THAT(HttpGet("/metrics"), HasSubstr("lorikeet_running_requests 0"));
  service_.reset();
  Start();
  EXPECT_EQ(HttpGet("/ready"), "ready\n");
  service_->Drain(0);
  EXPECT_EQ(HttpGet("/ready", 503), "not ready\n");
}

TEST_F(LifecycleTest, HealthTellsServingAndDraining) {
  Start();
  EXPECT_EQ(Health(""), kServing);
  EXPECT_EQ(Health("lorikeet.v1.GenerationService"), kServing);
  EXPECT_EQ(Health("lorikeet.v1.AdapterService"), kServing);
  EXPECT_EQ(Health("no.such.Service"), -1);

  Hold();
  v1::GenerateResponse response;
  auto running =
      std::async(std::launch::async, [&] { return Unary(TextRequest("hello", 5), &response); });
  WaitFor([&] { return Metric("lorikeet_running_requests") == 1; });
  auto draining = std::async(std::launch::async, [&] { service_->Drain(3600); });
  WaitFor([&] { return Health("") == kNotServing; });
  const grpc::Status status = FirstRefusal();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("shutting down"));
  Release();
  draining.get();
  EXPECT_TRUE(running.get().ok()) << "a running request did not finish";
  EXPECT_EQ(response.token_ids_size(), 5);
}

TEST_F(LifecycleTest, ADrainWithoutTimeEndsWhatRuns) {
  Start();
  Hold();
  v1::GenerateResponse response;
  auto running =
      std::async(std::launch::async, [&] { return Unary(TextRequest("hello", 200), &response); });
  WaitFor([&] { return Metric("lorikeet_running_requests") == 1; });
  auto draining = std::async(std::launch::async, [&] { service_->Drain(0); });
  FirstRefusal();
  Release();
  draining.get();
  const grpc::Status status = running.get();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
}

// Streams that come, are read and are left by their clients until the server is gone.
TEST_F(LifecycleTest, ADrainBesideStreamsThatComeAndGoEnds) {
  Start();
  std::atomic<int> begun{0};
  const auto client = [&](int number) {
    for (int turn = number;; ++turn) {
      grpc::ClientContext context;
      const auto reader = generation().Generate(&context, TextRequest("hello", 8));
      v1::GenerateResponse message;
      bool open = true;
      for (int left = turn % 10; left > 0 && open; --left) open = reader->Read(&message);
      if (open) context.TryCancel();
      const grpc::Status status = reader->Finish();
      if (status.error_code() == grpc::StatusCode::UNAVAILABLE) return;
      ++begun;
    }
  };
  std::vector<std::future<void>> clients;
  for (int i = 0; i < 6; ++i) clients.push_back(std::async(std::launch::async, client, i));
  WaitFor([&] { return begun >= 100; });
  service_.reset();
  for (std::future<void>& one : clients) one.get();
}

TEST_F(LifecycleTest, ReflectionListsTheServices) {
  Start();
  std::string response;
  const std::string list_services = {'\x3a', '\x01', '*'};
  Raw("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", list_services, &response);
  EXPECT_THAT(response, HasSubstr("lorikeet.v1.GenerationService"));
  EXPECT_THAT(response, HasSubstr("lorikeet.v1.AdapterService"));
  EXPECT_THAT(response, HasSubstr("grpc.health.v1.Health"));
  // A client that calls what it found needs the messages too.
  for (const std::string symbol : {"lorikeet.v1.GenerationService", "grpc.health.v1.Health"}) {
    const std::string describe = std::string{'\x22', static_cast<char>(symbol.size())} + symbol;
    std::string description;
    Raw("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", describe, &description);
    EXPECT_THAT(description, HasSubstr(".proto")) << symbol;
  }
}

TEST_F(LifecycleTest, MetricsCountWhatHappened) {
  Start();
  v1::GenerateResponse response;
  ASSERT_TRUE(Unary(TextRequest("hello", 7), &response).ok());
  v1::GenerateRequest bad = TextRequest("", 7);
  EXPECT_FALSE(Unary(bad, &response).ok());
  ASSERT_TRUE(Load("style", "dora").ok());
  EXPECT_FALSE(Load("other", "not_there").ok());
  EXPECT_EQ(Metric("lorikeet_requests_total{outcome=\"ok\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_requests_total{outcome=\"invalid_argument\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_prompt_tokens_total"), Encode("hello").size());
  EXPECT_EQ(Metric("lorikeet_generated_tokens_total"), 7);
  EXPECT_EQ(Metric("lorikeet_time_to_first_token_seconds_count"), 1);
  EXPECT_EQ(Metric("lorikeet_inter_token_latency_seconds_count"), 6);
  EXPECT_EQ(Metric("lorikeet_step_rows_count"), 7);
  EXPECT_EQ(Metric("lorikeet_step_rows_sum"), Encode("hello").size() + 6);
  EXPECT_EQ(Metric("lorikeet_adapters"), 1);
  EXPECT_GT(Metric("lorikeet_adapter_bytes"), 0);
  EXPECT_EQ(Metric("lorikeet_adapter_registrations_total{outcome=\"ok\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_adapter_registrations_total{outcome=\"not_found\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_pages"), kPages);
  EXPECT_EQ(Metric("vllm:num_requests_running"), 0);
  EXPECT_EQ(Metric("vllm:num_requests_waiting"), 0);
  EXPECT_EQ(Metric("vllm:kv_cache_usage_perc"), 0);

  Hold();
  grpc::ClientContext context;
  const auto reader = generation().Generate(&context, TextRequest("hello", 20));
  Allow(1);
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(Metric("vllm:num_requests_running"), 1);
  EXPECT_GT(Metric("vllm:kv_cache_usage_perc"), 0);
}

TEST_F(LifecycleTest, HttpRefusesWhatItDoesNotServe) {
  Start();
  EXPECT_THAT(HttpGet("/v1/nothing", 404), HasSubstr("nothing at /v1/nothing"));
  EXPECT_THAT(HttpGet("/metrics", 405, "POST"), HasSubstr("only GET"));
  EXPECT_EQ(HttpGet("/health?verbose", 200, "HEAD"), "");
}

TEST_F(LifecycleTest, APortInUseIsOneClearError) {
  Start();
  ServerConfig second = config_;
  second.grpc_port = service_->grpc_port();
  absl::Status status = Service::Open(second).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr(absl::StrCat("gRPC port 127.0.0.1:", second.grpc_port)));
  second = config_;
  second.http_port = service_->http_port();
  status = Service::Open(second).status();
  EXPECT_THAT(std::string(status.message()),
              HasSubstr(absl::StrCat("HTTP port 127.0.0.1:", second.http_port)));
  second = config_;
  second.host = "no such host";
  EXPECT_EQ(Service::Open(second).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(LifecycleTest, AdaptersOfTheConfigurationAreThereFromTheStart) {
  config_.adapter_roots.clear();
  config_.adapters = {{"a", std::string(kGoldenAdapters) + "/lora"},
                      {"b", std::string(kGoldenAdapters) + "/dora"}};
  Start();
  EXPECT_EQ(service_->adapters(), 2);
  v1::GenerateRequest request = TextRequest("hello", 2);
  request.set_adapter("b");
  v1::GenerateResponse response;
  EXPECT_TRUE(Unary(request, &response).ok());
}

}  // namespace
}  // namespace lorikeet
