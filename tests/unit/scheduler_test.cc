// Single properties of the scheduler, each on the smallest history that shows it. Random histories
// are in tests/sim.
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "tests/unit/scheduling.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::kEos;
using testing::MakeAdapter;
using testing::MakeRequest;
using testing::Scheduling;

TEST_F(Scheduling, DecodeRowsComeBeforePromptsAndPromptsFillTheRest) {
  Start({.max_batch_tokens = 8}, 100);
  scheduler_->Enqueue(1, MakeRequest(3, 10));
  Step();
  scheduler_->Enqueue(2, MakeRequest(20, 10));
  for (const int32_t chunk : {7, 7, 6}) {
    ASSERT_TRUE(Plan());
    ASSERT_EQ(batch_.sequences(), 2);
    EXPECT_THAT(batch_.sequence_begin, ElementsAre(0, 1, 1 + chunk));
    EXPECT_EQ(batch_.logit_rows.size(), chunk == 6 ? 2 : 1) << "only whole prompts are sampled";
    EXPECT_EQ(scheduler_->stats().prefill_rows, chunk);
    Commit();
  }
  EXPECT_EQ(Tokens(1).size(), 4u);
  EXPECT_EQ(Tokens(2).size(), 1u);
}

// Chunks and preemption: each row of a mean is pooled once; of the last token, its own.
TEST_F(Scheduling, AnEmbeddingTakesEachRowOnceAndEndsWithoutAToken) {
  Start({.max_batch_tokens = 2}, 6);
  const auto embed = [](int32_t prompt, Pooling pooling) {
    Request request = MakeRequest(prompt, 1);
    request.embedding = std::make_shared<Embedding>(pooling);
    return request;
  };
  std::map<RequestId, std::vector<int32_t>> pooled;
  const auto step = [&](RequestId asked) {
    ASSERT_TRUE(Plan());
    for (const LogitRow& row : batch_.logit_rows) {
      if (row.embedding != nullptr) pooled[asked].push_back(batch_.positions[row.row]);
    }
    Commit();
  };
  scheduler_->Enqueue(1, embed(40, Pooling::kLast));
  for (int i = 0; i < 20; ++i) step(1);
  EXPECT_EQ(Finish(1), FinishReason::kEmbedded);
  EXPECT_THAT(pooled[1], ElementsAre(39));

  scheduler_->Enqueue(2, MakeRequest(10, 60));  // older, and it will need the pages
  Step();
  scheduler_->Enqueue(3, embed(40, Pooling::kMean));
  int32_t preempted = 0;
  for (int i = 0; i < 100 && Finish(3) == FinishReason::kNone; ++i) {
    step(3);
    preempted += scheduler_->stats().preempted;
  }
  EXPECT_EQ(Finish(3), FinishReason::kEmbedded);
  EXPECT_GT(preempted, 0);
  EXPECT_THAT(Tokens(3), IsEmpty());
  std::vector<int32_t> every(40);
  std::iota(every.begin(), every.end(), 0);
  EXPECT_EQ(pooled[3], every);
}

TEST_F(Scheduling, RowsCarryTokensPositionsPagesAndHistory) {
  Start({.max_batch_tokens = 64}, 100);
  scheduler_->Enqueue(1, MakeRequest(18, 10));
  Step(7);
  ASSERT_TRUE(Plan());
  EXPECT_THAT(batch_.tokens, ElementsAre(7));
  EXPECT_THAT(batch_.positions, ElementsAre(18));
  EXPECT_THAT(batch_.page_begin, ElementsAre(0, 2));
  ASSERT_EQ(batch_.logit_rows.size(), 1u);
  const LogitRow& row = batch_.logit_rows[0];
  EXPECT_EQ(row.row, 0);
  EXPECT_EQ(row.target, -1);
  EXPECT_EQ(row.prompt_tokens, 18);
  ASSERT_EQ(row.history.size(), 19u);
  EXPECT_EQ(row.history[0], 100);
  EXPECT_EQ(row.history[18], 7);
  Commit();
}

TEST_F(Scheduling, RowsOfOneAdapterAreAdjacentAndTheBaseComesFirst) {
  Start({.max_batch_tokens = 64}, 100);
  const AdapterLease a = MakeAdapter("a"), b = MakeAdapter("b");
  scheduler_->Enqueue(1, MakeRequest(2, 4, a));
  scheduler_->Enqueue(2, MakeRequest(3, 4, b));
  scheduler_->Enqueue(3, MakeRequest(4, 4));
  scheduler_->Enqueue(4, MakeRequest(5, 4, a));
  scheduler_->Enqueue(5, MakeRequest(6, 4));
  ASSERT_TRUE(Plan());
  EXPECT_THAT(batch_.sequence_begin, ElementsAre(0, 4, 10, 12, 17, 20));
  ASSERT_EQ(batch_.segments.size(), 2u);
  EXPECT_EQ(batch_.segments[0].adapter, a.get());
  EXPECT_EQ(batch_.segments[0].row_begin, 10);
  EXPECT_EQ(batch_.segments[0].row_end, 17);
  EXPECT_EQ(batch_.segments[1].adapter, b.get());
  EXPECT_EQ(batch_.segments[1].row_begin, 17);
  EXPECT_EQ(batch_.segments[1].row_end, 20);
  EXPECT_EQ(scheduler_->stats().distinct_adapters, 2);
  EXPECT_EQ(scheduler_->stats().base_rows, 10);
  Commit();
}

TEST_F(Scheduling, AdmissionTakesTurnsOverAdapters) {
  Start({.max_batch_tokens = 8, .max_running_requests = 1}, 100);
  const AdapterLease a = MakeAdapter("a"), b = MakeAdapter("b");
  for (RequestId id = 1; id <= 4; ++id) scheduler_->Enqueue(id, MakeRequest(2, 1, a));
  scheduler_->Enqueue(5, MakeRequest(2, 1, b));
  scheduler_->Enqueue(6, MakeRequest(2, 1));
  scheduler_->Enqueue(7, MakeRequest(2, 1, b));
  std::vector<RequestId> order;
  while (Plan()) {
    Commit();
    for (RequestId id = 1; id <= 7; ++id) {
      const bool listed = std::find(order.begin(), order.end(), id) != order.end();
      if (Finish(id) != FinishReason::kNone && !listed) order.push_back(id);
    }
  }
  EXPECT_THAT(order, ElementsAre(1, 5, 6, 2, 7, 3, 4));
}

TEST_F(Scheduling, TheYoungestGivesItsPagesBackAndContinuesWithoutRepeating) {
  Start({.max_batch_tokens = 64}, 4);  // four blocks of 16 tokens
  scheduler_->Enqueue(1, MakeRequest(30, 30));
  scheduler_->Enqueue(2, MakeRequest(14, 8));
  Step();
  EXPECT_EQ(scheduler_->running(), 1) << "the second would not leave a block for each";

  Start({.max_batch_tokens = 64}, 6);
  events_.clear();
  scheduler_->Enqueue(1, MakeRequest(30, 60));
  scheduler_->Enqueue(2, MakeRequest(14, 60));
  int32_t answer = 10, preempted = 0;
  while (Plan()) {
    preempted += scheduler_->stats().preempted;
    if (scheduler_->stats().preempted > 0) {
      EXPECT_EQ(batch_.sequences(), 1) << "the older one goes on";
      EXPECT_EQ(scheduler_->waiting(), 1);
      EXPECT_EQ(scheduler_->pages_used(), 4) << "the younger one's pages are back";
    }
    Commit(answer++);
  }
  EXPECT_GT(preempted, 0);
  EXPECT_EQ(Tokens(1).size(), 60u);
  EXPECT_EQ(Tokens(2).size(), 60u);
  EXPECT_EQ(Finish(1), FinishReason::kLength);
  EXPECT_EQ(Finish(2), FinishReason::kLength);
  const std::vector<int32_t> tokens = Tokens(2);
  for (size_t i = 1; i < tokens.size(); ++i) {
    EXPECT_GT(tokens[i], tokens[i - 1]) << "sent twice, at " << i;
  }
  EXPECT_EQ(scheduler_->pages_used(), 0);
}

TEST_F(Scheduling, EndsAtEosStopIdLengthAndContext) {
  Start({.max_context_tokens = 12, .max_batch_tokens = 64}, 100);
  Request stop = MakeRequest(2, 50);
  stop.stop_token_ids = {9};
  Request both = MakeRequest(2, 50);
  both.stop_token_ids = {kEos};
  both.ignore_eos = true;
  Request ignore = MakeRequest(2, 3);
  ignore.ignore_eos = true;
  scheduler_->Enqueue(1, MakeRequest(2, 50));
  scheduler_->Enqueue(2, stop);
  scheduler_->Enqueue(3, both);
  scheduler_->Enqueue(4, ignore);
  scheduler_->Enqueue(5, MakeRequest(11, 50));
  Step(9);
  EXPECT_EQ(Finish(2), FinishReason::kStop);
  EXPECT_THAT(Tokens(2), ElementsAre(9)) << "the stop token is the last one sent";
  EXPECT_EQ(Finish(5), FinishReason::kLength) << "prompt 11 of a context of 12";
  EXPECT_THAT(Tokens(5), ElementsAre(9));
  Step(kEos);
  EXPECT_EQ(Finish(1), FinishReason::kEos);
  EXPECT_EQ(Finish(3), FinishReason::kStop);
  EXPECT_EQ(Finish(4), FinishReason::kNone);
  Step(kEos);
  EXPECT_EQ(Finish(4), FinishReason::kLength);
  EXPECT_THAT(Tokens(4), ElementsAre(9, kEos, kEos));
  EXPECT_TRUE(scheduler_->empty());
  EXPECT_FALSE(Plan());
}

TEST_F(Scheduling, PromptLogprobsOfAChunkedPromptComeOnceAndFirst) {
  Start({.max_batch_tokens = 4}, 100);
  Request request = MakeRequest(10, 2);
  request.sampling.prompt_logprobs = true;
  scheduler_->Enqueue(1, request);
  std::vector<int32_t> targets;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Plan());
    for (const LogitRow& row : batch_.logit_rows) targets.push_back(row.target);
    Commit();
  }
  EXPECT_THAT(targets, ElementsAre(101, 102, 103, 104, 105, 106, 107, 108, 109, -1));
  ASSERT_EQ(events_[1].size(), 2u);
  EXPECT_EQ(events_[1][0].kind, TokenEvent::Kind::kPromptLogprobs);
  ASSERT_EQ(events_[1][0].prompt_logprobs.size(), 9u);
  EXPECT_EQ(events_[1][0].prompt_logprobs[8].logprob, -109.0f);
  Step();
  EXPECT_EQ(events_[1].size(), 4u);
}

TEST_F(Scheduling, ADeadlineEndsWaitingAndRunningRequests) {
  Start({.max_batch_tokens = 8, .max_running_requests = 1}, 100);
  for (RequestId id = 1; id <= 3; ++id) {
    Request request = MakeRequest(2, 100);
    request.deadline_us = static_cast<int64_t>(id == 3 ? 500 : 100);
    scheduler_->Enqueue(id, request);
  }
  Step();
  RequestEvents events;
  scheduler_->Expire(99, &events);
  EXPECT_THAT(events, IsEmpty());
  scheduler_->Expire(100, &events);
  Take(std::move(events));
  for (RequestId id = 1; id <= 2; ++id) {
    ASSERT_EQ(Finish(id), FinishReason::kError) << id;
    EXPECT_EQ(events_[id].back().status.code(), absl::StatusCode::kDeadlineExceeded);
  }
  EXPECT_THAT(std::string(events_[1].back().status.message()), HasSubstr("1 of at most 100"));
  Step();
  EXPECT_EQ(Tokens(3).size(), 1u) << "the third goes on";
  EXPECT_EQ(scheduler_->pages_used(), 1);
}

TEST_F(Scheduling, CancelReturnsPagesAndLeaseAtOnce) {
  Start({.max_batch_tokens = 8, .max_running_requests = 1}, 100);
  auto adapter = std::make_shared<const Adapter>();
  scheduler_->Enqueue(1, MakeRequest(20, 100, AdapterLease(adapter)));
  scheduler_->Enqueue(2, MakeRequest(20, 100, AdapterLease(adapter)));
  Step();
  EXPECT_EQ(adapter.use_count(), 3);
  RequestEvents events;
  for (const RequestId id : {2, 1, 1, 77}) scheduler_->Cancel(id, 0, &events);
  Take(std::move(events));
  EXPECT_EQ(Finish(1), FinishReason::kCanceled);
  EXPECT_EQ(Finish(2), FinishReason::kCanceled);
  EXPECT_EQ(events_[1].size(), 1u);
  EXPECT_EQ(adapter.use_count(), 1);
  EXPECT_EQ(scheduler_->pages_used(), 0);
  EXPECT_FALSE(Plan());
}

TEST_F(Scheduling, BrokenLogitsEndTheirRequestAlone) {
  Start({.max_batch_tokens = 64}, 100);
  Request broken = MakeRequest(4, 10);
  broken.sampling.prompt_logprobs = true;
  broken.adapter_name = "bad";
  scheduler_->Enqueue(1, broken);
  scheduler_->Enqueue(2, MakeRequest(4, 10));
  ASSERT_TRUE(Plan());
  StepResult result;
  for (const LogitRow& row : batch_.logit_rows) {
    result.sampled.push_back({row.sequence == 0 ? SampledToken::kNoToken : 5, {}});
  }
  RequestEvents events;
  scheduler_->Commit(std::move(result), 0, &events);
  Take(std::move(events));
  ASSERT_EQ(events_[1].size(), 1u);
  EXPECT_EQ(events_[1][0].status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(events_[1][0].status.message()), HasSubstr("'bad'"));
  EXPECT_THAT(Tokens(2), ElementsAre(5));
}

TEST_F(Scheduling, AWarmStepLoopKeepsTheBatchsMemory) {
  Start({.max_batch_tokens = 64}, 100);
  scheduler_->Enqueue(1, MakeRequest(60, 200));
  Step();
  Step();
  const void* before[] = {batch_.tokens.data(), batch_.positions.data(), batch_.logit_rows.data()};
  for (int i = 0; i < 100; ++i) Step();
  const void* after[] = {batch_.tokens.data(), batch_.positions.data(), batch_.logit_rows.data()};
  EXPECT_THAT(after, ::testing::ElementsAreArray(before));
}

// Prompt rows that `request` takes, alone; its answer is one token.
class PrefixScheduling : public Scheduling {
 protected:
  int32_t RowsOf(const Request& request) {
    const RequestId id = next_++;
    scheduler_->Enqueue(id, request);
    int32_t rows = 0;
    while (Plan()) {
      rows += batch_.rows();
      Commit();
    }
    EXPECT_EQ(events_[id].back().cached_tokens, int32_t(request.prompt.size()) - rows);
    return rows;
  }
  RequestId next_ = 1;
};

TEST_F(PrefixScheduling, ARequestBeginsBehindWhatAnEarlierOneComputed) {
  Start({.max_batch_tokens = 64}, 100);
  EXPECT_EQ(RowsOf(MakeRequest(100, 1)), 100);
  EXPECT_EQ(RowsOf(MakeRequest(100, 1)), 4);
  EXPECT_EQ(RowsOf(MakeRequest(97, 1)), 1);
  EXPECT_EQ(RowsOf(MakeRequest(96, 1)), 16) << "the last token is computed, in its whole block";
  EXPECT_EQ(scheduler_->pages_used(), 0);
}

TEST_F(PrefixScheduling, ItsAnswerIsPartOfWhatTheNextTurnFinds) {
  Start({.max_batch_tokens = 64}, 100);
  scheduler_->Enqueue(100, MakeRequest(20, 30));
  while (Plan()) Commit(7);
  Request next = MakeRequest(20, 1);
  next.prompt.insert(next.prompt.end(), 30, 7);
  next.prompt.push_back(9);
  EXPECT_EQ(RowsOf(next), 51 - 48);
}

TEST_F(PrefixScheduling, NothingIsSharedAcrossAdaptersVersionsTenantsOrAgainstARequestsWill) {
  Start({.max_batch_tokens = 64}, 1000);
  const AdapterLease a = MakeAdapter("a");
  Request salted = MakeRequest(40, 1, a);
  salted.cache_salt = "tenant";
  EXPECT_EQ(RowsOf(MakeRequest(40, 1)), 40);
  EXPECT_EQ(RowsOf(MakeRequest(40, 1, a)), 40) << "the base's";
  EXPECT_EQ(RowsOf(MakeRequest(40, 1, MakeAdapter("b"))), 40) << "another adapter's";
  EXPECT_EQ(RowsOf(MakeRequest(40, 1, MakeAdapter("a"))), 8) << "the same version loaded again";
  EXPECT_EQ(RowsOf(salted), 40) << "another tenant's";
  EXPECT_EQ(RowsOf(salted), 8);
  salted.cache_salt = "tenanta";
  salted.adapter = {};
  EXPECT_EQ(RowsOf(salted), 40) << "salt and version run together";

  Request alone = MakeRequest(40, 1);
  alone.skip_prefix_cache = true;
  EXPECT_EQ(RowsOf(alone), 40);
  alone.prompt[0] = 1;
  EXPECT_EQ(RowsOf(alone), 40);
  alone.skip_prefix_cache = false;
  EXPECT_EQ(RowsOf(alone), 40) << "it left something";

  auto gated = std::make_shared<Adapter>();
  gated->version = "gated";
  gated->cacheable = false;
  for (int i = 0; i < 2; ++i) EXPECT_EQ(RowsOf(MakeRequest(40, 1, AdapterLease(gated))), 40);
}

TEST_F(PrefixScheduling, PromptLogprobsAreComputedThoughTheirTokensAreKnown) {
  Start({.max_batch_tokens = 64}, 100);
  RowsOf(MakeRequest(40, 1));
  Request request = MakeRequest(40, 1);
  request.sampling.prompt_logprobs = true;
  EXPECT_EQ(RowsOf(request), 40);
  EXPECT_EQ(events_[next_ - 1][0].prompt_logprobs.size(), 39u);
}

TEST_F(PrefixScheduling, AHundredRequestsAndTenAdaptersComputeATenthOfASharedPrompt) {
  Start({.max_context_tokens = 4000, .max_batch_tokens = 256}, 1000);
  std::vector<AdapterLease> adapters;
  for (int i = 0; i < 10; ++i) adapters.push_back(MakeAdapter("v" + std::to_string(i)));
  for (RequestId id = 1; id <= 100; ++id) {  // all at once
    Request request = MakeRequest(1000, 8, adapters[id % 10]);
    for (int i = 0; i < 5; ++i) request.prompt.push_back(int32_t(1000 * id) + i);
    scheduler_->Enqueue(id, request);
  }
  int64_t prefill = 0;
  while (Plan()) {
    prefill += scheduler_->stats().prefill_rows;
    Commit(int32_t(prefill % 50) + 3);
  }
  EXPECT_LE(prefill, 100 * 1005 * 12 / 100);
  EXPECT_EQ(scheduler_->pages_used(), 0);
}


}  // namespace
}  // namespace lorikeet
