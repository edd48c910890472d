#include "engine/kernels/cuda/structured.h"

#include <algorithm>

#include "engine/kernels/cuda/adapted_rows.cuh"
#include "engine/kernels/cuda/adapter_image.h"
#include "engine/kernels/cuda/launch.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kSpreadRows = 64;   // outputs are spread over as many warps as there are, for
constexpr int kColumnsPerWarp = 4;    // more rows that many to each
constexpr int kKroneckerFloats = kMaxKroneckerRows;
constexpr int kKroneckerBlocks = 64;  // of a row and part
constexpr int kCirculantPairs = 4096;  // values of kernels that a block has at a time
constexpr int kThreadOutputs = 8;      // neighbours that a thread of a circulant delta adds up
constexpr int kCirculantOutputs = 32;  // that a block does
constexpr int kCirculantThreads = kCirculantOutputs / kThreadOutputs;  // of such a group a block has 64
constexpr int kDotLanes = 8;           // of a Kronecker delta's inner products
static_assert(sizeof(float) * std::max(kKroneckerFloats, kMaxCirculantBlock + kCirculantPairs) <= 48 << 10,
              "what a kernel gets unasked");
static_assert(kAdaptedWarps * kCirculantOutputs <= kCirculantPairs);

template <typename T>
__global__ void RotateInputs(const RowAdapters adapters, ModuleId module, const Matrix x,
                             const Matrix out) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= x.width) return;
  const AdapterParts* adapter = adapters.of(row);
  const T* from = x.row<T>(row);
  T* to = out.row<T>(row);
  const ModuleParts* parts =
      adapter != nullptr && adapter->modules != nullptr ? adapter->modules + module : nullptr;
  if (parts == nullptr || parts->rotation_block == 0) {
    to[c] = from[c];
    return;
  }
  const int32_t block = parts->rotation_block, column = c % block, first = c - column;
  const int64_t pitch = parts->rotation.pitch / sizeof(T);
  float sum = 0;
  for (int32_t i = 0; i < block;) {
    const T* rotation = parts->rotation.row<T>(first + i) + column;
    const int32_t end = i + min(block - i, static_cast<int32_t>(parts->rotation.together(first + i)));
#pragma unroll 16
    for (; i < end; ++i, rotation += pitch) sum += ToFloat(from[first + i]) * ToFloat(*rotation);
  }
  to[c] = FromFloat<T>(sum);
}

// Its columns in y begin here.
__device__ int32_t FirstColumn(const StructuredArgs& args, int32_t part) {
  int32_t column = 0;
  for (int32_t p = 0; p < part; ++p) column += args.out[p];
  return column;
}

template <typename Y>
__device__ void Add(Y* y, float value) {
  *y = FromFloat<Y>(ToFloat(*y) + value);
}

// This lane's share of the sparse and dense parts of S(x)[o].
template <typename T>
__device__ void AddOutput(const ModuleParts& module, const Matrix& x, int32_t begin, uint32_t mask,
                          int32_t o, float (&sums)[kAdaptedRows]) {
  const int lane = threadIdx.x % 32;
  if (module.dense.rows > 0) {
    AddDots(module.dense.row<T>(o), x.width, mask,
            [&](int i, int32_t c) { return LoadWide(x.row<T>(begin + i) + c); }, sums);
  }
  if (module.row_begin.rows > 0) {
    const int32_t end = *module.row_begin.row<int32_t>(o + 1);
    for (int32_t e = *module.row_begin.row<int32_t>(o) + lane; e < end; e += 32) {
      const float weight = *module.value.row<float>(e);
      const int32_t c = *module.column.row<int32_t>(e);
      ForEachRow(mask, [&](int i) { sums[i] += weight * ToFloat(x.row<T>(begin + i)[c]); });
    }
  }
}

// A warp an output of a few rows.
template <typename T, typename Y>
__global__ void __launch_bounds__(kAdaptedThreads) AddRows(const StructuredArgs args) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t part = blockIdx.z, begin = blockIdx.y * kAdaptedRows, out = args.out[part];
  const int32_t first_column = FirstColumn(args, part);
  ForEachAdapter(args.adapters, begin, args.x.rows, [&](const AdapterParts& adapter, uint32_t mask) {
    if (adapter.modules == nullptr) return;
    const ModuleParts& module = adapter.modules[args.first_module + part];
    if (module.dense.rows == 0 && module.row_begin.rows == 0) return;
    const int32_t warp = blockIdx.x * kAdaptedWarps + threadIdx.x / 32;
    for (int32_t o = warp; o < out; o += gridDim.x * kAdaptedWarps) {
      float sums[kAdaptedRows] = {};
      AddOutput<T>(module, args.x, begin, mask, o, sums);
      StoreSums(mask, sums, [&](int i, float sum) {
        Add(args.y.row<Y>(begin + i) + first_column + o, sum);
      });
    }
  });
}

// sums[i] += Σ_j kernel[j] · x[(at + i + j) mod b] over `count` of j. at < b.
__device__ void AddCirculantRun(const float* kernel, int32_t count, const float* x, int32_t b, int32_t at,
                                float (&sums)[kThreadOutputs]) {
  const auto next = [&] {
    const float value = x[at];
    at = at + 1 == b ? 0 : at + 1;
    return value;
  };
  float window[kThreadOutputs];
#pragma unroll
  for (float& value : window) value = next();
#pragma unroll 8
  for (int32_t j = 0; j < count; ++j) {
    const float weight = kernel[j];
#pragma unroll
    for (int i = 0; i < kThreadOutputs; ++i) sums[i] += weight * window[i];
#pragma unroll
    for (int i = 0; i + 1 < kThreadOutputs; ++i) window[i] = window[i + 1];
    window[kThreadOutputs - 1] = next();
  }
}

// This thread's share of kernels · x for its outputs from k on: of `pairs` of a kernel's value and an input,
// which go on from pair `first` of the blocks in x.
__device__ void AddCirculantPairs(const float* kernels, int32_t first, int32_t pairs, const float* x, int32_t b,
                                  int32_t k, float (&sums)[kThreadOutputs]) {
  constexpr int32_t kGroups = kAdaptedThreads / kCirculantThreads;
  const int32_t each = DivideUp(pairs, kGroups) | 1;  // odd: groups read other banks
  int32_t p = threadIdx.x / kCirculantThreads * each;
  for (const int32_t end = min(p + each, pairs); p < end;) {
    const int32_t block = (first + p) / b, j = (first + p) % b, count = min(end - p, b - j);
    AddCirculantRun(kernels + p, count, x + block * b, b, (k + j) % b, sums);
    p += count;
  }
}

// Of all threads of a block: the sums of outputs 0, 1, ... of its groups, output o's to thread o. `scratch`:
// floats that nobody uses.
__device__ float SumOfGroups(float (&sums)[kThreadOutputs], float* scratch) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (float& sum : sums) {
    for (int step = kCirculantThreads; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  }
  if (lane < kCirculantThreads) {
    for (int i = 0; i < kThreadOutputs; ++i) {
      scratch[warp * kCirculantOutputs + lane * kThreadOutputs + i] = sums[i];
    }
  }
  __syncthreads();
  float total = 0;
  if (threadIdx.x < kCirculantOutputs) {
    for (int w = 0; w < kAdaptedWarps; ++w) total += scratch[w * kCirculantOutputs + threadIdx.x];
  }
  return total;
}

// Widens rows [0, count) of `width` values to `to`, one behind the other: row(i) is where one lies. Of all threads of
// a block; with kVectors eight values at a time, where rows are as many and aligned so.
template <typename T, bool kVectors, typename Row>
__device__ void Widen(int32_t count, int32_t width, const Row& row, float* to) {
  constexpr int32_t kEach = kVectors ? 8 : 1;
  int32_t lanes = 32;  // of a row
  while (lanes < kAdaptedThreads && lanes * kEach < width) lanes *= 2;
#pragma unroll 4
  for (int32_t i = threadIdx.x / lanes; i < count; i += kAdaptedThreads / lanes) {
    const T* from = row(i);
    for (int32_t c = threadIdx.x % lanes * kEach; c < width; c += lanes * kEach) {
      if constexpr (kVectors) StoreVec(to + i * width + c, LoadWide(from + c));
      else to[i * width + c] = ToFloat(from[c]);
    }
  }
}

// S(x)[block · b + k + o] of one row for o in [0, kCirculantOutputs), output o's to thread o.
template <typename T, bool kVectors>
__device__ float CirculantOutputs(const PagedRows& circulant, int32_t b, const T* x, int32_t width, int32_t block,
                                  int32_t k, float* values, float* kernels) {
  const int32_t blocks = width / b, at_once = max(1, kCirculantPairs / b);
  const int32_t mine = k + threadIdx.x % kCirculantThreads * kThreadOutputs;
  float sums[kThreadOutputs] = {};
  for (int32_t n = 0; n < blocks; n += at_once) {
    const int32_t count = min(at_once, blocks - n);
    __syncthreads();  // others may still read
    Widen<T, kVectors>(1, count * b, [&](int32_t) { return x + n * b; }, values);
    for (int32_t first = 0; first < count * b; first += kCirculantPairs) {
      if (first > 0) __syncthreads();  // of one kernel alone, which is longer
      Widen<T, kVectors>(
          count, min(b - first, kCirculantPairs),
          [&](int32_t i) { return circulant.row<T>(block * blocks + n + i) + first; }, kernels);
      __syncthreads();
      AddCirculantPairs(kernels, first, min(count * b - first, kCirculantPairs), values, b, mine, sums);
    }
  }
  __syncthreads();
  return SumOfGroups(sums, kernels);
}

// A block some outputs of a few rows.
template <typename T, typename Y>
__global__ void __launch_bounds__(kAdaptedThreads) AddCirculant(const StructuredArgs args) {
  __shared__ alignas(16) float values[kMaxCirculantBlock];  // [blocks, b] of x
  __shared__ alignas(16) float kernels[kCirculantPairs];
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t part = blockIdx.z, begin = blockIdx.y * kAdaptedRows;
  ForEachAdapter(args.adapters, begin, args.x.rows, [&](const AdapterParts& adapter, uint32_t mask) {
    if (adapter.modules == nullptr) return;
    const ModuleParts& module = adapter.modules[args.first_module + part];
    const int32_t b = module.circulant_block;
    if (b == 0) return;
    const PagedRows circulant = module.circulant;
    const int32_t slices = DivideUp(b, kCirculantOutputs);
    for (int32_t s = blockIdx.x; s < args.out[part] / b * slices; s += gridDim.x) {
      const int32_t block = s / slices, k = s % slices * kCirculantOutputs, o = k + threadIdx.x;
      for (uint32_t left = mask; left != 0; left &= left - 1) {
        const int32_t row = begin + __ffs(left) - 1;
        const T* x = args.x.row<T>(row);
        const float sum =
            b % 8 == 0 ? CirculantOutputs<T, true>(circulant, b, x, args.x.width, block, k, values, kernels)
                       : CirculantOutputs<T, false>(circulant, b, x, args.x.width, block, k, values, kernels);
        if (threadIdx.x >= kCirculantOutputs || o >= b) continue;
        Add(args.y.row<Y>(row) + FirstColumn(args, part) + block * b + o, sum);
      }
    }
  });
}

// store(i, a(i) · b(i)) for i in [0, count): inner products of `width` values, each of some lanes.
template <typename Left, typename Right, typename Store>
__device__ void ForDots(int32_t count, int32_t width, const Left& a, const Right& b, const Store& store) {
  constexpr int32_t kGroups = kAdaptedThreads / kDotLanes;
  const int32_t lane = threadIdx.x % kDotLanes;
  for (int32_t first = 0; first < count; first += kGroups) {
    const int32_t i = first + threadIdx.x / kDotLanes;
    float sum = 0;
    if (i < count) {
      const auto* left = a(i);
      const auto* right = b(i);
#pragma unroll 8
      for (int32_t j = lane; j < width; j += kDotLanes) sum += ToFloat(left[j]) * ToFloat(right[j]);
    }
#pragma unroll
    for (int step = kDotLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (i < count && lane == 0) store(i, sum);
  }
}

// s = w1 X w2ᵀ of one row, a few columns of w2ᵀ at a time.
template <typename T, typename Y>
__global__ void __launch_bounds__(kAdaptedThreads) AddKronecker(const StructuredArgs args) {
  __shared__ float shared[kKroneckerFloats];  // [columns, in1]: X w2ᵀ, turned
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.y, part = blockIdx.z;
  const AdapterParts* adapter = args.adapters.of(row);
  if (adapter == nullptr || adapter->modules == nullptr) return;
  const ModuleParts& module = adapter->modules[args.first_module + part];
  if (module.w1.rows == 0) return;
  const PagedRows w1 = module.w1, w2 = module.w2;  // here, since what is stored might be theirs for all that is known
  const int32_t in1 = module.in1, in2 = module.in2, out1 = module.out1, out2 = module.out2;
  const T* x = args.x.row<T>(row);
  Y* y = args.y.row<Y>(row) + FirstColumn(args, part);
  const int32_t most = min(kKroneckerFloats / in1, DivideUp(out2, gridDim.x));
  for (int32_t q = blockIdx.x * most; q < out2; q += gridDim.x * most) {
    const int32_t columns = min(most, out2 - q);
    ForDots(in1 * columns, in2, [&](int32_t i) { return w2.row<T>(q + i / in1); },
            [&](int32_t i) { return x + int64_t{i % in1} * in2; },
            [&](int32_t i, float sum) { shared[i] = sum; });
    __syncthreads();
    ForDots(out1 * columns, in1, [&](int32_t i) { return w1.row<T>(i / columns); },
            [&](int32_t i) { return shared + i % columns * in1; },
            [&](int32_t i, float sum) { Add(y + int64_t{i / columns} * out2 + q + i % columns, sum); });
    __syncthreads();
  }
}

template <typename Y>
__global__ void RotateOutputs(const StructuredArgs args) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.y, part = blockIdx.z;
  const int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const AdapterParts* adapter = args.adapters.of(row);
  if (adapter == nullptr || adapter->modules == nullptr || i >= args.out[part]) return;
  const ModuleParts& module = adapter->modules[args.first_module + part];
  if (module.output_scale.rows == 0) return;
  const float* scale = module.output_scale.row<float>(0);
  Y* y = args.y.row<Y>(row) + FirstColumn(args, part);
  if (module.output_cross.rows == 0) {
    y[i] = FromFloat<Y>(ToFloat(y[i]) * scale[i]);
    return;
  }
  const int32_t half = module.output_half;
  if (i >= args.out[part] / 2) return;  // a thread a pair
  const float* cross = module.output_cross.row<float>(0);
  const int32_t a = i / half * 2 * half + i % half, b = a + half;
  const float first = ToFloat(y[a]), second = ToFloat(y[b]);
  y[a] = FromFloat<Y>(scale[a] * first - cross[a] * second);
  y[b] = FromFloat<Y>(scale[b] * second + cross[b] * first);
}

// A warp a replaced output of a few rows.
template <typename T, typename Y>
__global__ void __launch_bounds__(kAdaptedThreads) ReplaceOutputs(const StructuredArgs args) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t part = blockIdx.z, begin = blockIdx.y * kAdaptedRows;
  const int32_t first_column = FirstColumn(args, part);
  ForEachAdapter(args.adapters, begin, args.x.rows, [&](const AdapterParts& adapter, uint32_t mask) {
    if (adapter.modules == nullptr) return;
    const ReplacedParts& replaced = adapter.modules[args.first_module + part].replaced;
    const int32_t warp = blockIdx.x * kAdaptedWarps + threadIdx.x / 32;
    for (int32_t k = warp; k < replaced.rows.rows; k += gridDim.x * kAdaptedWarps) {
      const int32_t o = replaced.index.rows > 0 ? *replaced.index.row<int32_t>(k) : k;
      float sums[kAdaptedRows] = {};
      AddDots(replaced.rows.row<T>(k), args.x.width, mask,
              [&](int i, int32_t c) { return LoadWide(args.x.row<T>(begin + i) + c); }, sums);
      StoreSums(mask, sums, [&](int i, float sum) {
        args.y.row<Y>(begin + i)[first_column + o] = FromFloat<Y>(sum);
      });
    }
  });
}

int32_t Widest(const StructuredArgs& args) {
  return *std::max_element(args.out, args.out + args.parts);
}

// A warp an output or a few of them.
LaunchShape WarpShape(const StructuredArgs& args) {
  const int32_t columns = args.x.rows <= kSpreadRows ? 1 : kColumnsPerWarp;
  return {dim3(DivideUp(Widest(args), kAdaptedWarps * columns),
               DivideUp(args.x.rows, kAdaptedRows), args.parts),
          kAdaptedThreads};
}

// A thread an output.
LaunchShape ThreadShape(const StructuredArgs& args) {
  return {dim3(DivideUp(Widest(args), kAdaptedThreads), args.x.rows, args.parts), kAdaptedThreads};
}

// A block 32 outputs of a few rows, or so many times that as all of them would keep the device busy with blocks
// that find nothing to do.
LaunchShape CirculantShape(const StructuredArgs& args) {
  constexpr int32_t kBlocksPerMultiprocessor = 32;
  const int32_t rows = DivideUp(args.x.rows, kAdaptedRows);
  const int32_t most = DivideUp(Multiprocessors() * kBlocksPerMultiprocessor, rows * args.parts);
  return {dim3(std::min(most, DivideUp(Widest(args), kCirculantOutputs)), rows, args.parts), kAdaptedThreads};
}

// fn(T, Y): of x and of y.
template <typename Fn>
cudaError_t WithTypes(const StructuredArgs& args, const Fn& fn) {
  return WithType(args.x.dtype, [&]<typename T>(T t) {
    return args.y.dtype == DType::kF32 ? fn(t, float()) : fn(t, t);
  });
}

}  // namespace

cudaError_t LaunchRotateInputs(const RowAdapters& adapters, ModuleId module, Matrix x, Matrix out,
                               cudaStream_t stream) {
  const LaunchShape shape{dim3(DivideUp(x.width, kAdaptedThreads), x.rows), kAdaptedThreads};
  return WithType(x.dtype, [&]<typename T>(T) {
    return Launch(RotateInputs<T>, shape, stream, adapters, module, x, out);
  });
}

cudaError_t LaunchAddStructured(const StructuredArgs& args, cudaStream_t stream) {
  const LaunchShape by_row{dim3(kKroneckerBlocks, args.x.rows, args.parts), kAdaptedThreads};
  return WithTypes(args, [&]<typename T, typename Y>(T, Y) {
    cudaError_t error = cudaSuccess;
    const auto launch = [&](Part part, auto kernel, const LaunchShape& shape) {
      if (error != cudaSuccess || (args.used & Bit(part)) == 0) return;
      error = Launch(kernel, shape, stream, args);
    };
    launch(Part::kRows, AddRows<T, Y>, WarpShape(args));
    launch(Part::kCirculant, AddCirculant<T, Y>, CirculantShape(args));
    launch(Part::kKronecker, AddKronecker<T, Y>, by_row);
    return error;
  });
}

cudaError_t LaunchAdaptOutputs(const StructuredArgs& args, cudaStream_t stream) {
  return WithTypes(args, [&]<typename T, typename Y>(T, Y) {
    cudaError_t error = cudaSuccess;
    if (args.used & Bit(Part::kOutputRotation)) {
      error = Launch(RotateOutputs<Y>, ThreadShape(args), stream, args);
    }
    if (error == cudaSuccess && (args.used & Bit(Part::kReplacedRows)) != 0) {
      error = Launch(ReplaceOutputs<T, Y>, WarpShape(args), stream, args);
    }
    return error;
  });
}

}  // namespace lorikeet::cuda
