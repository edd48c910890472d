#include "engine/kernels/cuda/model_parts.h"

#include "engine/kernels/cuda/adapted_rows.cuh"
#include "engine/kernels/cuda/kv_pages.cuh"
#include "engine/kernels/cuda/launch.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kColumnsPerWarp = 4;

// Where `id` stands in the replaced rows, or -1.
__device__ int32_t FindReplaced(const ReplacedParts& replaced, int32_t id) {
  const int32_t rows = replaced.rows.rows;
  if (replaced.index.rows == 0) return id < rows ? id : -1;
  int32_t low = 0, high = rows;  // the first that is not below id
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (*replaced.index.row<int32_t>(middle) < id) low = middle + 1;
    else high = middle;
  }
  return low < rows && *replaced.index.row<int32_t>(low) == id ? low : -1;
}

template <typename T>
__device__ float AdaptEmbedding(const EmbeddingParts& parts, int32_t token, int32_t i, float value) {
  for (int32_t k = 0; k < parts.rank; ++k) {
    const float a = parts.scale * ToFloat(parts.a.row<T>(token)[k]);
    value += a * ToFloat(parts.b.row<T>(k)[i]);
  }
  return parts.out_scale.rows > 0 ? value * parts.out_scale.row<float>(0)[i] : value;
}

template <typename T>
__global__ void AdaptedEmbed(const T* table, const int32_t* tokens, const RowAdapters adapters,
                             const Matrix out) {
  const int32_t token = tokens[blockIdx.x];
  const AdapterParts* adapter = adapters.of(blockIdx.x);
  const T* from = table + int64_t{token} * out.width;
  if (token < 0) {  // never without an adapter
    const PagedRows& rows = adapter->virtual_tokens.rows;
    from = rows.rows > 0 ? rows.row<T>(-1 - token) : nullptr;
  } else if (adapter != nullptr) {
    const int32_t replaced = FindReplaced(adapter->embedding.replaced, token);
    if (replaced >= 0) from = adapter->embedding.replaced.rows.row<T>(replaced);
  }
  float* to = out.row(blockIdx.x);
  for (int32_t i = threadIdx.x; i < out.width; i += blockDim.x) {
    float value = from != nullptr ? ToFloat(from[i]) : 0.0f;
    if (token >= 0 && adapter != nullptr) {
      value = AdaptEmbedding<T>(adapter->embedding, token, i, value);
    }
    to[i] = value;
  }
}

template <typename T>
__global__ void StorePrefix(const int32_t* tokens, const RowAdapters adapters, int32_t layer,
                            const KvStep step) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.x, position = step.positions[row], token = tokens[row];
  if (token >= 0 || position < 0) return;
  const VirtualTokenParts& prefix = adapters.of(row)->virtual_tokens;
  if (prefix.kv.rows == 0) return;
  const int32_t dim = step.layout.head_dim, width = step.layout.kv_heads * dim;
  for (int32_t i = threadIdx.x; i < 2 * width; i += blockDim.x) {
    const int32_t value = i / width, c = i % width;
    const std::byte* block = KeyBlock(step, step.row_sequence[row],
                                      position / KvLayout::kPageTokens, layer, c / dim);
    T* kept = reinterpret_cast<T*>(const_cast<std::byte*>(block)) +
              int64_t{value} * step.layout.kv_heads * KvLayout::kPageTokens * dim;
    const int32_t from = (2 * layer + value) * prefix.count + (-1 - token);
    kept[position % KvLayout::kPageTokens * dim + c % dim] = prefix.kv.row<T>(from)[c];
  }
}

// A warp a head, a token at a time.
template <typename T>
__global__ void AttendPrompts(const AttentionArgs args, int32_t kv_heads, int32_t dim,
                                const RowAdapters adapters) {
  extern __shared__ float shared[];  // [warps, dim]
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.x, head = blockIdx.y * kAdaptedWarps + threadIdx.x / 32;
  const AdapterParts* adapter = adapters.of(row);
  if (head >= args.heads || adapter == nullptr || adapter->prompt_attention == nullptr) return;
  const PromptAttentionParts& prompt = adapter->prompt_attention[args.layer];
  if (prompt.count == 0) return;
  const int lane = threadIdx.x % 32;
  const int32_t column = head / (args.heads / kv_heads) * dim;
  const T* query = args.q.row<T>(row) + head * dim;
  float* sums = shared + threadIdx.x / 32 * dim;
  for (int32_t d = lane; d < dim; d += 32) sums[d] = 0;
  float top = -INFINITY, total = 0;
  for (int32_t t = 0; t < prompt.count; ++t) {
    const T* key = prompt.k.row<T>(t) + column;
    const T* value = prompt.v.row<T>(t) + column;
    float score = 0;
    for (int32_t d = lane; d < dim; d += 32) score += ToFloat(query[d]) * ToFloat(key[d]);
    score = WarpSum(score) * args.scale;
    const float new_top = fmaxf(top, score);
    const float shrink = expf(top - new_top), weight = expf(score - new_top);
    total = total * shrink + weight;
    top = new_top;
    for (int32_t d = lane; d < dim; d += 32) sums[d] = sums[d] * shrink + weight * ToFloat(value[d]);
  }
  T* out = args.out.row<T>(row) + head * dim;
  for (int32_t d = lane; d < dim; d += 32) {
    out[d] = FromFloat<T>(ToFloat(out[d]) + prompt.gate * sums[d] / total);
  }
}

__device__ float Activate(Activation activation, float z) {
  switch (activation) {
    case Activation::kSilu: return z / (1 + expf(-z));
    case Activation::kRelu: return fmaxf(z, 0.0f);
    case Activation::kGelu: return 0.5f * z * (1 + erff(z * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * z * (1 + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    case Activation::kTanh: return tanhf(z);
    case Activation::kSigmoid: return 1 / (1 + expf(-z));
    case Activation::kIdentity: return z;
  }
  return z;
}

// Eight elements of a bottleneck's input.
template <typename T>
__device__ Vec8<float> LoadInput(const BottleneckArgs& args, Bottleneck::Input input, int32_t row,
                                 int32_t column) {
  if (input == Bottleneck::Input::kResidual) return LoadVec(args.x.row(row) + column);
  Vec8<float> z = LoadWide(args.delta.row<T>(row) + column);
  if (input == Bottleneck::Input::kOutput) return z;
  const Vec8<float> residual = LoadVec(args.x.row(row) + column);
#pragma unroll
  for (int j = 0; j < 8; ++j) z.v[j] += residual.v[j];
  return z;
}

// A warp one of the bottleneck's width, of a few rows.
template <typename T>
__global__ void __launch_bounds__(kAdaptedThreads)
    BottleneckDown(const BottleneckArgs args, const RowAdapters adapters, float* inner) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t begin = blockIdx.y * kAdaptedRows, width = args.x.width;
  ForEachAdapter(adapters, begin, args.x.rows, [&](const AdapterParts& adapter, uint32_t mask) {
    if (adapter.bottlenecks == nullptr) return;
    const BottleneckParts& b = adapter.bottlenecks[args.block];
    const int32_t warp = blockIdx.x * kAdaptedWarps + threadIdx.x / 32;
    for (int32_t m = warp; m < b.width; m += gridDim.x * kAdaptedWarps) {
      float sums[kAdaptedRows] = {};
      AddDots(b.down.row<T>(m), width, mask,
              [&](int i, int32_t c) { return LoadInput<T>(args, b.input, begin + i, c); }, sums);
      StoreSums(mask, sums, [&](int i, float sum) {
        const float z = sum + b.down_bias.row<float>(0)[m];
        inner[int64_t{begin + i} * width + m] = Activate(b.activation, z);
      });
    }
  });
}

// A warp one of the model's width.
template <typename T>
__global__ void __launch_bounds__(kAdaptedThreads)
    BottleneckUp(const BottleneckArgs args, const RowAdapters adapters, const float* inner) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t begin = blockIdx.y * kAdaptedRows, width = args.x.width;
  ForEachAdapter(adapters, begin, args.x.rows, [&](const AdapterParts& adapter, uint32_t mask) {
    if (adapter.bottlenecks == nullptr) return;
    const BottleneckParts& b = adapter.bottlenecks[args.block];
    if (b.width == 0) return;
    const int32_t warp = blockIdx.x * kAdaptedWarps + threadIdx.x / 32;
    for (int32_t o = warp; o < width; o += gridDim.x * kAdaptedWarps) {
      const T* up = b.up.row<T>(o);
      float sums[kAdaptedRows] = {};
      for (int32_t m = threadIdx.x % 32; m < b.width; m += 32) {
        const float weight = ToFloat(up[m]);
        ForEachRow(mask, [&](int i) { sums[i] += weight * inner[int64_t{begin + i} * width + m]; });
      }
      StoreSums(mask, sums, [&](int i, float sum) {
        T* h = args.delta.row<T>(begin + i) + o;
        *h = FromFloat<T>(ToFloat(*h) + b.scale * (sum + b.up_bias.row<float>(0)[o]));
      });
    }
  });
}

}  // namespace

cudaError_t LaunchAdaptedEmbed(const void* table, DType dtype, const int32_t* tokens,
                               const RowAdapters& adapters, Matrix out, cudaStream_t stream) {
  return WithType(dtype, [&]<typename T>(T) {
    // Not programmatic: it follows the copy of the step's arrays, which is no kernel.
    AdaptedEmbed<T><<<out.rows, kAdaptedThreads, 0, stream>>>(static_cast<const T*>(table), tokens,
                                                              adapters, out);
    return cudaGetLastError();
  });
}

cudaError_t LaunchStorePrefix(const int32_t* tokens, const RowAdapters& adapters, int32_t layer,
                              int32_t rows, const KvStep& step, cudaStream_t stream) {
  return WithType(step.layout.dtype, [&]<typename T>(T) {
    return Launch(StorePrefix<T>, {dim3(rows), kAdaptedThreads}, stream, tokens, adapters, layer,
                  step);
  });
}

cudaError_t LaunchPromptAttention(const AttentionArgs& args, int32_t kv_heads, int32_t head_dim,
                                  const RowAdapters& adapters, cudaStream_t stream) {
  const LaunchShape shape{dim3(args.q.rows, DivideUp(args.heads, kAdaptedWarps)), kAdaptedThreads,
                          kAdaptedWarps * head_dim * static_cast<int32_t>(sizeof(float))};
  return WithType(args.q.dtype, [&]<typename T>(T) {
    return Launch(AttendPrompts<T>, shape, stream, args, kv_heads, head_dim, adapters);
  });
}

cudaError_t LaunchBottlenecks(const BottleneckArgs& args, const RowAdapters& adapters, float* inner,
                              cudaStream_t stream) {
  const LaunchShape shape{dim3(DivideUp(args.x.width, kAdaptedWarps * kColumnsPerWarp),
                               DivideUp(args.x.rows, kAdaptedRows)),
                          kAdaptedThreads};
  return WithType(args.delta.dtype, [&]<typename T>(T) {
    const cudaError_t error = Launch(BottleneckDown<T>, shape, stream, args, adapters, inner);
    return error == cudaSuccess ? Launch(BottleneckUp<T>, shape, stream, args, adapters, inner)
                                : error;
  });
}

}  // namespace lorikeet::cuda
