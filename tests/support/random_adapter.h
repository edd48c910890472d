// Random inputs of kernels, and what an adapted linear makes of them by its definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/base/aligned_buffer.h"
#include "engine/base/dtype.h"

namespace lorikeet {

inline std::vector<float> RandomFloats(int64_t n, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& v : out) v = normal(rng);
  return out;
}

// Memory whose every value is NaN: a result that was not written shows.
inline std::vector<float> Poisoned(int64_t n) { return std::vector<float>(n, NAN); }

// A random adapter over modules 0 .. outputs-1 of given widths.
struct RandomAdapter {
  Adapter adapter;
  std::vector<std::vector<float>> a, b;  // [module] the factors as floats, [rank, in], [rank, out]
  std::vector<std::vector<float>> vectors;
  std::vector<std::vector<int32_t>> lists;

  // Ranks are 0 (one in four) to `max_rank`.
  RandomAdapter(int32_t in, const std::vector<int32_t>& outs, DType dtype, int32_t max_rank,
                std::mt19937& rng) {
    adapter.modules.resize(outs.size());
    a.resize(outs.size());
    b.resize(outs.size());
    int64_t bytes = 0;
    std::vector<int32_t> ranks;
    for (int32_t out : outs) {
      ranks.push_back(rng() % 4 == 0 ? 0 : 1 + rng() % max_rank);
      bytes += ranks.back() * (Stride(in) + Stride(out)) * 4;
    }
    adapter.max_rank = *std::max_element(ranks.begin(), ranks.end());
    adapter.storage = AlignedBuffer(bytes);
    std::byte* next = adapter.storage.data();
    vectors.reserve(2 * outs.size());
    for (size_t m = 0; m < outs.size(); ++m) {
      ModuleDelta& delta = adapter.modules[m];
      delta.low_rank.rank = ranks[m];
      delta.low_rank.dtype = dtype;
      delta.low_rank.scale = 0.25f + (rng() % 8) * 0.25f;
      delta.low_rank.a = next;
      delta.low_rank.a_stride = Stride(in);
      a[m] = Fill(next, ranks[m], in, Stride(in), dtype, rng);
      next += ranks[m] * Stride(in) * 4;
      delta.low_rank.b = next;
      delta.low_rank.b_stride = Stride(outs[m]);
      b[m] = Fill(next, ranks[m], outs[m], Stride(outs[m]), dtype, rng);
      next += ranks[m] * Stride(outs[m]) * 4;
      if (rng() % 2) {
        vectors.push_back(RandomFloats(outs[m], rng));
        delta.out_scale = vectors.back().data();
      }
      if (rng() % 2) {
        vectors.push_back(RandomFloats(outs[m], rng));
        delta.bias = vectors.back().data();
      }
    }
  }

  // Linears have the first one's factors as far as they are as large.
  void Share(int32_t in, const std::vector<int32_t>& outs) {
    LowRank& first = adapter.modules[0].low_rank;
    for (size_t m = 1; m < outs.size(); ++m) {
      LowRank& pair = adapter.modules[m].low_rank;
      if (pair.rank == 0 || pair.rank > first.rank) continue;
      pair.a = first.a;
      first.shares_a = pair.shares_a = true;
      a[m].assign(a[0].begin(), a[0].begin() + int64_t{pair.rank} * in);
      if (outs[m] > outs[0]) continue;
      pair.b = first.b;
      pair.b_stride = first.b_stride;
      first.shares_b = pair.shares_b = true;
      for (int32_t k = 0; k < pair.rank; ++k) {
        std::copy_n(&b[0][int64_t{k} * outs[0]], outs[m], &b[m][int64_t{k} * outs[m]]);
      }
    }
  }

  // The first half of the ranks read the second half of the inputs for the first half of the outputs, the
  // others the other way round.
  void MakeBlocks(int32_t in, const std::vector<int32_t>& outs) {
    for (size_t m = 0; m < outs.size(); ++m) {
      LowRank& pair = adapter.modules[m].low_rank;
      pair.blocks = true;
      const auto clear = [&](const std::byte* rows, int64_t stride, int32_t width, bool second,
                             std::vector<float>* values) {
        const int32_t half = width / 2;
        for (int32_t k = 0; k < pair.rank; ++k) {
          const bool kept = (k >= pair.rank / 2) == second;  // its second half
          const int32_t begin = kept ? 0 : half, count = kept ? half : width - half;
          std::fill_n(values->begin() + int64_t{k} * width + begin, count, 0.0f);
          std::memset(const_cast<std::byte*>(rows) + ByteSize(pair.dtype, k * stride + begin), 0,
                      ByteSize(pair.dtype, count));
        }
      };
      clear(pair.a, pair.a_stride, in, false, &a[m]);
      clear(pair.b, pair.b_stride, outs[m], true, &b[m]);
    }
  }

  // Each pair's ranks mixed, unless for a device, or scaled, and a scale of what it adds.
  void StandBeside(const std::vector<int32_t>& outs, std::mt19937& rng, bool on_host = true) {
    const auto random = [&](int64_t n) { return vectors.emplace_back(RandomFloats(n, rng)).data(); };
    for (size_t m = 0; m < outs.size(); ++m) {
      LowRank& pair = adapter.modules[m].low_rank;
      if (pair.rank == 0) continue;
      if (on_host && rng() % 2) pair.rank_mix = random(int64_t{pair.rank} * pair.rank);
      if (rng() % 2) pair.rank_scale = random(pair.rank);
      if (rng() % 2) pair.delta_scale = random(pair.b_stride);
    }
  }

  // A gate for each rank: the step's, a set of them for each linear, or by prototypes, which any type holds, the
  // linears' own.
  void GateRanks(int32_t in, bool own, std::mt19937& rng) {
    const auto modules = static_cast<int32_t>(a.size());
    const auto experts = static_cast<int32_t>(2 + rng() % 7);
    if (own) {
      adapter.prototype_gates = {experts, static_cast<int32_t>(1 + rng() % experts), std::sqrt(static_cast<float>(in)),
                                 rng() % 2 == 0};
    } else {
      adapter.gating.experts = experts;
      adapter.gating.sets = modules;
    }
    for (int32_t m = 0; m < modules; ++m) {
      ModuleDelta& delta = adapter.modules[m];
      adapter.gating.set_of.push_back(modules - 1 - m);
      std::vector<int32_t>& gates = lists.emplace_back();
      for (int32_t k = 0; k < delta.low_rank.rank; ++k) gates.push_back(static_cast<int32_t>(rng() % experts));
      if (!gates.empty()) delta.rank_gate = gates.data();
      if (!own || gates.empty()) continue;
      std::vector<float>& prototypes = vectors.emplace_back(RandomFloats(int64_t{experts} * in, rng));
      for (float& v : prototypes) v = std::clamp(std::round(v * 16) / 16, -4.0f, 4.0f);
      delta.prototypes = prototypes.data();
    }
  }

  static int64_t Stride(int32_t width) { return (width + 31) / 32 * 32; }

  static std::vector<float> Fill(std::byte* p, int32_t rank, int32_t width, int64_t stride,
                                 DType dtype, std::mt19937& rng) {
    std::vector<float> values = RandomFloats(int64_t{rank} * width, rng);
    for (int32_t k = 0; k < rank; ++k) {
      for (int32_t i = 0; i < width; ++i) {
        float& v = values[k * width + i];
        if (dtype == DType::kF32) {
          reinterpret_cast<float*>(p)[k * stride + i] = v;
          continue;
        }
        const uint16_t bits = dtype == DType::kBF16 ? FloatToBF16(v) : FloatToF16(v);
        reinterpret_cast<uint16_t*>(p)[k * stride + i] = bits;
        v = dtype == DType::kBF16 ? BF16ToFloat(bits) : F16ToFloat(bits);
      }
    }
    return values;
  }
};

// [experts] of a linear's input x: the definition in engine/api/adapter.h.
inline std::vector<double> SharesByPrototypes(const PrototypeGates& gates, const float* prototypes, const float* x,
                                              int32_t in) {
  std::vector<double> scores(gates.experts), shares(gates.experts);
  for (int32_t e = 0; e < gates.experts; ++e) {
    for (int32_t i = 0; i < in; ++i) scores[e] += double{prototypes[int64_t{e} * in + i]} * x[i];
    if (gates.magnitudes) scores[e] = std::abs(scores[e]);
  }
  std::vector<double> sorted = scores;
  std::sort(sorted.rbegin(), sorted.rend());
  double sum = 0;
  for (int32_t e = 0; e < gates.experts; ++e) {
    if (scores[e] < sorted[gates.chosen - 1]) continue;
    sum += shares[e] = std::exp((scores[e] - sorted[0]) / gates.temperature);
  }
  for (double& share : shares) share /= sum;
  return shares;
}

// t becomes what the pair makes of its ranks before B; `magnitude`, of the terms' magnitudes, likewise.
inline void MixAndScaleRanks(const LowRank& pair, std::vector<double>* t, std::vector<double>* magnitude) {
  const std::vector<double> plain = *t, plain_magnitude = *magnitude;
  for (int32_t k = 0; k < pair.rank; ++k) {
    if (pair.rank_mix) (*t)[k] = (*magnitude)[k] = 0;
    for (int32_t j = 0; pair.rank_mix && j < pair.rank; ++j) {
      const double mix = pair.rank_mix[k * pair.rank + j];
      (*t)[k] += mix * plain[j];
      (*magnitude)[k] += std::abs(mix) * plain_magnitude[j];
    }
    const double scale = pair.rank_scale ? pair.rank_scale[k] : 1;
    (*t)[k] *= scale;
    (*magnitude)[k] *= std::abs(scale);
  }
}

// One row of one output by the definition in engine/api/adapter.h, and the sum of its terms'
// magnitudes. `gates`: the row's, where they come with the step.
inline void ReferenceRow(const float* x, int32_t in, int32_t out, const std::vector<float>& w,
                         const std::vector<float>& bias, const RandomAdapter* adapter,
                         size_t module, std::vector<double>* y, std::vector<double>* magnitude,
                         const float* gates = nullptr) {
  y->assign(out, 0);
  magnitude->assign(out, 0);
  std::vector<double> t, t_magnitude;
  const ModuleDelta* delta = adapter ? &adapter->adapter.modules[module] : nullptr;
  for (int32_t k = 0; delta && k < delta->low_rank.rank; ++k) {
    double sum = 0, bound = 0;
    for (int32_t i = 0; i < in; ++i) {
      sum += double{x[i]} * adapter->a[module][k * in + i];
      bound += std::abs(double{x[i]} * adapter->a[module][k * in + i]);
    }
    t.push_back(sum * delta->low_rank.scale);
    t_magnitude.push_back(bound * delta->low_rank.scale);
  }
  if (delta) MixAndScaleRanks(delta->low_rank, &t, &t_magnitude);
  std::vector<double> shares;
  if (delta && delta->prototypes) {
    shares = SharesByPrototypes(adapter->adapter.prototype_gates, delta->prototypes, x, in);
  } else if (delta && delta->rank_gate) {
    const Gating& gating = adapter->adapter.gating;
    const float* of_linear = gates + gating.set_of[module] * gating.experts;
    shares.assign(of_linear, of_linear + gating.experts);
  }
  for (size_t k = 0; k < t.size() && !shares.empty(); ++k) {
    const double gate = shares[delta->rank_gate[k]];
    t[k] *= gate;
    t_magnitude[k] *= std::abs(gate);
  }
  const float* delta_scale = delta ? delta->low_rank.delta_scale : nullptr;
  for (int32_t n = 0; n < out; ++n) {
    double sum = 0, bound = 0;
    for (int32_t i = 0; i < in; ++i) {
      sum += double{x[i]} * w[int64_t{n} * in + i];
      bound += std::abs(double{x[i]} * w[int64_t{n} * in + i]);
    }
    for (size_t k = 0; k < t.size(); ++k) {
      const double b = double{adapter->b[module][k * out + n]} * (delta_scale ? delta_scale[n] : 1);
      sum += t[k] * b;
      bound += t_magnitude[k] * std::abs(b);
    }
    const double scale = delta && delta->out_scale ? delta->out_scale[n] : 1;
    const double extra = delta && delta->bias ? delta->bias[n] : 0;
    const double base = bias.empty() ? 0 : bias[n];
    (*y)[n] = sum * scale + base + extra;
    (*magnitude)[n] = bound * std::abs(scale) + std::abs(base) + std::abs(extra);
  }
}

}  // namespace lorikeet
