// Generation over real gRPC: what is streamed, how it ends, and what stops it.
#include <gmock/gmock.h>

#include <chrono>
#include <future>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::SizeIs;

class GenerationTest : public ServiceTest {};

TEST_F(GenerationTest, StreamsTokensAndTheirTextToTheEnd) {
  Start();
  const std::string answer = "Grüße, 世界! 🙂 done";
  const std::vector<int32_t> tokens = Encode(answer);
  Script(tokens);
  std::vector<v1::GenerateResponse> messages;
  const grpc::Status status =
      Stream(TextRequest("hello", static_cast<int32_t>(tokens.size())), &messages);
  ASSERT_TRUE(status.ok()) << status.error_message();
  const v1::GenerateResponse sum = Sum(messages);
  EXPECT_EQ(sum.text(), answer);
  EXPECT_THAT(sum.token_ids(), ElementsAreArray(tokens));
  EXPECT_EQ(sum.finish().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sum.finish().stop_case(), v1::Finish::STOP_NOT_SET);
  EXPECT_EQ(sum.finish().usage().prompt_tokens(), Encode("hello").size());
  EXPECT_EQ(sum.finish().usage().completion_tokens(), tokens.size());
  EXPECT_EQ(sum.finish().adapter_version(), "");
  for (size_t i = 0; i + 1 < messages.size(); ++i) {
    EXPECT_FALSE(messages[i].has_finish()) << "message " << i << " of " << messages.size();
  }
}

TEST_F(GenerationTest, ATokenArrivesBeforeTheNextOneIsMade) {
  Start();
  Hold();
  grpc::ClientContext context;
  const auto reader = generation().Generate(&context, TextRequest("hello", 20));
  for (int i = 0; i < 20; ++i) {
    Allow(1);
    v1::GenerateResponse message;
    ASSERT_TRUE(reader->Read(&message));
    EXPECT_THAT(message.token_ids(), SizeIs(1)) << "token " << i;
  }
  // The end comes with the last token or, when that was sent before the engine said so, after it.
  v1::GenerateResponse rest;
  while (reader->Read(&rest)) EXPECT_THAT(rest.token_ids(), SizeIs(0));
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(GenerationTest, UnaryIsWhatTheStreamAddsUpTo) {
  Start();
  v1::GenerateRequest request = TextRequest("hello there", 24);
  request.set_logprobs(0);
  request.set_echo(true);
  v1::GenerateResponse unary;
  std::vector<v1::GenerateResponse> messages;
  ASSERT_TRUE(Unary(request, &unary).ok());
  ASSERT_TRUE(Stream(request, &messages).ok());
  EXPECT_EQ(unary.SerializeAsString(), Sum(messages).SerializeAsString())
      << unary.DebugString() << Sum(messages).DebugString();
  EXPECT_THAT(unary.logprobs(), SizeIs(24));
  EXPECT_EQ(unary.prompt().text(), "hello there");
  const std::vector<int32_t> prompt = Encode("hello there");
  EXPECT_THAT(unary.prompt().token_ids(), ElementsAreArray(prompt));
  EXPECT_THAT(unary.prompt().logprobs(), SizeIs(prompt.size() - 1));
  ASSERT_FALSE(messages.empty());
  EXPECT_TRUE(messages[0].has_prompt());
}

TEST_F(GenerationTest, ChatIsRenderedWithTheModelsTemplate) {
  Start();
  v1::GenerateRequest request = TextRequest("", 1);
  v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("hi");
  request.set_echo(true);
  v1::GenerateResponse response;
  ASSERT_TRUE(Unary(request, &response).ok());
  // Special tokens are not in the text.
  EXPECT_EQ(response.prompt().text(), "system\nBe brief.\nuser\nhi\nassistant\n");
}

TEST_F(GenerationTest, AStopStringEndsTheTextBeforeItAndTheTokensWithIt) {
  Start();
  const std::vector<int32_t> head = Encode("one two");
  const std::vector<int32_t> all = Encode("one two STOP never");
  Script(all);
  v1::GenerateRequest request = TextRequest("x", 100);
  request.mutable_stop()->add_strings("nothing like this");
  request.mutable_stop()->add_strings(" STOP");
  v1::GenerateResponse response;
  ASSERT_TRUE(Unary(request, &response).ok());
  EXPECT_EQ(response.text(), "one two");
  EXPECT_EQ(response.finish().reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(response.finish().string(), " STOP");
  // The tokens spell the stop string to its end and no further.
  std::vector<int32_t> spelled(all.begin(), all.begin() + response.token_ids_size());
  EXPECT_THAT(response.token_ids(), ElementsAreArray(spelled));
  EXPECT_EQ(*Tokenizer::FromDirectory(kGoldenModel)->get()->Decode(spelled, true), "one two STOP");
  EXPECT_EQ(response.finish().usage().completion_tokens(), response.token_ids_size());
}

TEST_F(GenerationTest, TextThatMayStartAStopStringIsNotLostAtTheEnd) {
  Start();
  Script(Encode("one STO"));
  v1::GenerateRequest request = TextRequest("x", static_cast<int32_t>(Encode("one STO").size()));
  request.mutable_stop()->add_strings("STOP");
  v1::GenerateResponse response;
  ASSERT_TRUE(Unary(request, &response).ok());
  EXPECT_EQ(response.text(), "one STO");
  EXPECT_EQ(response.finish().reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(GenerationTest, StopTokensAndEndOfSequenceEndTheAnswerAndAreSent) {
  Start();
  const int32_t eos = 2;
  Script({100, 101, eos, 103});
  v1::GenerateRequest request = TextRequest("x", 10);
  v1::GenerateResponse response;
  request.mutable_stop()->add_token_ids(101);
  ASSERT_TRUE(Unary(request, &response).ok());
  EXPECT_THAT(response.token_ids(), ElementsAreArray({100, 101}));
  EXPECT_EQ(response.finish().reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(response.finish().token_id(), 101);

  request.mutable_stop()->clear_token_ids();
  request.mutable_stop()->set_ignore_eos(false);
  response.Clear();
  ASSERT_TRUE(Unary(request, &response).ok());
  EXPECT_THAT(response.token_ids(), ElementsAreArray({100, 101, eos}));
  EXPECT_EQ(response.finish().token_id(), eos);

  request.mutable_stop()->set_ignore_eos(true);
  response.Clear();
  ASSERT_TRUE(Unary(request, &response).ok());
  EXPECT_THAT(response.token_ids(), SizeIs(10));
}

TEST_F(GenerationTest, WithoutMaxTokensTheContextEndsTheAnswer) {
  Start();
  v1::GenerateRequest request = TextRequest("hello", 1);
  request.mutable_stop()->clear_max_tokens();
  v1::GenerateResponse response;
  ASSERT_TRUE(Unary(request, &response).ok());
  grpc::ClientContext context;
  v1::GetModelResponse model;
  ASSERT_TRUE(generation().GetModel(&context, {}, &model).ok());
  EXPECT_EQ(response.finish().usage().prompt_tokens() + response.token_ids_size(),
            model.max_context_tokens());
  EXPECT_EQ(model.name(), "llama");
  EXPECT_EQ(model.vocab_size(), 320);
  EXPECT_TRUE(model.has_chat_template());
}

TEST_F(GenerationTest, WithoutASeedAnswersDiffer) {
  Start();
  v1::GenerateRequest request = TextRequest("hello", 16);
  request.mutable_sampling()->clear_seed();
  v1::GenerateResponse first, second;
  ASSERT_TRUE(Unary(request, &first).ok());
  ASSERT_TRUE(Unary(request, &second).ok());
  EXPECT_NE(first.SerializeAsString(), second.SerializeAsString());
}

TEST_F(GenerationTest, ClosingTheCallFreesItsPlace) {
  Start();
  Hold();
  grpc::ClientContext context;
  const auto reader = generation().Generate(&context, TextRequest("hello", 200));
  WaitFor([&] { return Metric("lorikeet_running_requests") == 1; });
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  WaitFor([&] { return Metric("lorikeet_requests_total{outcome=\"cancelled\"}") == 1; });
  Release();
  WaitFor([&] { return Metric("lorikeet_running_requests") == 0; });
  EXPECT_LE(Metric("lorikeet_generated_tokens_total"), 1) << "more than the held step ran";
}

TEST_F(GenerationTest, TheDeadlineEndsTheCall) {
  Start();
  Hold();
  const auto cancelled = [&] { return Metric("lorikeet_requests_total{outcome=\"cancelled\"}"); };
  // A deadline that passes before the server hears of the call shows nothing: then a later one is tried.
  for (std::chrono::milliseconds wait(50); cancelled() < 1; wait *= 2) {
    ASSERT_LT(wait, std::chrono::minutes(1)) << "no call was cancelled";
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + wait);
    v1::GenerateResponse response;
    const grpc::Status status =
        generation().GenerateUnary(&context, TextRequest("hello", 200), &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << status.error_message();
    // The client's clock ends its call; the server hears of it a moment later.
    const auto end = std::chrono::steady_clock::now() + wait;
    while (cancelled() < 1 && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  Release();
  WaitFor([&] { return Metric("lorikeet_running_requests") == 0; });
  EXPECT_LE(Metric("lorikeet_generated_tokens_total"), 1) << "more than the held step ran";
}

TEST_F(GenerationTest, AFullQueueRefusesAndLosesNothing) {
  config_.limits.max_running_requests = 1;
  config_.limits.max_queued_requests = 2;
  Start();
  Hold();
  std::vector<std::future<grpc::Status>> accepted;
  std::vector<v1::GenerateResponse> answers(3);
  for (int i = 0; i < 3; ++i) {
    accepted.push_back(std::async(std::launch::async, [this, &answers, i] {
      return Unary(TextRequest("hello", 5), &answers[i]);
    }));
    WaitFor([&] {
      return Metric("lorikeet_running_requests") + Metric("lorikeet_waiting_requests") == i + 1;
    });
  }
  v1::GenerateResponse response;
  const grpc::Status refused = Unary(TextRequest("hello", 5), &response);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.error_message(), HasSubstr("3"));
  Release();
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(accepted[i].get().ok());
    EXPECT_THAT(answers[i].token_ids(), SizeIs(5));
  }
}

TEST_F(GenerationTest, AReaderThatWaitsGetsEverythingInTheEnd) {
  Start();
  grpc::ClientContext context;
  const auto reader = generation().Generate(&context, TextRequest("hello", 240));
  WaitFor([&] { return Metric("lorikeet_generated_tokens_total") == 240; });
  std::vector<v1::GenerateResponse> messages;
  v1::GenerateResponse message;
  while (reader->Read(&message)) messages.push_back(message);
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_THAT(Sum(messages).token_ids(), SizeIs(240));
  EXPECT_TRUE(Sum(messages).has_finish());
}

TEST_F(GenerationTest, ABrokenDeviceFailsRequestsAndIsReported) {
  Start();
  Fail(absl::InternalError("out of magic smoke"));
  v1::GenerateResponse response;
  const grpc::Status status = Unary(TextRequest("hello", 5), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("magic smoke"));
  EXPECT_FALSE(service_->device_status().ok());
  EXPECT_THAT(HttpGet("/health", 503), HasSubstr("magic smoke"));
  EXPECT_EQ(HttpGet("/ready", 503), "not ready\n");
}

TEST_F(GenerationTest, ADeviceThatBreaksEndsTheStreamsInFlightAndTheServiceStops) {
  Start();
  Hold();
  grpc::ClientContext context;
  const auto reader = generation().Generate(&context, TextRequest("hello", 100));
  Allow(1);
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  Fail(absl::InternalError("out of magic smoke"));
  Release();
  while (reader->Read(&message)) continue;
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("magic smoke"));
  service_->Drain(3600);  // with nothing left to wait for
}

}  // namespace
}  // namespace lorikeet
