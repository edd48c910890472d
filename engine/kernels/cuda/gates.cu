#include "engine/kernels/cuda/gates.h"

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kThreads = 128;
static_assert(Limits::kMaxExperts <= kThreads, "a thread a LoRA");

// A block is one row of one part; a warp the score of a LoRA.
template <typename T>
__global__ void __launch_bounds__(kThreads) Share(const __grid_constant__ ShareArgs args) {
  __shared__ float scores[Limits::kMaxExperts], weights[Limits::kMaxExperts];
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = blockIdx.x, part = blockIdx.y;
  const AdapterParts* const adapter = args.adapters.of(row);
  if (adapter == nullptr || adapter->modules == nullptr) return;
  const PagedRows& prototypes = adapter->modules[args.first_module + part].prototypes;
  if (prototypes.rows == 0) return;
  const PrototypeGates gates = adapter->prototype_gates;
  const T* const x = args.x.row<T>(row);
  for (int32_t e = threadIdx.x / 32; e < gates.experts; e += kThreads / 32) {
    const float sum = WarpDot(prototypes.row<T>(e), x, args.x.width);
    if (threadIdx.x % 32 == 0) scores[e] = gates.magnitudes ? fabsf(sum) : sum;
  }
  __syncthreads();
  const int32_t mine = threadIdx.x;
  if (mine < gates.experts) {
    int32_t better = 0;  // the first of equals is
    float top = scores[0];
    for (int32_t e = 0; e < gates.experts; ++e) {
      better += scores[e] > scores[mine] || (scores[e] == scores[mine] && e < mine);
      top = fmaxf(top, scores[e]);
    }
    weights[mine] = better < gates.chosen ? expf((scores[mine] - top) / gates.temperature) : 0.0f;
  }
  __syncthreads();
  if (mine >= gates.experts) return;
  float sum = 0;
  for (int32_t e = 0; e < gates.experts; ++e) sum += weights[e];
  SharesOf(args.shares, args.parts, row, part)[mine] = weights[mine] / sum;
}

}  // namespace

cudaError_t LaunchShares(const ShareArgs& args, cudaStream_t stream) {
  const LaunchShape shape{dim3(args.x.rows, args.parts), kThreads};
  return WithType(args.x.dtype, [&]<typename T>(T) { return Launch(Share<T>, shape, stream, args); });
}

}  // namespace lorikeet::cuda
