#include "engine/kernels/sampler.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "engine/base/check.h"

namespace lorikeet {
namespace {

// Logits are scanned once in blocks; later passes skip blocks whose maximum says enough.
constexpr size_t kBlock = 64;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

using Logits = std::span<const float>;

// A key orders candidates as the header says: a larger key has the larger logit, and of equal
// logits the lower id.
uint64_t Key(float logit, size_t id) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 and +0 tie
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

float KeyLogit(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

int32_t KeyId(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

constexpr auto kBestFirst = [](uint64_t a, uint64_t b) { return a > b; };

// Four lanes: the width every x86-64 has. Comparisons give all-ones or zero masks.
using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));

Float4 Load(const float* p) {
  Float4 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

Float4 Broadcast(float x) { return Float4{x, x, x, x}; }

// e^x for x <= 0, exactly 0 below -87; relative error below 2e-7. (Cody and Waite's range
// reduction; the polynomial is Cephes' expf.)
inline Float4 ExpNonPositive(Float4 x) {
  const Int4 alive = x > Broadcast(-87.0f);
  const Float4 clamped = alive ? x : Broadcast(-87.0f);
  const Float4 shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds in the low bits
  const Float4 n = shifted - 12582912.0f;
  const Float4 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Float4 p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Int4 scaled = (Int4)p + ((Int4)shifted << 23);
  return (Float4)(scaled & alive);
}

struct Peak {
  float max = kMinusInfinity;
  bool valid = false;  // a distribution: no NaN, and the maximum is finite
};

float Sum(Float4 lanes) { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); }

// Maximum of each block, and of all.
Peak ScanBlocks(Logits logits, std::vector<float>* block_max) {
  block_max->resize((logits.size() + kBlock - 1) / kBlock);
  Peak peak;
  Int4 nans = {};
  bool tail_nan = false;
  for (size_t b = 0; b < block_max->size(); ++b) {
    const size_t end = std::min(logits.size(), (b + 1) * kBlock);
    Float4 lanes = Broadcast(kMinusInfinity);
    size_t i = b * kBlock;
    for (; i + 4 <= end; i += 4) {
      const Float4 x = Load(&logits[i]);
      lanes = x > lanes ? x : lanes;
      nans |= x != x;
    }
    float max = std::max(std::max(lanes[0], lanes[1]), std::max(lanes[2], lanes[3]));
    for (; i < end; ++i) {
      max = std::max(max, logits[i]);
      tail_nan |= std::isnan(logits[i]);
    }
    (*block_max)[b] = max;
    peak.max = std::max(peak.max, max);
  }
  const bool nan = tail_nan || nans[0] || nans[1] || nans[2] || nans[3];
  peak.valid = !nan && std::isfinite(peak.max);
  return peak;
}

// The row's distribution after penalties and temperature, up to a factor: the best token weighs 1.
struct Distribution {
  Logits logits;
  const std::vector<float>& block_max;  // of `logits`
  float max;
  float inverse_temperature;

  Float4 Weights(Float4 x) const { return ExpNonPositive((x - max) * inverse_temperature); }
  float Weight(float logit) const { return Weights(Broadcast(logit))[0]; }
  float Weight(uint64_t key) const { return Weight(KeyLogit(key)); }
};

// Σ of all weights; keeps them in `weights`, [vocab], unless that is null.
template <bool kKeep>
double SumWeights(const Distribution& d, float* weights) {
  double total = 0;
  for (size_t begin = 0; begin < d.logits.size(); begin += kBlock) {
    const size_t end = std::min(d.logits.size(), begin + kBlock);
    if (d.block_max[begin / kBlock] == kMinusInfinity) {
      if constexpr (kKeep) std::fill(weights + begin, weights + end, 0.0f);
      continue;
    }
    Float4 lanes = {};
    size_t i = begin;
    for (; i + 4 <= end; i += 4) {
      const Float4 w = d.Weights(Load(&d.logits[i]));
      if constexpr (kKeep) std::memcpy(weights + i, &w, sizeof(w));
      lanes += w;
    }
    for (; i < end; ++i) {
      const float w = d.Weight(d.logits[i]);
      if constexpr (kKeep) weights[i] = w;
      lanes[0] += w;
    }
    total += Sum(lanes);
  }
  return total;
}

int32_t ArgMax(Logits logits, const std::vector<float>& block_max, float max) {
  const size_t block = std::find(block_max.begin(), block_max.end(), max) - block_max.begin();
  const size_t end = std::min(logits.size(), (block + 1) * kBlock);
  for (size_t i = block * kBlock; i < end; ++i) {
    if (logits[i] == max) return static_cast<int32_t>(i);
  }
  LK_CHECK_MSG(false, "the maximum is not in its block");
}

// Keys of all tokens whose logit is at least `least`, by ascending id.
void Gather(Logits logits, float least, SamplerScratch* scratch) {
  std::vector<uint64_t>& keys = scratch->keys;
  keys.clear();
  for (size_t b = 0; b < scratch->block_max.size(); ++b) {
    if (scratch->block_max[b] < least) continue;
    const size_t end = std::min(logits.size(), (b + 1) * kBlock);
    for (size_t i = b * kBlock; i < end; ++i) {
      if (logits[i] >= least) keys.push_back(Key(logits[i], i));
    }
  }
}

// Keys of the `count` best tokens, in no order. The count-th largest block maximum is a lower
// bound of the count-th largest logit, which leaves few elements to look at.
void SelectTop(Logits logits, size_t count, SamplerScratch* scratch) {
  float least = kMinusInfinity;
  if (count <= scratch->block_max.size()) {
    std::vector<float>& sorted = scratch->sorted_max;
    sorted.assign(scratch->block_max.begin(), scratch->block_max.end());
    std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(),
                     std::greater<float>());
    least = sorted[count - 1];
  }
  Gather(logits, least, scratch);
  std::vector<uint64_t>& keys = scratch->keys;
  if (keys.size() <= count) return;
  std::nth_element(keys.begin(), keys.begin() + (count - 1), keys.end(), kBestFirst);
  keys.resize(count);
}

double TotalWeight(const Distribution& d, std::span<const uint64_t> keys) {
  double total = 0;
  for (const uint64_t key : keys) total += d.Weight(key);
  return total;
}

// Keeps the shortest prefix, best first, whose weights reach `wanted`: quickselect by weight, so
// nothing is sorted. REQUIRES: keys is not empty. Without enough weight all stay.
void KeepWeight(const Distribution& d, double wanted, std::vector<uint64_t>* keys) {
  size_t low = 0, high = keys->size();  // the prefix ends in (low, high]
  double before = 0;                    // weight of [0, low)
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    std::nth_element(keys->begin() + low, keys->begin() + middle, keys->begin() + high, kBestFirst);
    const double left = TotalWeight(d, std::span(*keys).subspan(low, middle - low));
    if (before + left >= wanted) {
      high = middle;
    } else {
      before += left;
      low = middle;
    }
  }
  keys->resize(high);
}

// Applies top-k and top-p, leaving the keys of the tokens that stay.
void Filter(const Distribution& d, const SamplingParams& params, SamplerScratch* scratch) {
  const size_t vocab = d.logits.size();
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < vocab) {
    SelectTop(d.logits, params.top_k, scratch);
    if (params.top_p == 1.0f) return;
    return KeepWeight(d, params.top_p * TotalWeight(d, scratch->keys), &scratch->keys);
  }
  const double total = SumWeights<false>(d, nullptr);
  // Tokens lighter than (1 - p) total / vocab weigh less than (1 - p) total together, so the
  // others suffice. Half of it, for rounding.
  const double lightest = 0.5 * (1.0 - params.top_p) * total / static_cast<double>(vocab);
  const double least = d.max + std::log(lightest) / d.inverse_temperature;
  Gather(d.logits, static_cast<float>(std::clamp<double>(least, -FLT_MAX, d.max)), scratch);
  KeepWeight(d, params.top_p * total, &scratch->keys);
}

// Inverse transform over ids in ascending order: a last-bit difference in the logits moves the
// result only at an edge between two tokens.
int32_t Draw(std::span<const float> weights, double total, double uniform) {
  const double wanted = uniform * total;
  double sum = 0;
  int32_t last = -1;
  for (size_t begin = 0; begin < weights.size(); begin += kBlock) {
    const size_t end = std::min(weights.size(), begin + kBlock);
    Float4 lanes = {};
    size_t at = begin;
    for (; at + 4 <= end; at += 4) lanes += Load(&weights[at]);
    float block = Sum(lanes);
    for (; at < end; ++at) block += weights[at];
    if (sum + block <= wanted) {
      sum += block;
      if (block > 0) last = static_cast<int32_t>(end) - 1;
      continue;
    }
    for (size_t i = begin; i < end; ++i) {
      if (weights[i] <= 0) continue;
      last = static_cast<int32_t>(i);
      sum += weights[i];
      if (sum > wanted) return last;
    }
  }
  // Rounding kept the sum below `wanted`: the last token that can be drawn.
  while (weights[last] <= 0) --last;
  return last;
}

int32_t DrawFiltered(const Distribution& d, const SamplingParams& params, double uniform,
                     SamplerScratch* scratch) {
  Filter(d, params, scratch);
  std::vector<uint64_t>& keys = scratch->keys;
  // By ascending id, without sorting: gather again what is as good as the worst that stays.
  const uint64_t worst = *std::min_element(keys.begin(), keys.end());
  Gather(d.logits, KeyLogit(worst), scratch);
  std::erase_if(keys, [worst](uint64_t key) { return key < worst; });
  std::vector<float>& weights = scratch->weights;
  weights.resize(keys.size());
  double total = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const float weight = d.Weight(keys[i]);
    weights[i] = weight >= params.min_p ? weight : 0.0f;
    total += weights[i];
  }
  return KeyId(keys[Draw(weights, total, uniform)]);
}

int32_t DrawUnfiltered(const Distribution& d, const SamplingParams& params, double uniform,
                       SamplerScratch* scratch) {
  std::vector<float>& weights = scratch->weights;
  weights.resize(d.logits.size());
  double total = SumWeights<true>(d, weights.data());
  if (params.min_p > 0.0f) {
    total = 0;
    for (float& weight : weights) {
      weight = weight >= params.min_p ? weight : 0.0f;
      total += weight;
    }
  }
  return Draw(weights, total, uniform);
}

// Copies the tokens whose bit is set, and leaves out the others. Of most blocks all bits are set, or none.
void CopyAllowed(Logits raw, std::span<const uint32_t> allowed, float* out) {
  constexpr Int4 kBits = {1, 2, 4, 8};
  for (size_t begin = 0; begin < raw.size(); begin += 32) {
    const uint32_t word = allowed[begin / 32];
    const size_t end = std::min(raw.size(), begin + 32);
    if (word == 0) {
      std::fill(out + begin, out + end, kMinusInfinity);
      continue;
    }
    size_t i = begin;
    for (; i + 4 <= end; i += 4) {
      const auto four = static_cast<int32_t>(word >> (i - begin) & 15);
      const Int4 stays = (Int4{four, four, four, four} & kBits) != 0;
      const Float4 x = stays ? Load(&raw[i]) : Broadcast(kMinusInfinity);
      std::memcpy(out + i, &x, sizeof(x));
    }
    for (; i < end; ++i) out[i] = (word >> (i - begin) & 1) != 0 ? raw[i] : kMinusInfinity;
  }
}

// Leaves out what is not allowed or forbidden, and biases the rest.
void Edit(Logits raw, const LogitRow& row, std::vector<float>* edited) {
  edited->resize(raw.size());
  if (row.allowed.empty()) {
    std::ranges::copy(raw, edited->begin());
  } else {
    CopyAllowed(raw, row.allowed, edited->data());
  }
  for (const auto& [id, bias] : row.sampling->logit_bias) (*edited)[id] += bias;
  for (const int32_t id : row.forbidden) {
    if (id < raw.size()) (*edited)[id] = kMinusInfinity;  // the base's EOS may lie beyond
  }
}

// Penalties, in place.
void Penalize(const LogitRow& row, std::span<float> logits, SamplerScratch* scratch) {
  constexpr int32_t kDone = -1;
  const SamplingParams& params = *row.sampling;
  std::vector<int32_t>& counts = scratch->counts;
  if (counts.size() < logits.size()) counts.resize(logits.size(), 0);
  for (const int32_t id : row.history)
    LK_CHECK(id >= 0 && id < static_cast<int64_t>(logits.size()));
  for (const int32_t id : row.history.subspan(row.prompt_tokens)) ++counts[id];
  for (const int32_t id : row.history) {
    if (counts[id] == kDone) continue;
    float& logit = logits[id];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    if (counts[id] > 0) {
      logit -= params.presence_penalty + params.frequency_penalty * static_cast<float>(counts[id]);
    }
    counts[id] = kDone;
  }
  for (const int32_t id : row.history) counts[id] = 0;
}

bool Adjusts(const LogitRow& row) { return HasEdits(row) || HasPenalties(*row.sampling); }

int32_t Choose(Logits raw, const LogitRow& row, float raw_max, SamplerScratch* scratch) {
  const SamplingParams& params = *row.sampling;
  Distribution d{raw, scratch->block_max, raw_max, 1.0f};
  if (Adjusts(row)) {
    Edit(raw, row, &scratch->adjusted);
    if (HasPenalties(params)) Penalize(row, scratch->adjusted, scratch);
    d.logits = scratch->adjusted;
    const Peak peak = ScanBlocks(d.logits, &scratch->block_max);
    if (!peak.valid) return SampledToken::kNoToken;
    d.max = peak.max;
  }
  if (params.greedy()) return ArgMax(d.logits, scratch->block_max, d.max);
  d.inverse_temperature = std::min(1.0f / params.temperature, FLT_MAX);
  const double uniform = DrawUniform(params.seed, row.history.size());
  return HasPrefixFilter(params, static_cast<int64_t>(raw.size()))
             ? DrawFiltered(d, params, uniform, scratch)
             : DrawUnfiltered(d, params, uniform, scratch);
}

// REQUIRES: scratch->block_max is of `logits`.
void FillLogprobs(Logits logits, const LogitRow& row, float max, SamplerScratch* scratch,
                  SampledToken* out) {
  const double log_total = max + std::log(SumWeights<false>({logits, scratch->block_max, max, 1.0f}, nullptr));
  if (row.sampling->top_logprobs > 0) {
    SelectTop(logits, row.sampling->top_logprobs, scratch);
    std::sort(scratch->keys.begin(), scratch->keys.end(), kBestFirst);
    for (const uint64_t key : scratch->keys) {
      const int32_t id = KeyId(key);
      out->logprobs.top.emplace_back(id, static_cast<float>(logits[id] - log_total));
    }
  }
  out->logprobs.logprob = static_cast<float>(logits[out->token] - log_total);
}

}  // namespace

std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

bool HasEdits(const LogitRow& row) {
  return !row.sampling->logit_bias.empty() || !row.forbidden.empty() || !row.allowed.empty();
}

bool HasPenalties(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

bool HasPrefixFilter(const SamplingParams& params, int64_t vocab) {
  return params.top_p < 1.0f || (params.top_k > 0 && params.top_k < vocab);
}

double DrawUniform(uint64_t seed, uint64_t position) {
  const std::array<uint32_t, 4> bits =
      Philox4x32({static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t wide = uint64_t{bits[1]} << 32 | bits[0];
  return static_cast<double>(wide >> 11) * 0x1p-53;  // [0, 1)
}

void Sample(Logits logits, const LogitRow& row, SamplerScratch* scratch, SampledToken* out) {
  out->logprobs.logprob = 0;
  out->logprobs.top.clear();
  out->token = SampledToken::kNoToken;
  const Peak peak = ScanBlocks(logits, &scratch->block_max);
  if (!peak.valid) return;
  const bool prompt = row.target >= 0;
  out->token = prompt ? row.target : Choose(logits, row, peak.max, scratch);
  if (out->token == SampledToken::kNoToken) return;
  if (!prompt && row.sampling->top_logprobs < 0) return;
  // Choosing among adjusted logits left their maxima.
  if (!prompt && Adjusts(row)) ScanBlocks(logits, &scratch->block_max);
  FillLogprobs(logits, row, peak.max, scratch, out);
}

}  // namespace lorikeet
