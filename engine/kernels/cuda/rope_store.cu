// Rotary embedding and key/value store, and attention of any type and width.
#include <algorithm>

#include "engine/kernels/cuda/attention.h"
#include "engine/kernels/cuda/kv_pages.cuh"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kPageTokens = KvLayout::kPageTokens;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// ---- any type and width: a warp a row and head, a token at a time

template <typename T>
__global__ void PlainAttention(const AttentionArgs args, const KvStep step) {
  extern __shared__ float shared[];  // [warps][2][head_dim]: query, sums
  WaitForKernelBefore();
  const int32_t dim = step.layout.head_dim;
  const int32_t row = blockIdx.x, head = blockIdx.y * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int32_t position = step.positions[row];
  if (head >= args.heads || position < 0) return;
  const int32_t kv_head = head / (args.heads / step.layout.kv_heads);
  float* query = shared + threadIdx.x / 32 * 2 * dim;
  float* sums = query + dim;
  for (int32_t d = lane; d < dim; d += 32) {
    query[d] = ToFloat(args.q.row<T>(row)[head * dim + d]);
    sums[d] = 0;
  }
  float top = -INFINITY, total = 0;
  for (int32_t at = args.window > 0 ? max(0, position - args.window + 1) : 0; at <= position; ++at) {
    const T* keys = reinterpret_cast<const T*>(
        KeyBlock(step, step.row_sequence[row], at / kPageTokens, args.layer, kv_head));
    const T* key = keys + at % kPageTokens * dim;
    const T* value = key + int64_t{step.layout.kv_heads} * kPageTokens * dim;
    float score = 0;
    for (int32_t d = lane; d < dim; d += 32) score += query[d] * ToFloat(key[d]);
    score = WarpSum(score) * args.scale;
    const float new_top = fmaxf(top, score);
    const float shrink = expf(top - new_top), weight = expf(score - new_top);
    total = total * shrink + weight;
    top = new_top;
    for (int32_t d = lane; d < dim; d += 32) sums[d] = sums[d] * shrink + weight * ToFloat(value[d]);
  }
  for (int32_t d = lane; d < dim; d += 32) {
    args.out.row<T>(row)[head * dim + d] = FromFloat<T>(sums[d] / total);
  }
}

// ---- rotary embedding and store

template <typename T, int kWide>
struct alignas(kWide == 1 ? sizeof(T) : 16) Elements {
  T v[kWide];
};

// One head of a row: where it is read, what is added, where it goes.
template <typename T>
struct Head {
  const T* from;
  const T* low_rank;  // or nullptr
  T* to;
  const float* norm;  // or nullptr

  template <int kWide>
  __device__ void Load(int32_t d, float (&out)[kWide]) const {
    using Vec = Elements<T, kWide>;
    const Vec x = *reinterpret_cast<const Vec*>(from + d);
#pragma unroll
    for (int j = 0; j < kWide; ++j) out[j] = ToFloat(x.v[j]);
    if (low_rank == nullptr) return;
    const Vec more = *reinterpret_cast<const Vec*>(low_rank + d);
#pragma unroll
    for (int j = 0; j < kWide; ++j) out[j] += ToFloat(more.v[j]);
  }
  template <int kWide>
  __device__ void Store(int32_t d, const float (&values)[kWide]) const {
    Elements<T, kWide> x;
#pragma unroll
    for (int j = 0; j < kWide; ++j) x.v[j] = FromFloat<T>(values[j]);
    *reinterpret_cast<Elements<T, kWide>*>(to + d) = x;
  }
};

// 1 / root mean square of the head that `lanes` lanes share.
template <typename T, int kWide>
__device__ float InverseRms(const Head<T>& head, int32_t lane, int32_t lanes, int32_t dim,
                            float eps) {
  float squares = 0;
  for (int32_t d = lane * kWide; d < dim; d += lanes * kWide) {
    float x[kWide];
    head.Load(d, x);
#pragma unroll
    for (int j = 0; j < kWide; ++j) squares += x[j] * x[j];
  }
  for (int32_t offset = lanes / 2; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(~0u, squares, offset);
  }
  return rsqrtf(squares / dim + eps);
}

// A block a row; `lanes` lanes a head, kWide elements of either half each: the query heads, then K's,
// then V's.
template <typename T, int kWide>
__global__ void RopeStore(const RopeStoreArgs args, const Beside beside, const KvStep step,
                          int32_t lanes) {
  extern __shared__ float2 turns[];  // [head_dim / 2]: cosine and sine
  LetKernelAfterStart();
  const int32_t row = blockIdx.x, dim = args.head_dim, half = dim / 2;
  const int32_t heads = args.q.width / dim, kv_heads = step.layout.kv_heads;
  const int32_t position = step.positions[row];
  if (position < 0) return WaitForKernelBefore();
  for (int32_t i = threadIdx.x; i < half; i += blockDim.x) {
    // Hugging Face multiplies in float32; so does this.
    turns[i] = {1, 0};
    if (args.inverse_frequencies != nullptr) {
      sincosf(static_cast<float>(position) * args.inverse_frequencies[i], &turns[i].y, &turns[i].x);
    }
  }
  const std::byte* const keys = KeyBlock(step, step.row_sequence[row], position / kPageTokens, args.layer, 0);
  const bool added = beside.delta.data != nullptr && (beside.adapted[row] & beside.which) != 0;
  const T* low_rank = added ? beside.delta.row<T>(row) : nullptr;
  __syncthreads();
  WaitForKernelBefore();
  const int32_t lane = threadIdx.x % lanes;
  // Whole warps stay together for the sums over lanes.
  const int32_t all = DivideUp(heads + 2 * kv_heads, 32 / lanes) * (32 / lanes);
  for (int32_t index = threadIdx.x / lanes; index < all; index += blockDim.x / lanes) {
    const bool there = index < heads + 2 * kv_heads;
    const int32_t of_kv = max(0, min(index, heads + 2 * kv_heads - 1) - heads);
    const bool query = index < heads, value = of_kv >= kv_heads;
    const int32_t head = query ? index : of_kv % kv_heads;
    const Matrix& from = query ? args.q : value ? args.v : args.k;
    Head<T> one{from.row<T>(row) + int64_t{head} * dim, nullptr, nullptr,
                query ? args.q_norm : value ? nullptr : args.k_norm};
    if (low_rank != nullptr && there) one.low_rank = low_rank + int64_t{index} * dim;
    one.to = const_cast<T*>(one.from);
    if (!query) {
      const int32_t block = value ? kv_heads + head : head;
      one.to = reinterpret_cast<T*>(const_cast<std::byte*>(keys)) +
               (int64_t{block} * kPageTokens + position % kPageTokens) * dim;
    }
    float scale = 1;
    if (args.q_norm != nullptr) scale = InverseRms<T, kWide>(one, lane, lanes, dim, args.norm_eps);
    for (int32_t i = lane * kWide; there && i < half; i += lanes * kWide) {
      float a[kWide], b[kWide];
      one.Load(i, a);
      one.Load(i + half, b);
      if (!value) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          const float2 turn = turns[i + j];
          if (one.norm != nullptr) {
            a[j] *= scale * one.norm[i + j], b[j] *= scale * one.norm[i + j + half];
          }
          const float low = a[j] * turn.x - b[j] * turn.y;
          b[j] = b[j] * turn.x + a[j] * turn.y;
          a[j] = low;
        }
      }
      one.Store(i, a);
      one.Store(i + half, b);
    }
  }
}

template <typename T, int kWide>
cudaError_t RopeOf(const RopeStoreArgs& args, const Beside& beside, const KvStep& step,
                   cudaStream_t stream) {
  constexpr int32_t kMostThreads = 512;
  const int32_t half = args.head_dim / 2, heads = args.q.width / args.head_dim;
  int32_t lanes = 1;
  while (lanes < 32 && lanes * kWide < half) lanes *= 2;
  const int32_t wanted = (heads + 2 * step.layout.kv_heads) * lanes;
  const LaunchShape shape{dim3(args.q.rows),
                          FewerForMany(args.q.rows, std::min(kMostThreads, DivideUp(wanted, 32) * 32)),
                          half * static_cast<int32_t>(sizeof(float2))};
  return Launch(RopeStore<T, kWide>, shape, stream, args, beside, step, lanes);
}

template <typename T>
cudaError_t PlainOf(const AttentionArgs& args, const KvStep& step, cudaStream_t stream) {
  const int32_t shared = kWarps * 2 * step.layout.head_dim * static_cast<int32_t>(sizeof(float));
  const dim3 grid(args.q.rows, DivideUp(args.heads, kWarps));
  return Launch(PlainAttention<T>, {grid, kThreads, shared}, stream, args, step);
}

}  // namespace

cudaError_t LaunchPlainAttention(const AttentionArgs& args, const KvStep& step,
                                 cudaStream_t stream) {
  return WithType(args.q.dtype, [&]<typename T>(T) { return PlainOf<T>(args, step, stream); });
}

cudaError_t LaunchRopeStore(const RopeStoreArgs& args, const Beside& beside, const KvStep& step,
                            cudaStream_t stream) {
  return WithType(args.q.dtype, [&]<typename T>(T) {
    if (args.head_dim % 16 == 0) return RopeOf<T, 8>(args, beside, step, stream);
    return RopeOf<T, 1>(args, beside, step, stream);
  });
}

}  // namespace lorikeet::cuda
