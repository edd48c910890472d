// The sampler on the device against the host's, over random batches of unlike rows. A token may
// differ where rounding decides: the drawn number lies at an edge between two tokens, or the
// filters cut at one. Distances to those edges are taken in double precision. Batches are seeded
// with their vocabulary; failures print the row and what it asked for.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/kernels/cuda/device_sampler.h"
#include "engine/kernels/sampler.h"

namespace lorikeet {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Sums of float weights are good to 1e-6 of their total; edges closer than this may move.
constexpr double kEdge = 1e-5;
constexpr double kCut = 4e-6;

struct Case {
  std::vector<float> logits;  // [vocab]
  SamplingParams params = {};
  std::vector<int32_t> history = {0};
  int32_t prompt_tokens = 1;
  int32_t target = -1;

  LogitRow Row() const {
    LogitRow row;
    row.sampling = &params;
    row.history = history;
    row.prompt_tokens = prompt_tokens;
    row.target = target;
    return row;
  }
};

std::string Describe(const Case& c) {
  const SamplingParams& p = c.params;
  return absl::StrCat("vocab ", c.logits.size(), " T ", p.temperature, " top_k ", p.top_k,
                      " top_p ", p.top_p, " min_p ", p.min_p, " repetition ",
                      p.repetition_penalty, " presence ", p.presence_penalty, " frequency ",
                      p.frequency_penalty,
                      " logprobs ", p.top_logprobs, " target ", c.target, " seed ", p.seed,
                      " history ", c.history.size());
}

class CudaSampler : public testing::Test {
 protected:
  void SetUp() override {
    Must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    sampler_ = std::make_unique<cuda::DeviceSampler>(&errors_, stream_);
  }
  void TearDown() override {
    sampler_.reset();
    Must(cudaStreamDestroy(stream_));
  }

  static void Must(cudaError_t error) {
    LK_CHECK_MSG(error == cudaSuccess, cudaGetErrorString(error));
  }

  // Cases of one vocabulary as one batch.
  std::vector<SampledToken> Run(const std::vector<const Case*>& cases) {
    const int64_t vocab = static_cast<int64_t>(cases[0]->logits.size());
    std::vector<float> all;
    std::vector<LogitRow> rows;
    for (const Case* c : cases) {
      LK_CHECK(c->logits.size() == vocab);
      all.insert(all.end(), c->logits.begin(), c->logits.end());
      rows.push_back(c->Row());
    }
    void* memory = nullptr;
    Must(cudaMalloc(&memory, all.size() * sizeof(float)));
    Must(cudaMemcpy(memory, all.data(), all.size() * sizeof(float), cudaMemcpyHostToDevice));
    Must(cudaDeviceSynchronize());  // the last of it may still be on its way
    std::vector<SampledToken> out(cases.size());
    const Matrix logits(memory, static_cast<int32_t>(cases.size()), static_cast<int32_t>(vocab));
    sampler_->Sample(logits, rows, out);
    EXPECT_TRUE(errors_.status().ok()) << errors_.status();
    std::vector<float> after(all.size());
    Must(cudaMemcpy(after.data(), memory, all.size() * sizeof(float), cudaMemcpyDeviceToHost));
    EXPECT_EQ(std::memcmp(after.data(), all.data(), all.size() * sizeof(float)), 0)
        << "the logits changed";
    Must(cudaFree(memory));
    return out;
  }
  std::vector<SampledToken> Run(const std::vector<Case>& cases) {
    std::vector<const Case*> all;
    for (const Case& c : cases) all.push_back(&c);
    return Run(all);
  }
  SampledToken RunOne(const Case& c) { return Run(std::vector<const Case*>{&c})[0]; }

  cudaStream_t stream_ = nullptr;
  cuda::FirstError errors_;
  std::unique_ptr<cuda::DeviceSampler> sampler_;
};

SampledToken OnHost(const Case& c) {
  static SamplerScratch scratch;
  SampledToken out;
  Sample(c.logits, c.Row(), &scratch, &out);
  return out;
}

std::vector<double> Penalized(const Case& c) {
  std::vector<float> logits = c.logits;
  std::vector<int32_t> counts(logits.size(), -1);  // -1: not in the history
  for (size_t i = 0; i < c.history.size(); ++i) {
    int32_t& count = counts[c.history[i]];
    count = std::max(count, 0) + (i >= c.prompt_tokens ? 1 : 0);
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    if (counts[i] < 0) continue;
    const float penalty = c.params.repetition_penalty;
    logits[i] = logits[i] > 0 ? logits[i] / penalty : logits[i] * penalty;
    if (counts[i] == 0) continue;
    logits[i] -= c.params.presence_penalty + c.params.frequency_penalty * counts[i];
  }
  return {logits.begin(), logits.end()};
}

// How far the drawn number is from the token's share of [0, 1), with the cut of top-p at `top_p`
// and that of min-p at `min_p`; infinite for a token that is cut off.
double Distance(const Case& c, int32_t token, double top_p, double min_p) {
  const std::vector<double> logits = Penalized(c);
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (c.params.top_k > 0) ids.resize(std::min<size_t>(ids.size(), c.params.top_k));
  const double best = logits[ids[0]];
  const auto weight = [&](int32_t id) {
    return std::exp((logits[id] - best) / c.params.temperature);
  };
  double total = 0, sum = 0;
  for (const int32_t id : ids) total += weight(id);
  size_t keep = ids.size();
  if (c.params.top_p < 1) {
    for (keep = 0; keep < ids.size() && sum < top_p * total;) sum += weight(ids[keep++]);
    keep = std::max<size_t>(keep, 1);
  }
  ids.resize(keep);
  std::sort(ids.begin(), ids.end());
  double kept = 0, before = 0, own = 0;
  for (const int32_t id : ids) {
    const double w = weight(id) >= min_p ? weight(id) : 0;
    if (id < token) before += w;
    if (id == token) own = w;
    kept += w;
  }
  if (own == 0) return kInfinity;
  const double at = DrawUniform(c.params.seed, c.history.size()) * kept;
  return std::max({0.0, before - at, at - before - own}) / kept;
}

double LeastDistance(const Case& c, int32_t token) {
  double least = kInfinity;
  for (const double p : {-kCut, 0.0, kCut}) {
    for (const double m : {-kCut, 0.0, kCut}) {
      if (c.params.min_p == 0 && m != 0) continue;
      least = std::min(least, Distance(c, token, c.params.top_p * (1 + p),
                                       c.params.min_p * (1 + m)));
    }
  }
  return least;
}

void ExpectLogprob(float got, float want) {
  if (std::isinf(want)) {
    EXPECT_EQ(got, want);
    return;
  }
  // Rounding of the total, 2e-6 of it, and of values as large as these.
  EXPECT_NEAR(got, want, 1e-5 + std::abs(want) * 0x1p-21);
}

// True if the token is the host's.
bool ExpectAsHost(const Case& c, const SampledToken& got) {
  SCOPED_TRACE(Describe(c));
  const SampledToken want = OnHost(c);
  EXPECT_EQ(got.logprobs.top.size(), want.logprobs.top.size());
  for (size_t i = 0; i < std::min(got.logprobs.top.size(), want.logprobs.top.size()); ++i) {
    EXPECT_EQ(got.logprobs.top[i].first, want.logprobs.top[i].first) << "place " << i;
    ExpectLogprob(got.logprobs.top[i].second, want.logprobs.top[i].second);
  }
  if (got.token == want.token) {
    ExpectLogprob(got.logprobs.logprob, want.logprobs.logprob);
    return true;
  }
  const bool drawn = c.target < 0 && !c.params.greedy() && want.token >= 0 && got.token >= 0 &&
                     got.token < c.logits.size();
  if (!drawn) {
    EXPECT_EQ(got.token, want.token);
  } else {
    EXPECT_LT(LeastDistance(c, got.token), kEdge)
        << "token " << got.token << ", the host's " << want.token << ", which is off by "
        << LeastDistance(c, want.token);
  }
  return false;
}

template <typename T>
T OneOf(std::initializer_list<T> values, std::mt19937& rng) {
  return values.begin()[rng() % values.size()];
}

std::vector<float> RandomLogits(int32_t vocab, std::mt19937& rng) {
  std::normal_distribution<float> normal(OneOf({-20.0f, 0.0f, 5.0f}, rng),
                                         OneOf({0.05f, 1.0f, 3.0f}, rng));
  std::vector<float> logits(vocab);
  for (float& x : logits) x = normal(rng);
  const uint32_t kind = rng() % 8;
  if (kind < 3) {  // as models give them: a few stand out
    for (int32_t i = 0; i < 30; ++i) logits[rng() % vocab] += (rng() % 1000) * 0.02f;
  }
  if (kind == 3) {
    for (float& x : logits) x = std::round(x * 2) / 2;  // ties
  }
  if (kind == 4) {
    for (float& x : logits) x = rng() % 50 == 0 ? x : -kInfinity;
    logits[rng() % vocab] = 1;
  }
  if (kind == 5) std::fill(logits.begin(), logits.end(), 1.25f);
  if (kind == 6 && rng() % 4 == 0) logits[rng() % vocab] = OneOf({NAN, -NAN, kInfinity}, rng);
  if (kind == 6 && rng() % 8 == 0) std::fill(logits.begin(), logits.end(), -kInfinity);
  return logits;
}

SamplingParams RandomParams(int32_t vocab, std::mt19937& rng) {
  SamplingParams p;
  p.seed = uint64_t{rng()} << 32 | rng();
  p.temperature = OneOf({0.0f, 1.0f, 1.0f, 0.7f, 1.5f, 0.01f, 1e-42f, 1e30f}, rng);
  if (rng() % 2 == 0) p.top_p = OneOf({0.9f, 0.5f, 0.99f, 0.999999f, 1e-9f}, rng);
  if (rng() % 3 == 0) p.top_k = OneOf({1, 2, 5, 40, 100, 1500, vocab - 1, vocab + 5}, rng);
  if (rng() % 3 == 0) p.min_p = OneOf({0.01f, 0.1f, 0.5f, 1.0f}, rng);
  if (rng() % 3 == 0) p.repetition_penalty = OneOf({1.3f, 0.8f, 5.0f}, rng);
  if (rng() % 4 == 0) p.presence_penalty = OneOf({0.5f, -1.0f, 2.0f}, rng);
  if (rng() % 4 == 0) p.frequency_penalty = OneOf({0.3f, -0.1f, 2.0f}, rng);
  if (rng() % 2 == 0) p.top_logprobs = OneOf({0, 1, 5, 20}, rng);
  return p;
}

Case RandomCase(int32_t vocab, std::mt19937& rng) {
  Case c{RandomLogits(vocab, rng), RandomParams(vocab, rng)};
  c.history.resize(1 + rng() % OneOf({3, 40, 700}, rng));
  const int32_t words = OneOf({std::min(vocab, 50), vocab}, rng);
  for (int32_t& id : c.history) id = static_cast<int32_t>(rng() % words);
  c.prompt_tokens = 1 + static_cast<int32_t>(rng() % c.history.size());
  if (rng() % 8 == 0) c.target = static_cast<int32_t>(rng() % vocab);
  return c;
}

TEST_F(CudaSampler, UnlikeRowsOfABatchAgreeWithTheHost) {
  struct Batch {
    int32_t vocab, rows;
  };
  int64_t rows = 0, same = 0;
  for (const Batch& batch : {Batch{1, 20}, Batch{3, 40}, Batch{127, 60}, Batch{128, 60},
                             Batch{130, 60}, Batch{1001, 256}, Batch{5000, 300}, Batch{32003, 120},
                             Batch{128256, 100}, Batch{262144, 20}}) {
    std::mt19937 rng(batch.vocab);
    std::vector<Case> cases;
    for (int32_t i = 0; i < batch.rows; ++i) cases.push_back(RandomCase(batch.vocab, rng));
    const std::vector<SampledToken> out = Run(cases);
    for (int32_t i = 0; i < batch.rows; ++i) {
      SCOPED_TRACE(absl::StrCat("row ", i));
      ++rows;
      same += ExpectAsHost(cases[i], out[i]);
    }
  }
  // Of draws from a flat vocabulary of 128k about 2 in 100 lie at an edge.
  EXPECT_GT(same, rows * 97 / 100);
  std::printf("%ld of %ld tokens are the host's\n", same, rows);
}

TEST_F(CudaSampler, ARowsResultDoesNotDependOnTheOthers) {
  for (const int32_t vocab : {1001, 5000, 128256}) {
    std::mt19937 rng(vocab + 1);
    std::vector<Case> cases;
    for (int32_t i = 0; i < 40; ++i) cases.push_back(RandomCase(vocab, rng));
    const std::vector<SampledToken> together = Run(cases);
    const auto expect_equal = [&](const SampledToken& a, const SampledToken& b, int32_t i) {
      EXPECT_EQ(a.token, b.token) << i << ": " << Describe(cases[i]);
      EXPECT_EQ(a.logprobs.logprob, b.logprobs.logprob) << i << ": " << Describe(cases[i]);
      EXPECT_EQ(a.logprobs.top, b.logprobs.top) << i << ": " << Describe(cases[i]);
    };
    const std::vector<SampledToken> again = Run(cases);
    for (int32_t i = 0; i < 40; ++i) {
      expect_equal(again[i], together[i], i);
      expect_equal(RunOne(cases[i]), together[i], i);
    }
  }
}

TEST_F(CudaSampler, GreedyTakesTheLowestIdOfTheBest) {
  for (const int32_t vocab : {1, 7, 128, 129, 4097, 128256}) {
    std::vector<Case> cases;
    for (const int32_t best : {0, vocab / 3, vocab / 2, vocab - 1}) {
      Case c{std::vector<float>(vocab, -1.0f), {.temperature = 0}};
      for (int32_t i = best; i < vocab; i += 5) c.logits[i] = 3.0f;
      cases.push_back(c);
    }
    const std::vector<SampledToken> out = Run(cases);
    EXPECT_EQ(out[0].token, 0);
    EXPECT_EQ(out[1].token, vocab / 3);
    EXPECT_EQ(out[2].token, vocab / 2);
    EXPECT_EQ(out[3].token, vocab - 1);
  }
  EXPECT_EQ(RunOne({{-1.0f, -0.0f, 0.0f}, {.temperature = 0}}).token, 1);
}

// Equally likely tokens: a filter keeps the lowest ids of them.
TEST_F(CudaSampler, FiltersCutAmongEqualLogits) {
  constexpr int32_t kVocab = 128256;
  std::vector<Case> cases;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Case c{std::vector<float>(kVocab, 2.5f), {.seed = seed}};
    if (seed % 3 == 0) c.params.top_k = 1000;
    if (seed % 3 == 1) c.params.top_p = 0.25f;
    if (seed % 3 == 2) c.params.top_k = 1000, c.params.top_p = 0.5f;
    if (seed % 2 == 0) {  // and the first of them are few
      std::fill(c.logits.begin(), c.logits.begin() + kVocab / 2, -9.0f);
    }
    cases.push_back(c);
  }
  const std::vector<SampledToken> out = Run(cases);
  for (int32_t seed = 0; seed < 60; ++seed) {
    const int32_t first = seed % 2 == 0 ? kVocab / 2 : 0;
    const int32_t equal = kVocab - first;
    const int32_t kept = seed % 3 == 0 ? 1000 : seed % 3 == 1 ? equal / 4 + 2 : 501;
    EXPECT_GE(out[seed].token, first) << seed;
    EXPECT_LT(out[seed].token, first + kept) << seed;
    ExpectAsHost(cases[seed], out[seed]);
  }
}

TEST_F(CudaSampler, FiltersThatLeaveOneTokenLeaveTheBest) {
  std::mt19937 rng(3);
  for (const int32_t vocab : {300, 128256}) {
    std::vector<Case> cases;
    for (const SamplingParams& params :
         {SamplingParams{.top_k = 1}, SamplingParams{.top_p = 1e-9f}, SamplingParams{.min_p = 1},
          SamplingParams{.temperature = 1e-6f}, SamplingParams{.temperature = 0},
          SamplingParams{.top_p = 0.3f, .top_k = 1, .min_p = 0.7f}}) {
      Case c{std::vector<float>(vocab), params};
      for (float& x : c.logits) x = static_cast<float>(rng() % 1000) * 0.01f;
      c.logits[vocab / 2 + 3] = 10.5f;
      for (c.params.seed = 0; c.params.seed < 5; ++c.params.seed) cases.push_back(c);
    }
    const std::vector<SampledToken> out = Run(cases);
    for (size_t i = 0; i < out.size(); ++i) {
      EXPECT_EQ(out[i].token, vocab / 2 + 3) << Describe(cases[i]);
    }
  }
}

TEST_F(CudaSampler, LogitsWithoutADistributionGiveNoToken) {
  std::vector<Case> cases;
  for (const float temperature : {0.0f, 1.0f}) {
    for (const float penalty : {1.0f, 1.5f}) {
      Case c{std::vector<float>(1030, 1.0f),
             {.temperature = temperature, .top_p = 0.9f, .repetition_penalty = penalty,
              .top_logprobs = 3}};
      c.history = {0, 5, 1029};
      for (const int32_t at : {0, 5, 127, 128, 1000, 1029}) {
        for (const float bad : {NAN, -NAN, kInfinity}) {
          Case broken = c;
          broken.logits[at] = bad;
          cases.push_back(broken);
          broken.target = 3;
          cases.push_back(broken);
        }
      }
      Case masked = c;
      std::fill(masked.logits.begin(), masked.logits.end(), -kInfinity);
      cases.push_back(masked);
    }
  }
  const std::vector<SampledToken> out = Run(cases);
  for (size_t i = 0; i < out.size(); ++i) {
    EXPECT_EQ(out[i].token, SampledToken::kNoToken) << i << ": " << Describe(cases[i]);
    EXPECT_TRUE(out[i].logprobs.top.empty()) << i << ": " << Describe(cases[i]);
  }
  Case one{std::vector<float>(1030, -kInfinity)};
  one.logits[700] = -5;
  EXPECT_EQ(RunOne(one).token, 700) << "a mask leaves one token";
}

}  // namespace
}  // namespace lorikeet
