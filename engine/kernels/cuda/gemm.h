// Dense products: those of few rows as skinny_gemm.h or stream_gemm.h, the others through cuBLASLt or as
// tile_gemm.h, whichever takes less time. Batch-invariant ones as stream_gemm.h or tile_gemm.h, whose sums are the same chains.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <map>
#include <tuple>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/cuda_status.h"

namespace lorikeet::cuda {

// `rows` rounded up to one of few numbers, for each of which products are chosen and steps recorded once: never
// more than an eighth too many, of steps that compute rather than read a sixteenth.
int32_t PaddedRows(int32_t rows);

// One stream's products. The first of a shape that goes to cuBLASLt measures its proposals and keeps
// the fastest, unless the stream is being recorded: then the first proposal serves. It serves all numbers of rows
// that are padded to the same, so that choosing ends when each of those has been there. Not thread-safe.
class Gemm {
 public:
  explicit Gemm(FirstError* errors, bool batch_invariant = false);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // y = x Wᵀ with float32 sums. weight: [y.width, x.width] of x's type; y is of x's type or float32.
  // `beside`: other kernels run at the same time.
  void Multiply(Matrix weight, Matrix x, Matrix y, cudaStream_t stream, bool beside = false);
  // The same by cuBLASLt.
  void MultiplyByLibrary(Matrix weight, Matrix x, Matrix y, cudaStream_t stream);
  // Over `more` columns behind those of weight and x, as well; what is fastest without them serves.
  void MultiplyExtended(Matrix weight, Matrix x, Matrix y, int32_t more, cudaStream_t stream);
  // out = silu(gate) ∘ up, the halves of what Multiply or, with `more`, MultiplyExtended would make of gate_up:
  // in one without rounding it where rows are few or that takes less time, else by way of it.
  void MultiplyGated(Matrix weight, Matrix x, Matrix gate_up, Matrix out, int32_t more, cudaStream_t stream);

 private:
  struct Choice {
    cublasLtMatmulAlgo_t algorithm = {};
    bool tiled = false;  // tile_gemm.h's takes less time
  };
  struct Plan {
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t weight = nullptr, x = nullptr, y = nullptr;
    Choice choice;
  };
  // in, out, rows, strides of the three, types of x and y, the least alignment of the three
  using Key = std::tuple<int32_t, int32_t, int32_t, int64_t, int64_t, int64_t, DType, DType, uint32_t>;
  struct Proposals;

  // REQUIRES: CanStream of up to kMaxStreamedRows rows of x.
  void MultiplyInvariantly(Matrix weight, Matrix x, Matrix y, cudaStream_t stream);
  static Key KeyOf(Matrix weight, Matrix x, Matrix y);
  const Plan* PlanFor(Matrix weight, Matrix x, Matrix y, cudaStream_t stream);
  // With no algorithm yet.
  Plan Describe(Matrix weight, Matrix x, Matrix y);
  Proposals Propose(const Plan& plan, Matrix weight, Matrix x, Matrix y);
  Choice Choose(Matrix weight, Matrix x, Matrix y, cudaStream_t stream, const Plan& plan);
  bool Serves(const Choice& choice, const Plan& plan);
  bool InOneIsFaster(Matrix weight, Matrix x, Matrix gate_up, Matrix out, cudaStream_t stream);
  void Run(const Plan& plan, Matrix weight, Matrix x, Matrix y, cudaStream_t stream);
  void Note(cublasStatus_t status, const char* what);

  FirstError* const errors_;
  const bool batch_invariant_;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  std::map<Key, Choice> choices_;  // by padded rows
  std::map<Key, bool> in_one_;     // likewise: of gated products
  std::map<Key, Plan> plans_;
};

}  // namespace lorikeet::cuda
