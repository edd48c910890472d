// What the device's sampler is told about each row of a batch.
#include "engine/kernels/cuda/sample_plan.h"

#include <cfloat>
#include <map>
#include <vector>

#include "engine/kernels/sampler.h"
#include "gtest/gtest.h"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kVocab = 100;

struct Wanted {
  SamplingParams params;
  int32_t target = -1;
  std::vector<int32_t> history = {7, 7, 3, 9, 3, 7};
  int32_t prompt_tokens = 3;
};

SamplePlan Plan(const std::vector<Wanted>& wanted) {
  std::vector<LogitRow> rows;
  for (const Wanted& w : wanted) {
    LogitRow row;
    row.sampling = &w.params;
    row.target = w.target;
    row.history = w.history;
    row.prompt_tokens = w.prompt_tokens;
    rows.push_back(row);
  }
  SamplePlan plan;
  PlanSamples(rows, kVocab, &plan);
  return plan;
}

TEST(SamplePlan, GreedyRowsNeedNoSums) {
  const SamplePlan plan = Plan({{{.temperature = 0}}, {{.temperature = 0, .top_logprobs = 0}}});
  ASSERT_EQ(plan.raw.size(), 2);
  EXPECT_TRUE(plan.penalized.empty());
  EXPECT_FALSE(plan.want_top);
  EXPECT_EQ(plan.raw[0].choice, SampleJob::kBest);
  EXPECT_FALSE(plan.raw[0].weigh || plan.raw[0].log_total || plan.raw[0].logprob);
  EXPECT_TRUE(plan.raw[1].log_total && plan.raw[1].logprob);
  EXPECT_EQ(plan.raw[1].row, 1);
}

TEST(SamplePlan, DrawsTakeTheHostsNumberAndTheFiltersThatDoSomething) {
  const SamplePlan plan =
      Plan({{{.seed = 5}}, {{.top_k = kVocab}}, {{.top_k = 3}}, {{.top_p = 0.5f}},
            {{.min_p = 0.5f}}, {{.temperature = 1e-42f}}});
  ASSERT_EQ(plan.raw.size(), 6);
  EXPECT_EQ(plan.raw[0].uniform, DrawUniform(5, 6));
  EXPECT_EQ(plan.raw[0].scale, kLog2E);
  for (const SampleJob& job : plan.raw) EXPECT_EQ(job.choice, SampleJob::kDraw);
  EXPECT_FALSE(plan.raw[0].filter || plan.raw[1].filter);
  EXPECT_EQ(plan.raw[1].top_k, 0);
  EXPECT_TRUE(plan.raw[2].filter && plan.raw[3].filter && plan.raw[4].filter);
  EXPECT_FALSE(plan.raw[2].weigh) << "the sum over the vocabulary is not needed";
  EXPECT_TRUE(plan.raw[0].weigh && plan.raw[3].weigh && plan.raw[4].weigh);
  EXPECT_LE(plan.raw[5].scale, FLT_MAX);
}

TEST(SamplePlan, PenaltiesCountEachTokenOnceAndLookTwiceForLogprobs) {
  const SamplePlan plan = Plan({{{.presence_penalty = 1}},
                                {{.frequency_penalty = 1, .top_logprobs = 4}},
                                {{.presence_penalty = 1, .top_logprobs = 2}, 50}});
  ASSERT_EQ(plan.raw.size(), 2);
  EXPECT_EQ(plan.raw[0].row, 1);
  EXPECT_EQ(plan.raw[0].choice, SampleJob::kNone);
  EXPECT_EQ(plan.raw[0].top, 4);
  EXPECT_TRUE(plan.raw[0].log_total);
  EXPECT_EQ(plan.raw[1].choice, SampleJob::kTarget) << "targets see no penalties";
  EXPECT_EQ(plan.raw[1].target, 50);
  ASSERT_EQ(plan.penalized.size(), 2);
  EXPECT_FALSE(plan.penalized[0].logprob);
  EXPECT_TRUE(plan.penalized[1].logprob && plan.penalized[1].top == 0);
  EXPECT_TRUE(plan.want_top);
  EXPECT_EQ(plan.most_seen, 3);
  for (const SampleJob& job : plan.penalized) {
    std::map<int32_t, int32_t> counts;
    for (int32_t i = 0; i < job.seen_count; ++i) {
      counts[plan.seen[job.first_seen + i].id] = plan.seen[job.first_seen + i].count;
    }
    EXPECT_EQ(counts, (std::map<int32_t, int32_t>{{7, 1}, {3, 1}, {9, 1}}));
  }
}

}  // namespace
}  // namespace lorikeet::cuda
