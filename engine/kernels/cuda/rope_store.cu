// Rotary embedding and key/value store, and attention of any type and width.
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

// A warp a head: the query heads, then K's, then V's.
template <typename T>
__global__ void RopeStore(const RopeStoreArgs args, const Beside beside, const KvStep step) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int lane = threadIdx.x % 32;
  const int32_t row = blockIdx.x, dim = args.head_dim, half = dim / 2;
  const int32_t heads = args.q.width / dim, kv_heads = step.layout.kv_heads;
  const int32_t index = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  const int32_t position = step.positions[row];
  if (index >= heads + 2 * kv_heads || position < 0) return;
  const bool query = index < heads, value = index >= heads + kv_heads;
  const int32_t head = query ? index : (index - heads) % kv_heads;
  const Matrix& from = query ? args.q : value ? args.v : args.k;
  T* x = from.row<T>(row) + int64_t{head} * dim;
  const T* low_rank = nullptr;
  if (beside.delta.data != nullptr && beside.adapted[row] != 0) {
    low_rank = beside.delta.row<T>(row) + int64_t{index} * dim;
  }
  const auto load = [&](int32_t d) {
    return ToFloat(x[d]) + (low_rank != nullptr ? ToFloat(low_rank[d]) : 0.0f);
  };
  T* kept = nullptr;
  if (!query) {
    const std::byte* block = KeyBlock(step, step.row_sequence[row], position / kPageTokens,
                                      args.layer, head);
    kept = reinterpret_cast<T*>(const_cast<std::byte*>(block)) + position % kPageTokens * dim;
    if (value) kept += int64_t{kv_heads} * kPageTokens * dim;
  }
  if (value) {
    for (int32_t d = lane; d < dim; d += 32) kept[d] = FromFloat<T>(load(d));
    return;
  }
  const float* norm = query ? args.q_norm : args.k_norm;
  float scale = 1;
  if (norm != nullptr) {
    float squares = 0;
    for (int32_t d = lane; d < dim; d += 32) squares += load(d) * load(d);
    scale = rsqrtf(WarpSum(squares) / dim + args.norm_eps);
  }
  for (int32_t i = lane; i < half; i += 32) {
    float a = load(i) * scale, b = load(i + half) * scale;
    if (norm != nullptr) a *= norm[i], b *= norm[i + half];
    float sin = 0, cos = 1;
    // Hugging Face multiplies in float32; so does this.
    if (args.inverse_frequencies != nullptr) {
      sincosf(static_cast<float>(position) * args.inverse_frequencies[i], &sin, &cos);
    }
    const T low = FromFloat<T>(a * cos - b * sin), high = FromFloat<T>(b * cos + a * sin);
    if (query) x[i] = low, x[i + half] = high;
    else kept[i] = low, kept[i + half] = high;
  }
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
  constexpr int32_t kHeadsPerBlock = 8;
  const int32_t heads = args.q.width / args.head_dim + 2 * step.layout.kv_heads;
  const LaunchShape shape{dim3(args.q.rows, DivideUp(heads, kHeadsPerBlock)), 32 * kHeadsPerBlock};
  return WithType(args.q.dtype, [&]<typename T>(T) {
    return Launch(RopeStore<T>, shape, stream, args, beside, step);
  });
}

}  // namespace lorikeet::cuda
