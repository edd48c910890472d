#include "engine/kernels/cuda/sample_plan.h"

#include <algorithm>
#include <cfloat>

#include "engine/base/check.h"
#include "engine/kernels/sampler.h"

namespace lorikeet::cuda {
namespace {

// Fills in what choosing needs; the same whether penalties come before or not.
void PlanChoice(const LogitRow& row, int32_t vocab, SampleJob* job) {
  const SamplingParams& params = *row.sampling;
  if (row.target >= 0) {
    job->choice = SampleJob::kTarget;
    job->target = row.target;
    return;
  }
  job->choice = params.greedy() ? SampleJob::kBest : SampleJob::kDraw;
  if (params.greedy()) return;
  job->top_k = params.top_k < vocab ? params.top_k : 0;
  job->top_p = params.top_p;
  job->min_p = params.min_p;
  job->filter = HasPrefixFilter(params, vocab) || params.min_p > 0.0f;
  job->weigh = job->top_k == 0;
  job->scale = std::min(std::min(1.0f / params.temperature, FLT_MAX) * kLog2E, FLT_MAX);
  job->uniform = DrawUniform(params.seed, row.history.size());
}

void PlanLogprobs(const LogitRow& row, int32_t vocab, SampleJob* job) {
  job->log_total = true;
  job->top = std::clamp(row.sampling->top_logprobs, 0, std::min(vocab, Limits::kMaxTopLogprobs));
}

void PlanPenalties(const LogitRow& row, int32_t vocab, SamplePlan* plan, SampleJob* job) {
  constexpr int32_t kDone = -1;
  const SamplingParams& params = *row.sampling;
  job->repetition_penalty = params.repetition_penalty;
  job->presence_penalty = params.presence_penalty;
  job->frequency_penalty = params.frequency_penalty;
  job->first_seen = static_cast<int32_t>(plan->seen.size());
  std::vector<int32_t>& counts = plan->counts;
  if (counts.size() < vocab) counts.resize(vocab, 0);
  for (const int32_t id : row.history) LK_CHECK(id >= 0 && id < vocab);
  for (const int32_t id : row.history.subspan(row.prompt_tokens)) ++counts[id];
  for (const int32_t id : row.history) {
    if (counts[id] == kDone) continue;
    plan->seen.push_back({id, counts[id]});
    counts[id] = kDone;
  }
  for (const int32_t id : row.history) counts[id] = 0;
  job->seen_count = static_cast<int32_t>(plan->seen.size()) - job->first_seen;
  plan->most_seen = std::max(plan->most_seen, job->seen_count);
}

}  // namespace

void PlanSamples(std::span<const LogitRow> rows, int32_t base_vocab, SamplePlan* plan) {
  plan->raw.clear();
  plan->penalized.clear();
  plan->seen.clear();
  plan->most_seen = 0;
  plan->most_vocab = 0;
  plan->want_top = false;
  for (size_t i = 0; i < rows.size(); ++i) {
    const LogitRow& row = rows[i];
    const bool prompt = row.target >= 0;
    const bool penalties = !prompt && HasPenalties(*row.sampling);
    SampleJob job, look;
    const int32_t vocab = row.width(base_vocab);
    job.row = look.row = static_cast<int32_t>(i);
    job.vocab = look.vocab = vocab;
    plan->most_vocab = std::max(plan->most_vocab, vocab);
    job.logprob = prompt || row.sampling->top_logprobs >= 0;
    PlanChoice(row, vocab, &job);
    if (job.logprob) PlanLogprobs(row, vocab, penalties ? &look : &job);
    plan->want_top |= job.top > 0 || look.top > 0;
    if (!penalties) {
      plan->raw.push_back(job);
      continue;
    }
    if (job.logprob) plan->raw.push_back(look);
    PlanPenalties(row, vocab, plan, &job);
    plan->penalized.push_back(job);
  }
}

}  // namespace lorikeet::cuda
