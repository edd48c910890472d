// Many requests with different adapters at the same time, and adapters that come and go meanwhile.
#include <gmock/gmock.h>

#include <future>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

const char* const kAdapters[] = {"lora", "rslora", "dora", "lora_qv", "lora_bias"};

class MixedTest : public ServiceTest {
 protected:
  void LoadAll() {
    for (const char* name : kAdapters) {
      const grpc::Status status = Load(name, name);
      ASSERT_TRUE(status.ok()) << name << ": " << status.error_message();
    }
  }
};

TEST_F(MixedTest, SixtyFourStreamsAtOnceAnswerAsEachAlone) {
  Start();
  LoadAll();
  constexpr int kStreams = 64;
  std::vector<v1::GenerateRequest> requests;
  std::vector<v1::GenerateResponse> alone(kStreams);
  for (int i = 0; i < kStreams; ++i) {
    requests.push_back(TextRequest(absl::StrCat("prompt number ", i), 20 + i % 7));
    if (i % 6 != 5) requests[i].set_adapter(kAdapters[i % 6]);
    ASSERT_TRUE(Unary(requests[i], &alone[i]).ok());
  }
  Hold();  // so that all of them are there when the first step ends
  std::vector<std::future<std::vector<v1::GenerateResponse>>> together;
  for (int i = 0; i < kStreams; ++i) {
    together.push_back(std::async(std::launch::async, [this, &requests, i] {
      std::vector<v1::GenerateResponse> messages;
      const grpc::Status status = Stream(requests[i], &messages);
      EXPECT_TRUE(status.ok()) << status.error_message();
      return messages;
    }));
  }
  WaitFor([&] {
    return Metric("lorikeet_running_requests") + Metric("lorikeet_waiting_requests") == kStreams;
  });
  Release();
  for (int i = 0; i < kStreams; ++i) {
    EXPECT_EQ(Sum(together[i].get()).SerializeAsString(), alone[i].SerializeAsString())
        << "request " << i << " with adapter '" << requests[i].adapter() << "'";
  }
  const double all = Metric("lorikeet_step_distinct_adapters_bucket{le=\"+Inf\"}");
  const double up_to_4 = Metric("lorikeet_step_distinct_adapters_bucket{le=\"4\"}");
  EXPECT_GT(all - up_to_4, 0) << "no step had 5 distinct adapters";
  EXPECT_GT(Metric("lorikeet_step_rows_bucket{le=\"+Inf\"}") -
                Metric("lorikeet_step_rows_bucket{le=\"48\"}"),
            0)
      << "no step had more than 48 rows";
  EXPECT_EQ(Metric("lorikeet_requests_total{outcome=\"ok\"}"), 2 * kStreams);
}

TEST_F(MixedTest, AnswersCarryTheVersionOfTheirAdapter) {
  Start();
  LoadAll();
  grpc::ClientContext context;
  v1::ListAdaptersResponse list;
  ASSERT_TRUE(adapters().ListAdapters(&context, {}, &list).ok());
  ASSERT_THAT(list.adapters(), SizeIs(5));
  for (const v1::Adapter& adapter : list.adapters()) {
    v1::GenerateRequest request = TextRequest("hello", 3);
    request.set_adapter(adapter.name());
    v1::GenerateResponse response;
    ASSERT_TRUE(Unary(request, &response).ok());
    EXPECT_THAT(adapter.version(), SizeIs(64));
    EXPECT_EQ(response.finish().adapter_version(), adapter.version()) << adapter.name();
  }
}

TEST_F(MixedTest, AnUnknownAdapterIsNeverAnsweredByTheBase) {
  Start();
  v1::GenerateRequest request = TextRequest("hello", 3);
  request.set_adapter("nobody");
  v1::GenerateResponse response;
  const grpc::Status status = Unary(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(status.error_message(), HasSubstr("nobody"));
  request.set_adapter("llama");  // the base model's own name
  EXPECT_TRUE(Unary(request, &response).ok());
}

TEST_F(MixedTest, UnloadLetsRunningRequestsFinishAndSaysWhatItFreed) {
  Start();
  ASSERT_TRUE(Load("style", "dora").ok());
  v1::GenerateRequest request = TextRequest("hello", 30);
  request.set_adapter("style");
  v1::GenerateResponse alone;
  ASSERT_TRUE(Unary(request, &alone).ok());

  Hold();
  v1::GenerateResponse running;
  auto generating = std::async(std::launch::async, [&] { return Unary(request, &running); });
  WaitFor([&] { return Metric("lorikeet_running_requests") == 1; });
  v1::UnloadAdapterResponse unloaded;
  auto unloading = std::async(std::launch::async, [&] {
    grpc::ClientContext context;
    v1::UnloadAdapterRequest unload;
    unload.set_name("style");
    return adapters().UnloadAdapter(&context, unload, &unloaded);
  });
  WaitFor([&] { return Metric("lorikeet_adapters") == 0; });
  v1::GenerateResponse refused;
  EXPECT_EQ(Unary(request, &refused).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(unloading.wait_for(std::chrono::seconds(0)), std::future_status::timeout)
      << "unloaded while a request used it";
  Release();
  EXPECT_TRUE(generating.get().ok());
  EXPECT_EQ(running.SerializeAsString(), alone.SerializeAsString());
  EXPECT_TRUE(unloading.get().ok());
  EXPECT_GT(unloaded.host_bytes_freed(), 0);
  EXPECT_EQ(unloaded.version(), alone.finish().adapter_version());
}

TEST_F(MixedTest, AnUnloadThatCannotDrainSaysSo) {
  Start();
  ASSERT_TRUE(Load("style", "dora").ok());
  Hold();
  v1::GenerateRequest request = TextRequest("hello", 30);
  request.set_adapter("style");
  v1::GenerateResponse response;
  auto generating = std::async(std::launch::async, [&] { return Unary(request, &response); });
  WaitFor([&] { return Metric("lorikeet_running_requests") == 1; });
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(100));
  v1::UnloadAdapterRequest unload;
  unload.set_name("style");
  v1::UnloadAdapterResponse unloaded;
  EXPECT_EQ(adapters().UnloadAdapter(&context, unload, &unloaded).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  Release();
  EXPECT_TRUE(generating.get().ok());
}

TEST_F(MixedTest, AReloadedAdapterGivesTheSameAnswer) {
  Start();
  v1::GenerateRequest request = TextRequest("hello", 30);
  request.set_adapter("style");
  v1::GenerateResponse before, after;
  ASSERT_TRUE(Load("style", "rslora").ok());
  ASSERT_TRUE(Unary(request, &before).ok());
  grpc::ClientContext context;
  v1::UnloadAdapterRequest unload;
  unload.set_name("style");
  v1::UnloadAdapterResponse unloaded;
  ASSERT_TRUE(adapters().UnloadAdapter(&context, unload, &unloaded).ok());
  ASSERT_TRUE(Load("style", "rslora").ok());
  ASSERT_TRUE(Unary(request, &after).ok());
  EXPECT_EQ(before.SerializeAsString(), after.SerializeAsString());
}

TEST_F(MixedTest, ASharedBeginningIsComputedOnceForEachAdapterAndSalt) {
  Start();
  LoadAll();
  v1::GenerateRequest request = TextRequest("", 2);
  request.mutable_token_ids()->mutable_ids()->Resize(40, 5);
  const auto cached = [&] {
    v1::GenerateResponse response;
    EXPECT_TRUE(Unary(request, &response).ok());
    return response.finish().usage().cached_tokens();
  };
  EXPECT_EQ(cached(), 0);
  EXPECT_EQ(cached(), 32);
  request.set_adapter("lora");
  EXPECT_EQ(cached(), 0);
  request.set_cache_salt("tenant");
  EXPECT_EQ(cached(), 0);
  EXPECT_EQ(cached(), 32);
  request.set_skip_prefix_cache(true);
  EXPECT_EQ(cached(), 0);
  EXPECT_EQ(Metric("lorikeet_prefix_cache_hit_tokens_total"), 64);
  EXPECT_EQ(Metric("lorikeet_prefix_cache_queried_tokens_total"), 6 * 40);

  request.set_cache_salt(std::string(257, 'x'));
  v1::GenerateResponse response;
  const grpc::Status status = Unary(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("cache_salt: 257 bytes; at most 256"));
}

TEST_F(MixedTest, WithoutPrefixCacheEveryPromptIsComputedInFull) {
  config_.no_prefix_cache = true;
  Start();
  v1::GenerateRequest request = TextRequest("", 2);
  request.mutable_token_ids()->mutable_ids()->Resize(40, 5);
  for (int i = 0; i < 2; ++i) {
    v1::GenerateResponse response;
    ASSERT_TRUE(Unary(request, &response).ok());
    EXPECT_EQ(response.finish().usage().cached_tokens(), 0);
  }
}

TEST_F(MixedTest, GetAdapterDescribesIt) {
  Start();
  ASSERT_TRUE(Load("style", "dora").ok());
  grpc::ClientContext context;
  v1::GetAdapterRequest request;
  request.set_name("style");
  v1::GetAdapterResponse response;
  ASSERT_TRUE(adapters().GetAdapter(&context, request, &response).ok());
  EXPECT_EQ(response.adapter().variant(), "dora");
  EXPECT_EQ(response.adapter().max_rank(), 4);
  EXPECT_EQ(response.adapter().modules(), 14);
  EXPECT_GT(response.adapter().bytes(), 0);
  EXPECT_THAT(response.adapter().path(), HasSubstr("dora"));
  EXPECT_EQ(response.adapter().requests(), 0);
}

}  // namespace
}  // namespace lorikeet
