#include "engine/kernels/cuda/structured.h"

#include <algorithm>

#include "engine/kernels/cuda/adapted_rows.cuh"
#include "engine/kernels/cuda/adapter_image.h"
#include "engine/kernels/cuda/launch.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kColumnsPerWarp = 4;
constexpr int kKroneckerFloats = kMaxKroneckerRows;
constexpr int kKroneckerBlocks = 16;  // of a row and part
static_assert(kKroneckerFloats * sizeof(float) <= 48 << 10, "what a kernel gets unasked");

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
  for (int32_t i = 0; i < parts->rotation_block; ++i) {
    sum += ToFloat(from[first + i]) * ToFloat(parts->rotation.row<T>(first + i)[column]);
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

// This lane's share of S(x)[o] but for its Kronecker part.
template <typename T>
__device__ void AddOutput(const ModuleParts& module, const Matrix& x, int32_t begin, uint32_t mask,
                          int32_t o, float (&sums)[kAdaptedRows]) {
  const int lane = threadIdx.x % 32;
  if (module.dense.rows > 0) {
    AddDots(module.dense.row<T>(o), x.width, mask,
            [&](int i, int32_t c) { return LoadWide(x.row<T>(begin + i) + c); }, sums);
  }
  if (const int32_t block = module.circulant_block; block > 0) {
    const int32_t blocks = x.width / block;
    for (int32_t n = 0; n < blocks; ++n) {
      const T* kernel = module.circulant.row<T>(o / block * blocks + n);
      for (int32_t j = lane; j < block; j += 32) {
        const float weight = ToFloat(kernel[j]);
        const int32_t c = n * block + (o % block + j) % block;
        ForEachRow(mask, [&](int i) { sums[i] += weight * ToFloat(x.row<T>(begin + i)[c]); });
      }
    }
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
__global__ void __launch_bounds__(kAdaptedThreads) AddStructured(const StructuredArgs args) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t part = blockIdx.z, begin = blockIdx.y * kAdaptedRows, out = args.out[part];
  const int32_t first_column = FirstColumn(args, part);
  ForEachAdapter(args.adapters, begin, args.x.rows, [&](const AdapterParts& adapter, uint32_t mask) {
    if (adapter.modules == nullptr) return;
    const ModuleParts& module = adapter.modules[args.first_module + part];
    if (module.dense.rows == 0 && module.circulant_block == 0 && module.row_begin.rows == 0) return;
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
      for (int32_t j = 0; j < m.in2; ++j) sum += ToFloat(w2[j]) * ToFloat(from[j]);
      shared[i] = sum;
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < m.out1 * columns; i += blockDim.x) {
      const T* w1 = m.w1.row<T>(i / columns);
      float sum = 0;
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

LaunchShape WarpShape(const StructuredArgs& args) {
  return {dim3(DivideUp(Widest(args), kAdaptedWarps * kColumnsPerWarp),
               DivideUp(args.x.rows, kAdaptedRows), args.parts),
          kAdaptedThreads};
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
    const cudaError_t error = Launch(AddStructured<T, Y>, WarpShape(args), stream, args);
    return error == cudaSuccess ? Launch(AddKronecker<T, Y>, by_row, stream, args) : error;
  });
}

cudaError_t LaunchAdaptOutputs(const StructuredArgs& args, cudaStream_t stream) {
  const LaunchShape by_row{dim3(DivideUp(Widest(args), kAdaptedThreads), args.y.rows, args.parts),
                           kAdaptedThreads};
  return WithTypes(args, [&]<typename T, typename Y>(T, Y) {
    const cudaError_t error = Launch(RotateOutputs<Y>, by_row, stream, args);
    return error == cudaSuccess ? Launch(ReplaceOutputs<T, Y>, WarpShape(args), stream, args) : error;
  });
}

}  // namespace lorikeet::cuda
