// Traces as a collector gets them, request ids, and the log level over HTTP.
#include <grpcpp/server_builder.h>

#include <map>
#include <mutex>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "server/log.h"
#include "server/tracing/trace_context.h"
#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

namespace collector = opentelemetry::proto::collector::trace::v1;

class FakeCollector final : public collector::TraceService::Service {
 public:
  FakeCollector() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeCollector() override { server_->Shutdown(); }

  grpc::Status Export(grpc::ServerContext*, const collector::ExportTraceServiceRequest* request,
                      collector::ExportTraceServiceResponse*) override {
    std::lock_guard lock(mutex_);
    for (const auto& resource : request->resource_spans()) {
      for (const auto& scope : resource.scope_spans()) {
        for (const OtlpSpan& span : scope.spans()) spans_[span.name()] = span;
      }
    }
    return grpc::Status::OK;
  }

  std::map<std::string, OtlpSpan> spans() {
    std::lock_guard lock(mutex_);
    return spans_;
  }
  int port() const { return port_; }

 private:
  int port_ = 0;
  std::mutex mutex_;
  std::map<std::string, OtlpSpan> spans_;  // the last of each name
  std::unique_ptr<grpc::Server> server_;
};

std::string TextOf(const OtlpSpan& span, const std::string& key) {
  for (const auto& attribute : span.attributes()) {
    if (attribute.key() == key) return attribute.value().string_value();
  }
  return "";
}

class TracingTest : public ServiceTest {
 protected:
  grpc::Status Ask(const std::string& traceparent, const std::string& id,
                   const std::string& adapter = "") {
    grpc::ClientContext context;
    context.AddMetadata("traceparent", traceparent);
    context.AddMetadata("x-request-id", id);
    v1::GenerateRequest request = TextRequest("hello", 3);
    request.set_adapter(adapter);
    v1::GenerateResponse response;
    return generation().GenerateUnary(&context, request, &response);
  }
};

constexpr char kSampled[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
constexpr char kUnsampled[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

TEST_F(TracingTest, SpansReachTheCollectorUnderTheCallersTrace) {
  FakeCollector collector;
  config_.otlp_endpoint = absl::StrCat("http://127.0.0.1:", collector.port());
  config_.adapter_roots = {kGoldenAdapters};
  Start();
  ASSERT_TRUE(Load("style", "lora").ok());
  ASSERT_TRUE(Ask(kUnsampled, "not-traced").ok());
  ASSERT_TRUE(Ask(kSampled, "my-id", "style").ok());
  WaitFor([&] { return collector.spans().contains("generate"); });
  const auto spans = collector.spans();
  const OtlpSpan& whole = spans.at("generate");
  EXPECT_EQ(HexOf(whole.trace_id()), "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(HexOf(whole.parent_span_id()), "00f067aa0ba902b7");
  EXPECT_EQ(TextOf(whole, "lorikeet.request.id"), "my-id");
  EXPECT_EQ(TextOf(whole, "lorikeet.adapter"), "style");
  EXPECT_EQ(TextOf(whole, "lorikeet.adapter.version").size(), 64u);
  for (const char* part : {"queue", "prefill", "decode"}) {
    ASSERT_TRUE(spans.contains(part)) << part;
    EXPECT_EQ(spans.at(part).parent_span_id(), whole.span_id()) << part;
  }
  WaitFor([&] { return Metric("lorikeet_spans_exported_total") == 4; });
}

TEST_F(TracingTest, ACollectorThatIsNotThereHoldsUpNobody) {
  config_.otlp_endpoint = "127.0.0.1:1";
  Start();
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Ask("", absl::StrCat("r", i)).ok());
  EXPECT_EQ(Metric("lorikeet_requests_total{outcome=\"ok\"}"), 20);
}

TEST_F(TracingTest, AnEndpointThatIsNoneIsOneClearError) {
  for (const char* bad : {"collector", "http://", ":4317", "host:port"}) {
    config_.otlp_endpoint = bad;
    EXPECT_THAT(std::string(Service::Open(config_).status().message()),
                testing::HasSubstr(bad));
  }
}

TEST_F(TracingTest, AnHttpRequestKeepsItsIdAndTrace) {
  FakeCollector collector;
  config_.otlp_endpoint = absl::StrCat("127.0.0.1:", collector.port());
  Start();
  HttpClient client(service_->http_port());
  client.set_headers(absl::StrCat("X-Request-Id: my-id\r\nTraceparent: ", kSampled, "\r\n"));
  const HttpResult result =
      client.Post("/v1/completions", R"({"model": "llama", "prompt": "hello", "max_tokens": 2})");
  EXPECT_EQ(result.json()["id"], "cmpl-my-id");
  WaitFor([&] { return collector.spans().contains("generate"); });
  EXPECT_EQ(TextOf(collector.spans().at("generate"), "lorikeet.request.id"), "my-id");
  EXPECT_EQ(HexOf(collector.spans().at("generate").trace_id()),
            "4bf92f3577b34da6a3ce929d0e0e4736");
}

TEST_F(TracingTest, TheLogLevelChangesAtRunTime) {
  Start();
  HttpClient client(service_->http_port());
  EXPECT_EQ(client.Post("/log_level", R"({"level": "error"})").status, 200);
  EXPECT_EQ(CurrentLogLevel(), LogLevel::kError);
  EXPECT_EQ(client.Get("/log_level").json()["level"], "error");
  EXPECT_EQ(client.Post("/log_level", R"({"level": "loud"})").status, 400);
  SetLogLevel(LogLevel::kInfo);
}

}  // namespace
}  // namespace lorikeet
