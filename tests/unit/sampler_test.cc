// The sampler against distributions known in closed form, with bounds computed from the number of
// draws, and against direct double-precision arithmetic.
#include "engine/kernels/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAre;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Input {
  std::vector<float> logits;
  SamplingParams params = {};
  std::vector<int32_t> history = {0};
  int32_t prompt_tokens = 1;
  int32_t target = -1;
  std::vector<uint32_t> allowed = {};  // a bit a token; none: all may come
};

SampledToken Draw(const Input& input, SamplerScratch* scratch) {
  LogitRow row;
  row.sampling = &input.params;
  row.history = input.history;
  row.prompt_tokens = input.prompt_tokens;
  row.target = input.target;
  row.allowed = input.allowed;
  SampledToken out;
  Sample(input.logits, row, scratch, &out);
  return out;
}

SampledToken Draw(const Input& input) {
  SamplerScratch scratch;
  return Draw(input, &scratch);
}

// p_i = 2^-(i+1), up to the cut at `size`.
std::vector<float> HalvingLogits(int32_t size) {
  std::vector<float> logits(size);
  for (int32_t i = 0; i < size; ++i) logits[i] = static_cast<float>(-i * std::log(2.0));
  return logits;
}

// The value that a chi-square variable passes with probability 1e-6 (Wilson and Hilferty 1931).
double ChiSquareBound(int32_t freedom) {
  const double z = 4.753, k = freedom;
  return k * std::pow(1 - 2 / (9 * k) + z * std::sqrt(2 / (9 * k)), 3);
}

// Counts of `draws` draws, each with its own seed, against `expected` probabilities.
void ExpectDistribution(Input input, const std::vector<double>& expected, int32_t draws = 40000) {
  std::vector<int64_t> counts(input.logits.size());
  SamplerScratch scratch;
  for (int32_t i = 0; i < draws; ++i) {
    input.params.seed = i;
    const int32_t token = Draw(input, &scratch).token;
    ASSERT_GE(token, 0);
    ASSERT_LT(token, counts.size());
    ++counts[token];
  }
  double statistic = 0, rare_want = 0, rare_count = 0;
  int32_t cells = 0;
  const auto add = [&](double want, double count) {
    statistic += (count - want) * (count - want) / want;
    ++cells;
  };
  for (size_t i = 0; i < counts.size(); ++i) {
    const double want = i < expected.size() ? expected[i] * draws : 0;
    if (want >= 10) add(want, counts[i]);
    if (want > 0 && want < 10) {  // too few for the statistic: one cell for all of these
      rare_want += want;
      rare_count += counts[i];
    }
    if (want == 0) {
      EXPECT_EQ(counts[i], 0) << "token " << i << " cannot be drawn";
    }
  }
  if (rare_want >= 10) add(rare_want, rare_count);
  if (cells < 2) return;
  EXPECT_LT(statistic, ChiSquareBound(cells - 1)) << ::testing::PrintToString(counts);
}

TEST(Philox, MatchesItsPublishedVectors) {  // Random123, kat_vectors, philox4x32 10
  constexpr uint32_t f = 0xffffffff;
  EXPECT_THAT(Philox4x32({0, 0, 0, 0}, {0, 0}),
              ElementsAre(0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  EXPECT_THAT(Philox4x32({f, f, f, f}, {f, f}),
              ElementsAre(0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  EXPECT_THAT(
      Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      ElementsAre(0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

TEST(Sampler, GreedyTakesTheLowestIdOfTheBest) {
  for (const int32_t vocab : {1, 7, 64, 65, 1000, 49152}) {
    for (const int32_t best : {0, vocab / 3, vocab / 2, vocab - 1}) {
      Input input{.logits = std::vector<float>(vocab, -1.0f), .params = {.temperature = 0}};
      for (int32_t i = best; i < vocab; i += 5) input.logits[i] = 3.0f;
      EXPECT_EQ(Draw(input).token, best) << "vocabulary " << vocab;
    }
  }
  Input zeros{.logits = {-1.0f, -0.0f, 0.0f}, .params = {.temperature = 0}};
  EXPECT_EQ(Draw(zeros).token, 1);
}

TEST(Sampler, DrawsTheSoftmaxAtATemperature) {
  Input input{.logits = HalvingLogits(4)};
  ExpectDistribution(input, {8.0 / 15, 4.0 / 15, 2.0 / 15, 1.0 / 15});
  input.params.temperature = 0.5f;  // squares the odds
  ExpectDistribution(input, {64.0 / 85, 16.0 / 85, 4.0 / 85, 1.0 / 85});
  input.params.temperature = 1e30f;
  ExpectDistribution(input, {0.25, 0.25, 0.25, 0.25});
  for (const float cold : {1e-6f, 1e-42f}) {
    input.params.temperature = cold;
    ExpectDistribution(input, {1, 0, 0, 0}, 100);
  }
}

TEST(Sampler, TopKTopPAndMinPKeepWhatTheirDefinitionSays) {
  Input input{.logits = HalvingLogits(20)};
  input.params.top_k = 3;
  ExpectDistribution(input, {4.0 / 7, 2.0 / 7, 1.0 / 7});
  input.params = {.top_p = 0.8f};  // 1/2 + 1/4 + 1/8 is the first sum to reach it
  ExpectDistribution(input, {4.0 / 7, 2.0 / 7, 1.0 / 7});
  input.params = {.min_p = 0.2f};  // 1, 1/2, 1/4 of the best
  ExpectDistribution(input, {4.0 / 7, 2.0 / 7, 1.0 / 7});
  input.params = {.top_p = 0.8f, .top_k = 3};  // of 4/7, 2/7, 1/7: two reach 6/7
  ExpectDistribution(input, {2.0 / 3, 1.0 / 3});
  input.params = {.top_p = 0.99f, .top_k = 10, .min_p = 0.2f};
  ExpectDistribution(input, {4.0 / 7, 2.0 / 7, 1.0 / 7});
  input.params = {.temperature = 0.5f, .top_p = 0.8f};  // 3/4 falls short, 15/16 does not
  ExpectDistribution(input, {4.0 / 5, 1.0 / 5});
  input.params = {.top_p = 1e-9f};
  ExpectDistribution(input, {1}, 100);
  input.params = {.min_p = 1.0f};
  ExpectDistribution(input, {1}, 100);
}

// 49,152 equally likely tokens: the filters keep the lowest ids, and far more than a first guess.
TEST(Sampler, FiltersWorkOnAFlatVocabulary) {
  constexpr int32_t kVocab = 49152, kDraws = 1600, kBins = 16;
  for (const bool by_k : {false, true}) {
    Input input{.logits = std::vector<float>(kVocab, 2.5f)};
    if (by_k) input.params.top_k = kVocab / 2;
    if (!by_k) input.params.top_p = 0.5f;
    std::vector<double> bins(kBins);
    SamplerScratch scratch;
    for (int32_t i = 0; i < kDraws; ++i) {
      input.params.seed = i;
      const int32_t token = Draw(input, &scratch).token;
      ASSERT_LT(token, kVocab / 2);
      ++bins[token / (kVocab / 2 / kBins)];
    }
    double statistic = 0;
    constexpr double kWant = double{kDraws} / kBins;
    for (const double bin : bins) statistic += (bin - kWant) * (bin - kWant) / kWant;
    EXPECT_LT(statistic, ChiSquareBound(kBins - 1));
  }
}

// What top-k, top-p and min-p leave of each token's probability, by sorting everything in double
// precision.
std::vector<double> FilteredBySorting(const Input& input) {
  std::vector<int32_t> ids(input.logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int32_t a, int32_t b) { return input.logits[a] > input.logits[b]; });
  if (input.params.top_k > 0) ids.resize(std::min<size_t>(ids.size(), input.params.top_k));
  const double best = input.logits[ids[0]];
  std::vector<double> weights;
  for (const int32_t id : ids) {
    weights.push_back(std::exp((input.logits[id] - best) / input.params.temperature));
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  size_t keep = 0;
  for (double sum = 0; keep < ids.size() && sum < input.params.top_p * total;) {
    sum += weights[keep++];
  }
  while (keep > 1 && weights[keep - 1] < input.params.min_p) --keep;
  const double kept = std::accumulate(weights.begin(), weights.begin() + keep, 0.0);
  std::vector<double> probabilities(input.logits.size());
  for (size_t i = 0; i < keep; ++i) probabilities[ids[i]] = weights[i] / kept;
  return probabilities;
}

TEST(Sampler, FiltersAgreeWithSortingEverything) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 2);
  for (const int32_t vocab : {5, 300, 1500}) {
    for (const SamplingParams& params :
         {SamplingParams{.top_k = 4}, SamplingParams{.top_k = 100}, SamplingParams{.top_p = 0.3f},
          SamplingParams{.temperature = 1.5f, .top_p = 0.7f, .top_k = 9},
          SamplingParams{.temperature = 0.8f, .top_p = 0.95f, .min_p = 0.1f}}) {
      Input input{.logits = std::vector<float>(vocab), .params = params};
      for (float& logit : input.logits) logit = std::round(normal(random) * 4) / 4;  // with ties
      SCOPED_TRACE("vocabulary " + std::to_string(vocab) + ", top_k " +
                   std::to_string(params.top_k) + ", top_p " + std::to_string(params.top_p));
      ExpectDistribution(input, FilteredBySorting(input), 20000);
    }
  }
}

// One seed, growing position: what one request sees.
TEST(Sampler, PositionsOfOneRequestAreIndependentDraws) {
  Input input{.logits = HalvingLogits(4)};
  input.params.seed = 12345;
  constexpr int32_t kDraws = 40000;
  std::map<std::pair<int32_t, int32_t>, double> pairs;
  int32_t previous = -1;
  SamplerScratch scratch;
  std::vector<int32_t> history(kDraws + 1, 0);
  for (int32_t i = 0; i < kDraws; ++i) {
    LogitRow row;
    row.sampling = &input.params;
    row.history = std::span(history).first(i + 1);
    row.prompt_tokens = 1;
    SampledToken out;
    Sample(input.logits, row, &scratch, &out);
    if (i % 2 == 1) ++pairs[{previous, out.token}];
    previous = out.token;
  }
  double statistic = 0;
  for (int32_t a = 0; a < 4; ++a) {
    for (int32_t b = 0; b < 4; ++b) {
      const double want = kDraws / 2 * (8 >> a) * (8 >> b) / 225.0;
      const double got = pairs[{a, b}];
      statistic += (got - want) * (got - want) / want;
    }
  }
  EXPECT_LT(statistic, ChiSquareBound(15));
}

TEST(Sampler, ADrawDependsOnSeedAndPositionAlone) {
  Input input{.logits = HalvingLogits(12), .params = {.temperature = 3.0f}};
  input.params.seed = uint64_t{1} << 40;
  const int32_t alone = Draw(input).token;
  SamplerScratch used;
  Input other{.logits = std::vector<float>(500, 1.0f),
              .params = {.top_p = 0.9f, .repetition_penalty = 1.3f, .top_logprobs = 5},
              .history = {3, 4, 4, 499},
              .prompt_tokens = 2};
  Draw(other, &used);
  EXPECT_EQ(Draw(input, &used).token, alone);
  // Penalties count only the row's own history, whatever the scratch saw before.
  EXPECT_EQ(Draw(other, &used).token, Draw(other).token);
  std::map<int32_t, int32_t> by_seed;
  for (int32_t high = 0; high < 64; ++high) {
    input.params.seed = uint64_t(high) << 32;
    ++by_seed[Draw(input).token];
  }
  EXPECT_GT(by_seed.size(), 1u) << "the seed's upper half is not used";
}

TEST(Sampler, PenaltiesShiftTheOdds) {
  // Token 0 is in the prompt, 1 once and 2 twice in the output, 3 in neither.
  const double l2 = std::log(2.0);
  Input input{.logits = std::vector<float>(4, static_cast<float>(2 * l2)),
              .history = {0, 0, 1, 2, 2},
              .prompt_tokens = 2};
  input.params.repetition_penalty = 2.0f;  // 2 log 2 -> log 2: half the odds, for every one seen
  ExpectDistribution(input, {0.2, 0.2, 0.2, 0.4});
  input.logits.assign(4, static_cast<float>(-l2));  // negative logits are multiplied
  ExpectDistribution(input, {0.2, 0.2, 0.2, 0.4});
  input.params = {.presence_penalty = static_cast<float>(l2)};
  ExpectDistribution(input, {1 / 3.0, 1 / 6.0, 1 / 6.0, 1 / 3.0});
  input.params = {.frequency_penalty = static_cast<float>(l2)};
  ExpectDistribution(input, {4 / 11.0, 2 / 11.0, 1 / 11.0, 4 / 11.0});
  input.params = {.temperature = 0, .presence_penalty = 1};
  input.logits = {-3, 1.5f, 1.0f, 0.9f};
  EXPECT_EQ(Draw(input).token, 3) << "greedy sees penalties";
}

TEST(Sampler, WhatIsNotAllowedCountsAsMinusInfinity) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 3);
  const std::vector<SamplingParams> ways = {
      {.temperature = 0}, {}, {.min_p = 0.1f}, {.top_p = 0.8f}, {.top_k = 3},
      {.repetition_penalty = 1.5f, .logit_bias = {{7, 2.0f}}}};
  for (const int32_t vocab : {30, 64, 1001, 49157}) {
    for (const double share : {0.0, 0.002, 0.5, 1.0}) {  // of words of the mask that are not empty
      Input input{.logits = std::vector<float>(vocab), .history = {7, 3}};
      for (float& logit : input.logits) logit = normal(random);
      input.allowed.resize((vocab + 31) / 32);
      for (uint32_t& word : input.allowed) {
        const bool some = std::bernoulli_distribution(share)(random);
        word = !some ? 0 : random() % 2 == 0 ? ~uint32_t{0} : static_cast<uint32_t>(random());
      }
      input.allowed.back() |= 1u << (vocab - 1) % 32;  // one at least
      Input masked = input;
      masked.allowed.clear();
      for (int32_t i = 0; i < vocab; ++i) {
        if ((input.allowed[i / 32] >> i % 32 & 1) == 0) masked.logits[i] = -kInfinity;
      }
      for (const SamplingParams& way : ways) {
        input.params = masked.params = way;
        for (int32_t seed = 0; seed < 20; ++seed) {
          input.params.seed = masked.params.seed = seed;
          ASSERT_EQ(Draw(input).token, Draw(masked).token) << vocab << " tokens, share " << share;
        }
      }
    }
  }
  // The draw itself, where most blocks have nothing to draw.
  Input sparse{.logits = std::vector<float>(1000), .allowed = std::vector<uint32_t>(32)};
  std::vector<double> expected(1000);
  for (const int32_t i : {0, 70, 71, 999}) {
    sparse.allowed[i / 32] |= 1u << i % 32;
    expected[i] = 0.25;
  }
  ExpectDistribution(sparse, expected);
}

TEST(Sampler, LogprobsAreOfTheRawDistributionBestFirst) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal(0, 5);
  Input input{.logits = std::vector<float>(49157)};
  for (float& logit : input.logits) logit = normal(random);
  input.logits[400] = input.logits[40000] = 40.0f;  // a tie at the top
  double total = 0;
  for (const float logit : input.logits) total += std::exp(logit - 40.0);
  const double log_total = 40.0 + std::log(total);
  input.params = {.temperature = 2.0f, .repetition_penalty = 3.0f, .top_logprobs = 20};
  input.history = {400, 400};
  const SampledToken out = Draw(input);
  // float's spacing at 40 is 2^-18; the sum's relative error is below 1e-6.
  constexpr double kTolerance = 0x1p-18 + 2e-6;
  EXPECT_NEAR(out.logprobs.logprob, input.logits[out.token] - log_total, kTolerance);
  std::vector<int32_t> ids(input.logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int32_t a, int32_t b) { return input.logits[a] > input.logits[b]; });
  ASSERT_EQ(out.logprobs.top.size(), 20u);
  for (int32_t i = 0; i < 20; ++i) {
    EXPECT_EQ(out.logprobs.top[i].first, ids[i]);
    EXPECT_NEAR(out.logprobs.top[i].second, input.logits[ids[i]] - log_total, kTolerance);
  }
  input.target = 17;
  const SampledToken prompt = Draw(input);
  EXPECT_EQ(prompt.token, 17);
  EXPECT_NEAR(prompt.logprobs.logprob, input.logits[17] - log_total, kTolerance);
  EXPECT_EQ(prompt.logprobs.top, out.logprobs.top);
  input.target = -1;
  input.params.top_logprobs = 0;
  EXPECT_TRUE(Draw(input).logprobs.top.empty());
  Input small{.logits = {1, 2, 3}, .params = {.temperature = 0, .top_logprobs = 20}};
  EXPECT_EQ(Draw(small).logprobs.top.size(), 3u) << "no more than the vocabulary has";
}

TEST(Sampler, LogitsWithoutADistributionGiveNoToken) {
  for (const float temperature : {0.0f, 1.0f}) {
    for (const int32_t at : {0, 5, 63, 64, 99, 100, 101}) {
      for (const float bad : {kNaN, -kNaN, kInfinity}) {
        Input input{.logits = std::vector<float>(102, 1.0f),
                    .params = {.temperature = temperature, .top_p = 0.9f, .top_logprobs = 3}};
        input.logits[at] = bad;
        const SampledToken out = Draw(input);
        EXPECT_EQ(out.token, SampledToken::kNoToken) << bad << " at " << at;
        EXPECT_TRUE(out.logprobs.top.empty());
        input.target = 3;
        EXPECT_EQ(Draw(input).token, SampledToken::kNoToken);
      }
    }
    Input masked{.logits = std::vector<float>(102, -kInfinity),
                 .params = {.temperature = temperature}};
    EXPECT_EQ(Draw(masked).token, SampledToken::kNoToken);
    masked.logits[70] = -5.0f;
    EXPECT_EQ(Draw(masked).token, 70) << "a mask leaves one token";
  }
}

}  // namespace
}  // namespace lorikeet
