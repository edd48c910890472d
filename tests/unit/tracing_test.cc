// Trace context, the spans of a request, and the log.
#include <nlohmann/json.hpp>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/log.h"
#include "server/tracing/request_log.h"
#include "server/tracing/trace_context.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAre;
using ::testing::SizeIs;

// The example of W3C Trace Context, section 3.2.2.4.
constexpr char kExample[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

TEST(Traceparent, IsReadAsTheStandardSays) {
  const auto parsed = ParseTraceparent(kExample);
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(HexOf(parsed->trace_id), "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(HexOf(parsed->span_id), "00f067aa0ba902b7");
  EXPECT_TRUE(parsed->sampled);
  const std::string other = kExample;
  EXPECT_FALSE(ParseTraceparent(other.substr(0, 53) + "00")->sampled);
  EXPECT_FALSE(ParseTraceparent(other.substr(0, 53) + "fe")->sampled);
  EXPECT_TRUE(ParseTraceparent(other.substr(0, 53) + "ff")->sampled);
  EXPECT_TRUE(ParseTraceparent("cc" + other.substr(2) + "-what-the-future-brings").ok());
}

TEST(Traceparent, WhatIsNoneIsRefused) {
  const std::string good = kExample;
  for (const std::string& bad :
       {std::string(), std::string("00"), good.substr(0, 54), good + "0", good + "-more",
        "ff" + good.substr(2), "cc" + good.substr(2) + "x", "0g" + good.substr(2),
        "00-4BF92F3577B34DA6A3CE929D0E0E4736" + good.substr(35),
        "00-00000000000000000000000000000000" + good.substr(35),
        good.substr(0, 36) + "0000000000000000-01", "00_" + good.substr(3)}) {
    EXPECT_FALSE(ParseTraceparent(bad).ok()) << bad;
  }
}

RequestRecord Record() {
  RequestRecord record;
  record.id = "r1";
  record.trace = {std::string(16, 't'), std::string(8, 's'), std::string(8, 'p')};
  record.adapter = "style";
  record.adapter_version = "abc";
  record.arrival_us = 1000;
  record.adapter_read_us = 500;
  record.submitted_us = 1600;
  record.adapter_copy_us = 200;
  record.admitted_us = 2000;
  record.first_token_us = 3000;
  record.end_us = 5000;
  record.prompt_tokens = 7;
  record.completion_tokens = 9;
  return record;
}

std::vector<std::string> NamesOf(const std::vector<OtlpSpan>& spans) {
  std::vector<std::string> names;
  for (const OtlpSpan& span : spans) names.push_back(span.name());
  return names;
}

TEST(SpansOf, ARequestIsOneSpanAndItsPartsLieWithinIt) {
  constexpr int64_t kUnixUs = 1'700'000'000'000'000;
  const std::vector<OtlpSpan> spans = SpansOf(Record(), kUnixUs);
  ASSERT_THAT(NamesOf(spans), ElementsAre("generate", "adapter.read", "queue", "adapter.copy",
                                          "prefill", "decode"));
  const OtlpSpan& whole = spans[0];
  EXPECT_EQ(whole.start_time_unix_nano(), (kUnixUs + 1000) * 1000);
  EXPECT_EQ(whole.end_time_unix_nano(), (kUnixUs + 5000) * 1000);
  EXPECT_EQ(whole.span_id(), std::string(8, 's'));
  EXPECT_EQ(whole.parent_span_id(), std::string(8, 'p'));
  EXPECT_EQ(whole.status().code(), 0);
  for (size_t i = 1; i < spans.size(); ++i) {
    EXPECT_EQ(spans[i].trace_id(), whole.trace_id());
    EXPECT_EQ(spans[i].parent_span_id(), whole.span_id());
    EXPECT_THAT(spans[i].span_id(), SizeIs(8));
    EXPECT_NE(spans[i].span_id(), spans[i - 1].span_id());
    EXPECT_GE(spans[i].start_time_unix_nano(), whole.start_time_unix_nano());
    EXPECT_LE(spans[i].end_time_unix_nano(), whole.end_time_unix_nano());
    EXPECT_LE(spans[i].start_time_unix_nano(), spans[i].end_time_unix_nano());
  }
}

TEST(SpansOf, WhatDidNotHappenHasNoSpan) {
  RequestRecord record = Record();
  record.adapter_read_us = record.adapter_copy_us = 0;
  record.admitted_us = record.first_token_us = 0;
  record.status = absl::DeadlineExceededError("too late");
  const std::vector<OtlpSpan> spans = SpansOf(record, 0);
  ASSERT_THAT(NamesOf(spans), ElementsAre("generate", "queue"));
  EXPECT_EQ(spans[0].status().message(), "too late");
  EXPECT_EQ(spans[1].end_time_unix_nano(), spans[0].end_time_unix_nano()) << "it waited to the end";
}

class LogTest : public ::testing::Test {
 protected:
  void TearDown() override {
    SetLogJson(false);
    SetLogLevel(LogLevel::kInfo);
  }
};

TEST_F(LogTest, LinesAreJsonObjectsWithTimeLevelAndFields) {
  SetLogJson(true);
  testing::internal::CaptureStdout();
  Log(LogLevel::kWarning, "a \"quoted\"\nmessage", {{"tokens", 3}, {"bytes", "\xff"}});
  const std::string line = testing::internal::GetCapturedStdout();
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["level"], "warning");
  EXPECT_EQ(json["message"], "a \"quoted\"\nmessage");
  EXPECT_EQ(json["tokens"], 3);
  EXPECT_THAT(json["time"].get<std::string>(),
              testing::MatchesRegex("20..-..-..T..:..:..\\....Z"));
}

TEST_F(LogTest, TheLevelDecidesAndCanChange) {
  testing::internal::CaptureStdout();
  Log(LogLevel::kDebug, "unseen");
  SetLogLevel(LogLevel::kDebug);
  Log(LogLevel::kDebug, "seen", {{"a", 1}});
  SetLogLevel(LogLevel::kError);
  Log(LogLevel::kWarning, "unseen");
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "debug: seen a=1\n");
  EXPECT_FALSE(ParseLogLevel("loud").ok());
  EXPECT_EQ(*ParseLogLevel("error"), LogLevel::kError);
}

}  // namespace
}  // namespace lorikeet
