#include "engine/kernels/cuda/sample.h"

#include <cmath>

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/sample_select.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kScanThreads = 256;
constexpr int kScanChunks = 4;  // of a warp
constexpr int kSeenThreads = 256;
constexpr uint32_t kOrderedInfinity = 0xff800000u;
constexpr uint32_t kOrderedMinusInfinity = 0x007fffffu;

__device__ float WarpWeight(const float4& x, uint32_t best, float scale) {
  return WarpSum(WeightOf(x, Reference(best), scale));
}

// A warp takes kScanChunks chunks of a job's row.
template <bool kVector>
__global__ void __launch_bounds__(kScanThreads)
    ScanChunks(const Matrix logits, const SampleJob* jobs, const SampleChunks chunks) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const SampleJob& job = jobs[blockIdx.y];
  const float* row = logits.row(job.row);
  const int32_t first = (blockIdx.x * kScanThreads + threadIdx.x) / 32 * kScanChunks;
  const int64_t out = int64_t{blockIdx.y} * chunks.count;
  const bool log_total = job.log_total, weigh = job.weigh;
  const float scale = job.scale;
  float4 x[kScanChunks];
#pragma unroll
  for (int u = 0; u < kScanChunks; ++u) x[u] = LoadChunk<kVector>(row, first + u, job.vocab);
#pragma unroll
  for (int u = 0; u < kScanChunks; ++u) {
    const int32_t c = first + u;
    if (c >= chunks.count) return;
    const float largest = LargestOf(LargestOf(x[u].x, x[u].y), LargestOf(x[u].z, x[u].w));
    const uint32_t best = __reduce_max_sync(kAll, Ordered(largest));
    float total = 0, weight = 0;
    if (log_total) total = WarpWeight(x[u], best, kLog2E);
    if (weigh) weight = log_total && scale == kLog2E ? total : WarpWeight(x[u], best, scale);
    if (threadIdx.x % 32 != 0) continue;
    chunks.best[out + c] = best;
    if (log_total) chunks.totals[out + c] = total;
    if (weigh) chunks.weights[out + c] = weight;
  }
}

// As the host does it, to the last bit.
__device__ float Penalized(float logit, int32_t count, const SampleJob& job) {
  logit = logit > 0 ? __fdiv_rn(logit, job.repetition_penalty)
                    : __fmul_rn(logit, job.repetition_penalty);
  if (count == 0) return logit;
  return __fsub_rn(logit, __fadd_rn(job.presence_penalty, __fmul_rn(job.frequency_penalty,
                                                                    static_cast<float>(count))));
}

__global__ void __launch_bounds__(kSeenThreads)
    Penalize(const Matrix logits, const SampleJob* jobs, const SeenToken* seen, float* saved) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const SampleJob& job = jobs[blockIdx.y];
  const int32_t i = blockIdx.x * kSeenThreads + threadIdx.x;
  if (i >= job.seen_count) return;
  const SeenToken token = seen[job.first_seen + i];
  float* logit = logits.row(job.row) + token.id;
  saved[job.first_seen + i] = *logit;
  *logit = Penalized(*logit, token.count, job);
}

// The lowest id of the largest logit, of which `chunk` is the first to have it. A warp's.
__device__ int32_t FirstBest(const RowView& view, int32_t chunk) {
  const float4 x = view.Load(chunk);
  int32_t mine = -1;
#pragma unroll
  for (int j = 3; j >= 0; --j) {
    if (Ordered(Element(x, j)) == view.best) mine = j;
  }
  const unsigned found = __ballot_sync(kAll, mine >= 0);
  const int lane = __ffs(static_cast<int>(found)) - 1;
  return chunk * kChunk + lane * 4 + __shfl_sync(kAll, mine, lane);
}

// Σ 2^(scale (logit - largest)) over the row, from its chunks' sums.
__device__ double SumChunks(const RowView& view, const float* sums, float scale) {
  double sum = 0;
  for (int32_t c = threadIdx.x; c < view.chunk_count; c += kChooseThreads) {
    sum += static_cast<double>(sums[c] * Weight(Reference(view.bests[c]), view.largest, scale));
  }
  return BlockSum(sum);
}

__device__ void ListBest(const RowView& view, int32_t count, double log_total, TopToken* out,
                         ChooseShared* shared) {
  const Prefix best = BestTokens(view, count, false, shared);
  if (threadIdx.x == 0) shared->top_count = 0;
  __syncthreads();
  ForActiveTokens(view, *shared, [&](float, Wide position) {
    if (position <= best.last) shared->top[atomicAdd(&shared->top_count, 1)] = position;
  });
  __syncthreads();
  if (threadIdx.x >= count) return;
  const Wide mine = shared->top[threadIdx.x];
  int32_t rank = 0;
  for (int32_t i = 0; i < count; ++i) rank += shared->top[i] < mine;
  const float logit = FromOrdered(view.best - static_cast<uint32_t>(mine >> view.id_bits));
  const int32_t id = static_cast<int32_t>(mine & ((Wide{1} << view.id_bits) - 1));
  out[rank] = {id, static_cast<float>(logit - log_total)};
}

// Bits of the smallest logit that can weigh `weight` or more, and a little below for rounding.
__device__ uint32_t LeastForWeight(const RowView& view, double weight) {
  const double least = view.largest + (log2(weight) - 0x1p-8) / view.scale;
  const double lowest = -FLT_MAX, highest = view.largest;
  return Ordered(static_cast<float>(fmin(fmax(least, lowest), highest)));
}

// What top-k and top-p leave, and then what the weight of min-p leaves; `least`: bits that all of
// them have at least.
struct Kept {
  Wide last;
  float min_weight;
  uint32_t least;
};

// Tokens of a row without a prefix filter can weigh next to nothing.
__device__ Kept Filter(const RowView& view, const SampleJob& job, const float* weights,
                       ChooseShared* shared) {
  Kept kept = {~Wide{0}, job.min_p, 0};
  if (job.top_k > 0) {
    const Prefix best = BestTokens(view, job.top_k, job.top_p < 1.0f, shared);
    kept.last = best.last;
    if (job.top_p < 1.0f) {
      const double wanted = fmax(ceil(job.top_p * static_cast<double>(best.weight)), 1.0);
      kept.last = Narrow(view, best.last, static_cast<Wide>(wanted), true, true, shared).last;
    }
  } else if (job.top_p < 1.0f) {
    const double total = SumChunks(view, weights, view.scale);
    // Tokens lighter than (1 - p) total / vocab weigh less than (1 - p) total together, so the
    // others suffice. Half of it, for rounding.
    const uint32_t least = LeastForWeight(view, 0.5 * (1.0 - job.top_p) * total / view.width);
    Activate(view, least, shared);
    const double wanted = fmax(ceil(job.top_p * total * kUnits), 1.0);
    kept.last = Narrow(view, view.LastPosition(least), static_cast<Wide>(wanted), true, true,
                       shared).last;
  }
  const Wide steps = kept.last >> view.id_bits;
  if (steps < view.best) kept.least = view.best - static_cast<uint32_t>(steps);
  if (job.min_p > 0.0f) kept.least = max(kept.least, LeastForWeight(view, job.min_p));
  return kept;
}

// The lane's weights of a chunk, relative to its largest logit; zero for what may not be drawn.
__device__ float4 DrawableWeights(const RowView& view, const Kept& kept, int32_t chunk,
                                  const float4& x) {
  const float reference = Reference(view.bests[chunk]);
  const int32_t first = chunk * kChunk + static_cast<int32_t>(threadIdx.x % 32) * 4;
  const auto weight = [&](float logit, int32_t id) {
    const bool may = id < view.width && view.Position(logit, id) <= kept.last &&
                     Weight(logit, view.largest, view.scale) >= kept.min_weight;
    return may ? Weight(logit, reference, view.scale) : 0.0f;
  };
  return {weight(x.x, first), weight(x.y, first + 1), weight(x.z, first + 2),
          weight(x.w, first + 3)};
}

// The chunks' sums of what may be drawn.
__device__ void WeighKept(const RowView& view, const Kept& kept, float* weights,
                          ChooseShared* shared) {
  Activate(view, kept.least, shared);
  ForActiveChunks(view, *shared, [&](int32_t chunk, const float4& x) {
    const float4 w = DrawableWeights(view, kept, chunk, x);
    const float sum = WarpSum((w.x + w.y) + (w.z + w.w));
    if (threadIdx.x % 32 == 0) weights[chunk] = sum;
  });
  __syncthreads();
}

// Finds the chunk in which the running sum passes uniform * total, and how far into it.
__device__ void FindChunk(const RowView& view, const Kept& kept, const float* weights,
                          double uniform, ChooseShared* shared) {
  const int32_t each = (view.chunk_count + kChooseThreads - 1) / kChooseThreads;
  const int32_t begin = static_cast<int32_t>(threadIdx.x) * each;
  const int32_t end = min(begin + each, view.chunk_count);
  const auto factor = [&](int32_t c) {
    return Weight(Reference(view.bests[c]), view.largest, view.scale);
  };
  const auto weight = [&](int32_t c) {
    return view.bests[c] < kept.least ? 0.0 : static_cast<double>(weights[c] * factor(c));
  };
  double mine = 0, total;
  for (int32_t c = begin; c < end; ++c) mine += weight(c);
  const double through = BlockPrefix(mine, &total);
  const double wanted = uniform * total;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  int32_t owner = BlockMin(mine > 0 && through > wanted ? thread : kChooseThreads);
  // Rounding kept the sum below `wanted`: the last that can be drawn.
  const int32_t last = BlockMax(mine > 0 ? thread : -1);
  const bool beyond = owner == kChooseThreads;
  if (beyond) owner = last;
  if (thread == owner) {
    double sum = through - mine;
    for (int32_t c = begin; c < end; ++c) {
      const double w = weight(c);
      if (w <= 0) continue;
      shared->chunk = c;
      shared->rest = (wanted - sum) / factor(c);
      sum += w;
      if (!beyond && sum > wanted) break;
    }
  }
  __syncthreads();
}

// The chunk's first token whose running sum passes `rest`, else its last that can be drawn. A
// warp's.
__device__ int32_t FindToken(const RowView& view, const Kept& kept, int32_t chunk, double rest) {
  const float4 w = DrawableWeights(view, kept, chunk, view.Load(chunk));
  const double mine = (double{w.x} + w.y) + (double{w.z} + w.w);
  double sum = WarpPrefix(mine) - mine;
  int32_t found = -1, last = -1;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float weight = Element(w, j);
    sum += weight;
    if (weight <= 0) continue;
    last = j;
    if (found < 0 && sum > rest) found = j;
  }
  const unsigned passed = __ballot_sync(kAll, found >= 0);
  const unsigned drawable = __ballot_sync(kAll, last >= 0);
  const int lane = passed != 0 ? __ffs(static_cast<int>(passed)) - 1
                               : 31 - __clz(static_cast<int>(drawable | 1));
  const int32_t j = __shfl_sync(kAll, passed != 0 ? found : last, lane);
  return chunk * kChunk + lane * 4 + j;
}

__device__ void Draw(const RowView& view, const SampleJob& job, float* weights,
                     ChooseShared* shared) {
  Kept kept = {~Wide{0}, 0.0f, 0};
  if (job.filter) {
    kept = Filter(view, job, weights, shared);
    WeighKept(view, kept, weights, shared);
  }
  FindChunk(view, kept, weights, job.uniform, shared);
  if (threadIdx.x >= 32) return;
  const int32_t token = FindToken(view, kept, shared->chunk, shared->rest);
  if (threadIdx.x == 0) shared->token = token;
}

// A block a job. Leaves the token in shared->token.
__device__ void ChooseToken(const RowView& view, const SampleJob& job, int32_t best_chunk,
                            float* weights, ChooseShared* shared) {
  if (job.choice == SampleJob::kDraw) {
    Draw(view, job, weights, shared);
  } else if (job.choice == SampleJob::kBest && threadIdx.x < 32) {
    const int32_t token = FirstBest(view, best_chunk);
    if (threadIdx.x == 0) shared->token = token;
  } else if (threadIdx.x == 0) {
    shared->token = job.target;
  }
}

__global__ void __launch_bounds__(kChooseThreads, 2)
    Choose(const Matrix logits, const bool vector, const SampleJob* jobs,
           const SampleChunks chunks, const SeenToken* seen, const float* saved,
           const SampleOutput out) {
  __shared__ ChooseShared shared;
  LetKernelAfterStart();
  WaitForKernelBefore();
  const SampleJob job = jobs[blockIdx.x];
  const int64_t first = int64_t{blockIdx.x} * chunks.count;
  float* row = logits.row(job.row);
  RowView view = {row, job.vocab, vector, chunks.count, chunks.best + first};
  view.id_bits = 32 - __clz(view.width - 1);
  view.scale = job.scale;
  Wide mine = 0;  // the largest, and the first chunk that has it
  for (int32_t c = threadIdx.x; c < chunks.count; c += kChooseThreads) {
    const Wide key = Wide{view.bests[c]} << 32 | (kAll - static_cast<uint32_t>(c));
    mine = mine > key ? mine : key;
  }
  const Wide best = BlockMax(mine);
  view.best = static_cast<uint32_t>(best >> 32);
  view.largest = FromOrdered(view.best);
  const bool valid = view.best > kOrderedMinusInfinity && view.best < kOrderedInfinity;
  SampleResult& result = out.results[job.row];
  double log_total = job.log_total ? 0 : result.log_total;  // of a look before, if there was one
  if (threadIdx.x == 0) shared.token = -1;
  __syncthreads();
  if (valid && job.log_total) {
    log_total = view.largest + log(SumChunks(view, chunks.totals + first, kLog2E));
  }
  if (valid && job.top > 0) {
    ListBest(view, job.top, log_total, out.tops + int64_t{job.row} * Limits::kMaxTopLogprobs,
             &shared);
  }
  if (valid && job.choice != SampleJob::kNone) {
    ChooseToken(view, job, static_cast<int32_t>(kAll - static_cast<uint32_t>(best)),
                chunks.weights + first, &shared);
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < job.seen_count; i += kChooseThreads) {
    row[seen[job.first_seen + i].id] = saved[job.first_seen + i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const int32_t token = shared.token;
  const bool logprob = token >= 0 && job.logprob;
  result = {token, logprob ? static_cast<float>(row[token] - log_total) : 0.0f, log_total};
}

bool Vectors(const Matrix& logits) {
  return reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 && logits.stride % 4 == 0;
}

}  // namespace

cudaError_t LaunchScanChunks(Matrix logits, const SampleJob* jobs, int32_t count,
                             const SampleChunks& chunks, cudaStream_t stream) {
  constexpr int32_t kBlockChunks = kScanThreads / 32 * kScanChunks;
  const dim3 grid(DivideUp(chunks.count, kBlockChunks), count);
  const auto kernel = Vectors(logits) ? ScanChunks<true> : ScanChunks<false>;
  // Not programmatic: it may follow the copy of the jobs, which is no kernel.
  kernel<<<grid, kScanThreads, 0, stream>>>(logits, jobs, chunks);
  return cudaGetLastError();
}

cudaError_t LaunchPenalize(Matrix logits, const SampleJob* jobs, int32_t count,
                           const SeenToken* seen, int32_t most_seen, float* saved,
                           cudaStream_t stream) {
  const dim3 grid(DivideUp(most_seen, kSeenThreads), count);
  Penalize<<<grid, kSeenThreads, 0, stream>>>(logits, jobs, seen, saved);
  return cudaGetLastError();
}

cudaError_t LaunchChoose(Matrix logits, const SampleJob* jobs, int32_t count,
                         const SampleChunks& chunks, const SeenToken* seen, const float* saved,
                         const SampleOutput& out, cudaStream_t stream) {
  const LaunchShape shape{dim3(count), kChooseThreads};
  return Launch(Choose, shape, stream, logits, Vectors(logits), jobs, chunks, seen, saved, out);
}

}  // namespace lorikeet::cuda
