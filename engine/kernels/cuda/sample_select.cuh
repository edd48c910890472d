// Prefixes of a row's tokens ordered by (logit descending, id ascending), found without sorting.
//
// A token's position is (largest bits - its bits, id) as one number: 0 is the best possible. A
// prefix is narrowed down by histograms of positions, 2048 bins a pass over the active chunks;
// counts and weights in them are integers, so that the order of atomics does not matter.
#pragma once

#include "engine/kernels/cuda/sample_row.cuh"

namespace lorikeet::cuda {

using Wide = unsigned long long;

inline constexpr int kBinBits = 11;
inline constexpr int kBins = 1 << kBinBits;
inline constexpr int kThreadBins = kBins / kChooseThreads;
// A weight in units: the largest token has 2^44, and kMaxChunks * kChunk of them fit twice 32 bits.
inline constexpr float kUnits = 0x1p44f;
static_assert(int64_t{kMaxChunks} * kChunk * (1 << (44 - 32)) <= int64_t{1} << 31);

struct ChooseShared {
  uint32_t counts[kBins];
  uint32_t low[kBins];   // weights in units: low words,
  uint32_t high[kBins];  // and high words with the low ones' carries
  uint16_t active[kMaxChunks];
  int32_t active_count;
  int32_t found_bin;
  uint32_t found_count;
  uint32_t found_count_before;
  Wide found_weight;
  Wide found_weight_before;
  Wide top[Limits::kMaxTopLogprobs];
  int32_t top_count;
  int32_t token;
  int32_t chunk;
  double rest;
};

// A row with its chunks.
struct RowView {
  const float* row;
  int32_t width;
  bool vector;
  int32_t chunk_count;
  const uint32_t* bests;  // [chunk_count]
  uint32_t best;          // the largest
  float largest;          // as a logit
  float scale;
  int32_t id_bits;

  __device__ Wide Position(float logit, int32_t id) const {
    return Wide{best - Ordered(logit)} << id_bits | static_cast<uint32_t>(id);
  }
  // Of the last token whose bits may be `least`.
  __device__ Wide LastPosition(uint32_t least) const {
    return ((Wide{best - least} + 1) << id_bits) - 1;
  }
  __device__ float4 Load(int32_t c) const {
    return vector ? LoadChunk<true>(row, c, width) : LoadChunk<false>(row, c, width);
  }
};

// The tokens at positions up to `last`.
struct Prefix {
  Wide last;
  Wide weight;  // of all, in units
};

__device__ inline int32_t BitsOf(Wide v) { return 64 - __clzll(static_cast<long long>(v)); }

// Lists the chunks with logits of at least `least`.
__device__ inline void Activate(const RowView& view, uint32_t least, ChooseShared* shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared->active_count = 0;
  __syncthreads();
  for (int32_t c = threadIdx.x; c < view.chunk_count; c += kChooseThreads) {
    if (view.bests[c] < least) continue;
    shared->active[atomicAdd(&shared->active_count, 1)] = static_cast<uint16_t>(c);
  }
  __syncthreads();
}

// fn(chunk, the lane's four logits) for every active chunk, a warp each. Several are loaded at a
// time, for latency.
template <typename Fn>
__device__ void ForActiveChunks(const RowView& view, const ChooseShared& shared, const Fn& fn) {
  constexpr int kAtOnce = 4;
  const int32_t count = shared.active_count;
  for (int32_t i = threadIdx.x / 32; i < count; i += kAtOnce * kChooseWarps) {
    float4 x[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int32_t at = i + u * kChooseWarps;
      if (at < count) x[u] = view.Load(shared.active[at]);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int32_t at = i + u * kChooseWarps;
      if (at < count) fn(static_cast<int32_t>(shared.active[at]), x[u]);
    }
  }
}

// fn(logit, position) for every token of the active chunks.
template <typename Fn>
__device__ void ForActiveTokens(const RowView& view, const ChooseShared& shared, const Fn& fn) {
  ForActiveChunks(view, shared, [&](int32_t chunk, const float4& x) {
    const int32_t first = chunk * kChunk + static_cast<int32_t>(threadIdx.x % 32) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float logit = Element(x, j);
      if (first + j < view.width) fn(logit, view.Position(logit, first + j));
    }
  });
}

__device__ inline void ClearBins(ChooseShared* shared) {
  __syncthreads();
  for (int32_t i = threadIdx.x; i < kBins; i += kChooseThreads) {
    shared->counts[i] = shared->low[i] = shared->high[i] = 0;
  }
  if (threadIdx.x == 0) shared->found_bin = -1;
  __syncthreads();
}

__device__ inline void AddUnits(ChooseShared* shared, uint32_t bin, Wide units) {
  const uint32_t low = static_cast<uint32_t>(units);
  uint32_t high = static_cast<uint32_t>(units >> 32);
  if (low != 0 && atomicAdd(&shared->low[bin], low) + low < low) ++high;  // it carried
  if (high != 0) atomicAdd(&shared->high[bin], high);
}

// The bin that takes the sum of counts, or of weights, to `need`: into found_*, or found_bin -1 and
// the totals in found_*_before.
__device__ inline void FindBin(Wide need, bool by_weight, ChooseShared* shared) {
  __syncthreads();
  const int32_t first = threadIdx.x * kThreadBins;
  const auto weight_of = [&](int32_t bin) {
    return (Wide{shared->high[bin]} << 32) + shared->low[bin];
  };
  uint32_t count = 0, count_total;
  Wide weight = 0, weight_total;
  for (int j = 0; j < kThreadBins; ++j) {
    count += shared->counts[first + j];
    weight += weight_of(first + j);
  }
  count = BlockPrefix(count, &count_total) - count;
  weight = BlockPrefix(weight, &weight_total) - weight;
  for (int j = 0; j < kThreadBins; ++j) {
    const uint32_t counted = shared->counts[first + j];
    const Wide weighed = weight_of(first + j);
    const Wide before = by_weight ? weight : count;
    const Wide added = by_weight ? weighed : counted;
    if (before < need && before + added >= need) {
      shared->found_bin = first + j;
      shared->found_count = counted;
      shared->found_count_before = count;
      shared->found_weight = weighed;
      shared->found_weight_before = weight;
    }
    count += counted;
    weight += weighed;
  }
  __syncthreads();
  if (shared->found_bin < 0 && threadIdx.x == 0) {
    shared->found_count_before = count_total;
    shared->found_weight_before = weight_total;
  }
  __syncthreads();
}

// The shortest prefix of the active tokens up to position `last` that has `need` tokens, or units
// of weight; all of them where there is not so much. Weights are only counted when `weigh`.
// REQUIRES: need > 0; every token up to `last` is in an active chunk.
__device__ inline Prefix Narrow(const RowView& view, Wide last, Wide need, bool by_weight,
                                bool weigh, ChooseShared* shared) {
  Wide begin = 0, weight = 0;
  int32_t bits = BitsOf(last);
  while (true) {
    const int32_t shift = max(bits - kBinBits, 0);
    ClearBins(shared);
    ForActiveTokens(view, *shared, [&](float logit, Wide position) {
      if (position > last || (position - begin) >> bits != 0) return;
      const uint32_t bin = static_cast<uint32_t>((position - begin) >> shift);
      atomicAdd(&shared->counts[bin], 1u);
      if (!weigh) return;
      const float w = Weight(logit, view.largest, view.scale);
      AddUnits(shared, bin, __float2ull_rn(w * kUnits));
    });
    FindBin(need, by_weight, shared);
    weight += shared->found_weight_before;
    if (shared->found_bin < 0) return {last, weight};
    const uint32_t count = shared->found_count;
    need -= by_weight ? shared->found_weight_before : shared->found_count_before;
    begin += Wide{static_cast<uint32_t>(shared->found_bin)} << shift;
    bits = shift;
    // All of the bin: it has one token, or it has as many as are needed.
    if (count == 1 || shift == 0 || (!by_weight && need == count)) {
      const Wide end = begin + (Wide{1} << shift) - 1;
      return {end < last ? end : last, weight + shared->found_weight};
    }
  }
}

// Bits that no more than the best `count` tokens, and those of about the last one's logit, pass:
// the count-th largest chunk maximum, rounded down to a bin.
__device__ inline uint32_t LeastForCount(const RowView& view, int32_t count,
                                         ChooseShared* shared) {
  if (count > view.chunk_count) return 0;
  uint32_t lowest = view.best;
  for (int32_t c = threadIdx.x; c < view.chunk_count; c += kChooseThreads) {
    lowest = min(lowest, view.bests[c]);
  }
  const uint32_t range = view.best - BlockMin(lowest);
  const int32_t shift = max(BitsOf(range) - kBinBits, 0);
  ClearBins(shared);
  for (int32_t c = threadIdx.x; c < view.chunk_count; c += kChooseThreads) {
    atomicAdd(&shared->counts[(view.best - view.bests[c]) >> shift], 1u);
  }
  FindBin(count, false, shared);
  const Wide end = ((Wide{static_cast<uint32_t>(shared->found_bin)} + 1) << shift) - 1;
  return view.best - (end < range ? static_cast<uint32_t>(end) : range);
}

// The best `count` tokens; activates what they are in.
__device__ inline Prefix BestTokens(const RowView& view, int32_t count, bool weigh,
                                    ChooseShared* shared) {
  const uint32_t least = LeastForCount(view, count, shared);
  Activate(view, least, shared);
  return Narrow(view, view.LastPosition(least), count, false, weigh, shared);
}

}  // namespace lorikeet::cuda
