#include "engine/kernels/cuda/elementwise.h"

#include <algorithm>

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kMaxThreads = 512;
constexpr int kMaxVecs = 8;  // of a row's eights, a thread's: rows of up to 32,768

// Threads for a row taken eight elements at a time.
int32_t RowThreads(int32_t width) {
  return std::clamp(DivideUp(DivideUp(width, 8), 32) * 32, 32, kMaxThreads);
}

template <typename T>
__global__ void Embed(const T* table, const int32_t* tokens, const Matrix out) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const T* from = table + int64_t{tokens[blockIdx.x]} * out.width;
  float* to = out.row(blockIdx.x);
  for (int32_t i = threadIdx.x * 8; i < out.width; i += blockDim.x * 8) {
    const Vec8<T> values = LoadVec(from + i);
    Vec8<float> wide;
#pragma unroll
    for (int j = 0; j < 8; ++j) wide.v[j] = ToFloat(values.v[j]);
    StoreVec(to + i, wide);
  }
}

__device__ float BlockSum(float v) {
  __shared__ float warps[kMaxThreads / 32];
  v = WarpSum(v);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < blockDim.x / 32; ++i) sum += warps[i];
  return sum;
}

// Row r of what was kept apart, or nullptr.
template <typename T>
__device__ const T* BesideRow(const Beside& beside, int32_t r) {
  const bool there = beside.delta.data != nullptr && (beside.adapted[r] & beside.which) != 0;
  return there ? beside.delta.row<T>(r) : nullptr;
}

template <typename T>
__device__ void AddVec(const T* from, Vec8<float>* to) {
  const Vec8<T> values = LoadVec(from);
#pragma unroll
  for (int j = 0; j < 8; ++j) to->v[j] += ToFloat(values.v[j]);
}

// The row's norm weights.
__device__ const float* NormWeight(const NormArgs& args, const RowAdapters& adapters, int32_t r) {
  if (adapters.parts == nullptr) return args.weight;
  const AdapterParts* adapter = adapters.of(r);
  const bool own = adapter != nullptr && adapter->norms != nullptr && adapter->norms[args.norm].rows > 0;
  return own ? adapter->norms[args.norm].row<float>(0) : args.weight;
}

// A thread has up to kVecs times eight of a row's sums.
template <typename T, int kVecs>
__global__ void __launch_bounds__(kMaxThreads)
    AddRmsNorm(const NormArgs args, const Beside beside, const int32_t* logit_rows, const RowAdapters adapters) {
  LetKernelAfterStart();
  const bool compact = args.rows == RowSet::kLogits;
  const int32_t r = compact ? logit_rows[blockIdx.x] : blockIdx.x;
  const int32_t width = args.x.width;
  float* x = args.x.row(r);
  const T* delta = args.delta.data != nullptr ? args.delta.row<T>(r) : nullptr;
  const T* low_rank = BesideRow<T>(beside, r);
  const float* weights = NormWeight(args, adapters, r);
  const auto column = [](int v) { return static_cast<int32_t>((threadIdx.x + v * blockDim.x) * 8); };
  Vec8<float> weight[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (column(v) < width) weight[v] = LoadVec(weights + column(v));
  }
  WaitForKernelBefore();
  Vec8<float> values[kVecs];  // all are on their way before one is used
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (column(v) < width) values[v] = LoadVec(x + column(v));
  }
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int32_t i = column(v);
    if (i >= width) continue;
    if (delta != nullptr) {
      AddVec(delta + i, &values[v]);
      if (low_rank != nullptr) AddVec(low_rank + i, &values[v]);
      StoreVec(x + i, values[v]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += values[v].v[j] * values[v].v[j];
  }
  const float scale = rsqrtf(BlockSum(squares) / width + args.eps);
  T* out = args.out.row<T>(blockIdx.x);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int32_t i = column(v);
    if (i >= width) continue;
    Vec8<T> normed;
#pragma unroll
    for (int j = 0; j < 8; ++j) normed.v[j] = FromFloat<T>(values[v].v[j] * scale * weight[v].v[j]);
    StoreVec(out + i, normed);
  }
}

template <typename T>
__global__ void SwiGlu(const Matrix gate_up, const Beside beside, const Matrix out) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.x, i = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (i >= out.width) return;
  const T* from = gate_up.row<T>(row) + i;
  const T* low_rank = BesideRow<T>(beside, row);
  Vec8<float> gate = {}, up = {};
  AddVec(from, &gate);
  AddVec(from + out.width, &up);
  if (low_rank != nullptr) {
    AddVec(low_rank + i, &gate);
    AddVec(low_rank + i + out.width, &up);
  }
  Vec8<T> result;
#pragma unroll
  for (int j = 0; j < 8; ++j) result.v[j] = FromFloat<T>(GateUp(gate.v[j], up.v[j]));
  StoreVec(out.row<T>(row) + i, result);
}

template <typename T>
__global__ void AddBias(const Matrix y, const float* bias) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= y.width) return;
  T* value = y.row<T>(blockIdx.y) + i;
  *value = FromFloat<T>(ToFloat(*value) + bias[i]);
}

}  // namespace

cudaError_t LaunchEmbed(const void* table, DType dtype, const int32_t* tokens, Matrix out,
                        cudaStream_t stream) {
  return WithType(dtype, [&]<typename T>(T) {
    // Not programmatic: it follows the copy of the step's arrays, which is no kernel.
    Embed<T><<<out.rows, RowThreads(out.width), 0, stream>>>(static_cast<const T*>(table), tokens,
                                                            out);
    return cudaGetLastError();
  });
}

cudaError_t LaunchAddRmsNorm(const NormArgs& args, const Beside& beside, const int32_t* logit_rows,
                             const RowAdapters& adapters, bool batch_invariant, cudaStream_t stream) {
  const auto vecs_of = [&](int32_t threads) { return DivideUp(args.x.width, 8 * threads); };
  LaunchShape shape{dim3(args.out.rows), RowThreads(args.x.width)};
  const int32_t fewer = FewerForMany(args.out.rows, shape.threads);
  if (!batch_invariant && vecs_of(fewer) <= kMaxVecs) shape.threads = fewer;
  const int32_t vecs = vecs_of(shape.threads);
  return WithType(args.out.dtype, [&]<typename T>(T) {
    const auto launch = [&](auto kernel) {
      return Launch(kernel, shape, stream, args, beside, logit_rows, adapters);
    };
    if (vecs <= 1) return launch(AddRmsNorm<T, 1>);
    if (vecs <= 2) return launch(AddRmsNorm<T, 2>);
    if (vecs <= 4) return launch(AddRmsNorm<T, 4>);
    if (vecs <= kMaxVecs) return launch(AddRmsNorm<T, kMaxVecs>);
    return cudaErrorInvalidValue;
  });
}

cudaError_t LaunchSwiGlu(Matrix gate_up, const Beside& beside, Matrix out, cudaStream_t stream) {
  constexpr int32_t kThreads = 128;
  // Rows of pairs with experts are more than a grid's y may be.
  const LaunchShape shape{dim3(out.rows, DivideUp(out.width, 8 * kThreads)), kThreads};
  return WithType(out.dtype, [&]<typename T>(T) {
    return Launch(SwiGlu<T>, shape, stream, gate_up, beside, out);
  });
}

cudaError_t LaunchAddBias(Matrix y, const float* bias, cudaStream_t stream) {
  constexpr int32_t kThreads = 256;
  const LaunchShape shape{dim3(DivideUp(y.width, kThreads), y.rows), kThreads};
  return WithType(y.dtype, [&]<typename T>(T) {
    return Launch(AddBias<T>, shape, stream, y, bias);
  });
}

}  // namespace lorikeet::cuda
