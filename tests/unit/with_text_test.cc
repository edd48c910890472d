// Answers in an adapter's words: they wait for it, and those to long requests are made elsewhere.
#include "server/openai/with_text.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

#include "adapters_cache/mixer.h"

namespace lorikeet {
namespace {

class NoBase final : public BaseModel {
 public:
  int layers() const override { return 1; }
  int32_t vocab_size() const override { return 1; }
  LinearShape shape(ModuleId) const override { return {1, 1}; }
  void ReadRows(ModuleId, int32_t, int32_t, float*) const override {}
};

// Brings an adapter when the test says so.
class LateStore final : public AdapterStore {
 public:
  absl::StatusOr<std::string> Find(std::string_view) const override { return "v"; }
  void AcquireAsync(std::string_view,
                    std::function<void(absl::StatusOr<AdapterLease>)> done) override {
    bring = std::move(done);
  }
  std::function<void(absl::StatusOr<AdapterLease>)> bring;
};

class Taken final : public HttpWriter {
 public:
  void Reply(HttpResponse response) override { body = std::move(response.body); }
  void StartStream(std::string_view) override {}
  void Write(std::string_view) override {}
  void EndStream() override {}
  std::string body;  // empty: no answer yet
};

class WithTextTest : public ::testing::Test {
 protected:
  WithTextTest() { context_.mixer = &mixer_; }

  std::unique_ptr<HttpAnswer> Ask() {
    ResolvedModel model;
    model.terms = {{.name = "x"}};
    return *WithText(context_, model, call_, [this](const ModelText&) -> HttpOutcome {
      ++made_;
      return std::make_unique<HttpReply>(HttpResponse{.body = "made"});
    });
  }

  NoBase base_;
  LateStore store_;
  AdapterMixer mixer_{base_, &store_};
  ServingContext context_;
  int woken_ = 0, made_ = 0;
  HttpCall call_{.wake = [this] { ++woken_; }};
  Taken writer_;
};

TEST_F(WithTextTest, AnAnswerComesWithItsAdapter) {
  const auto answer = Ask();
  answer->Pump(writer_);
  EXPECT_EQ(writer_.body, "");
  store_.bring(AdapterLease());
  EXPECT_EQ(woken_, 1);
  EXPECT_EQ(made_, 0) << "on the thread that brought the adapter";
  answer->Pump(writer_);
  EXPECT_EQ(writer_.body, "made");
}

TEST_F(WithTextTest, WhatFailsIsAnError) {
  const auto answer = Ask();
  store_.bring(absl::NotFoundError("no such adapter"));
  answer->Pump(writer_);
  EXPECT_NE(writer_.body.find("no such adapter"), std::string::npos);
  EXPECT_EQ(made_, 0);
}

TEST_F(WithTextTest, AnAnswerToALongRequestIsMadeElsewhere) {
  HttpBegin begin;
  call_.request.elsewhere = [&begin](HttpBegin given) {
    begin = std::move(given);
    return std::make_unique<HttpReply>(HttpResponse{.body = "later"});
  };
  const auto answer = Ask();
  store_.bring(AdapterLease());
  answer->Pump(writer_);
  EXPECT_EQ(writer_.body, "later");
  EXPECT_EQ(made_, 0);
  begin()->Pump(writer_);
  EXPECT_EQ(writer_.body, "made");
}

}  // namespace
}  // namespace lorikeet
