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
constexpr int kKroneckerBlocks = 32;  // of a row and part
constexpr int kCirculantFloats = kMaxCirculantBlock;
static_assert(sizeof(float) * std::max(kKroneckerFloats, kCirculantFloats) <= 48 << 10,
              "what a kernel gets unasked");

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
  const int32_t column = c % parts->rotation_block, first = c - column;
  float sum = 0;
  RowCursor<T> rotation(parts->rotation, first);
#pragma unroll 4
  for (int32_t i = 0; i < parts->rotation_block; ++i) {
    sum += ToFloat(from[first + i]) * ToFloat(rotation.Next()[column]);
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

// A thread an output of one row, a few of the row's blocks at a time.
template <typename T, typename Y>
__global__ void __launch_bounds__(kAdaptedThreads) AddCirculant(const StructuredArgs args) {
  __shared__ float shared[kCirculantFloats];  // [blocks, b] of x
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.y, part = blockIdx.z;
  const AdapterParts* adapter = args.adapters.of(row);
  if (adapter == nullptr || adapter->modules == nullptr) return;
  const ModuleParts& m = adapter->modules[args.first_module + part];
  const int32_t b = m.circulant_block;
  if (b == 0) return;
  const T* x = args.x.row<T>(row);
  const int32_t o = blockIdx.x * blockDim.x + threadIdx.x, k = o % b;
  const int32_t blocks = args.x.width / b, at_once = max(1, kCirculantFloats / 8 / b);
  const bool mine = o < args.out[part];
  float sum = 0;
  for (int32_t first = 0; first < blocks; first += at_once) {
    const int32_t count = min(at_once, blocks - first);
    for (int32_t i = threadIdx.x; i < count * b; i += blockDim.x) {
      shared[i] = ToFloat(x[first * b + i]);
    }
    __syncthreads();
    RowCursor<T> kernels(m.circulant, (mine ? o / b : 0) * blocks + first);
    for (int32_t n = 0; n < count; ++n) {
      const T* kernel = kernels.Next();
      const float* values = shared + n * b;
#pragma unroll 8
      for (int32_t j = 0; j < b; ++j) {
        const int32_t at = k + j < b ? k + j : k + j - b;
        sum += ToFloat(kernel[j]) * values[at];
      }
    }
    __syncthreads();
  }
  if (mine) Add(args.y.row<Y>(row) + FirstColumn(args, part) + o, sum);
}

// s = w1 X w2ᵀ of one row, a few columns of w2ᵀ at a time.
template <typename T, typename Y>
__global__ void __launch_bounds__(kAdaptedThreads) AddKronecker(const StructuredArgs args) {
  __shared__ float shared[kKroneckerFloats];  // [in1, columns] of X w2ᵀ
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.y, part = blockIdx.z;
  const AdapterParts* adapter = args.adapters.of(row);
  if (adapter == nullptr || adapter->modules == nullptr) return;
  const ModuleParts& m = adapter->modules[args.first_module + part];
  if (m.w1.rows == 0) return;
  const T* x = args.x.row<T>(row);
  Y* y = args.y.row<Y>(row) + FirstColumn(args, part);
  const int32_t most = min(kKroneckerFloats / m.in1, DivideUp(m.out2, gridDim.x));
  for (int32_t q = blockIdx.x * most; q < m.out2; q += gridDim.x * most) {
    const int32_t columns = min(most, m.out2 - q);
    for (int32_t i = threadIdx.x; i < m.in1 * columns; i += blockDim.x) {
      const T* w2 = m.w2.row<T>(q + i % columns);
      const T* from = x + int64_t{i / columns} * m.in2;
      float sum = 0;
#pragma unroll 8
      for (int32_t j = 0; j < m.in2; ++j) sum += ToFloat(w2[j]) * ToFloat(from[j]);
      shared[i] = sum;
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < m.out1 * columns; i += blockDim.x) {
      const T* w1 = m.w1.row<T>(i / columns);
      float sum = 0;
#pragma unroll 8
      for (int32_t p = 0; p < m.in1; ++p) sum += ToFloat(w1[p]) * shared[p * columns + i % columns];
      Add(y + int64_t{i / columns} * m.out2 + q + i % columns, sum);
    }
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
    launch(Part::kCirculant, AddCirculant<T, Y>, ThreadShape(args));
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
