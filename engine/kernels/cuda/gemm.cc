#include "engine/kernels/cuda/gemm.h"

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"

namespace lorikeet::cuda {
namespace {

constexpr size_t kWorkspaceBytes = 64 << 20;  // for products split along the contracted dimension

cudaDataType_t DataType(DType dtype) {
  switch (dtype) {
    case DType::kF32: return CUDA_R_32F;
    case DType::kF16: return CUDA_R_16F;
    case DType::kBF16: return CUDA_R_16BF;
    default: LK_CHECK_MSG(false, Info(dtype).name);
  }
}

}  // namespace

Gemm::Gemm(FirstError* errors) : errors_(errors) {
  Note(cublasLtCreate(&handle_), "cublasLtCreate");
  errors_->Note(cudaMalloc(&workspace_, kWorkspaceBytes), "workspace of cuBLASLt");
}

Gemm::~Gemm() {
  for (const auto& [key, plan] : plans_) {
    cublasLtMatrixLayoutDestroy(plan.y);
    cublasLtMatrixLayoutDestroy(plan.x);
    cublasLtMatrixLayoutDestroy(plan.weight);
    cublasLtMatmulDescDestroy(plan.product);
  }
  cudaFree(workspace_);
  cublasLtDestroy(handle_);
}

void Gemm::Note(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  errors_->Note(absl::InternalError(absl::StrCat(what, ": ", cublasLtGetStatusName(status), " (",
                                                 cublasLtGetStatusString(status), ")")));
}

// cuBLASLt counts columns first: yᵀ [out, rows] = W xᵀ, W stored as its transpose [in, out].
const Gemm::Plan* Gemm::PlanFor(Matrix x, Matrix y) {
  const Key key(x.width, y.width, x.rows, x.stride, y.stride, x.dtype, y.dtype);
  if (const auto found = plans_.find(key); found != plans_.end()) return &found->second;
  Plan plan;
  const cublasOperation_t transpose = CUBLAS_OP_T;
  Note(cublasLtMatmulDescCreate(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "matmul");
  Note(cublasLtMatmulDescSetAttribute(plan.product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                      sizeof transpose), "matmul");
  const cudaDataType_t type = DataType(x.dtype);
  Note(cublasLtMatrixLayoutCreate(&plan.weight, type, x.width, y.width, x.width), "layout");
  Note(cublasLtMatrixLayoutCreate(&plan.x, type, x.width, x.rows, x.stride), "layout");
  Note(cublasLtMatrixLayoutCreate(&plan.y, DataType(y.dtype), y.width, y.rows, y.stride), "layout");
  if (!Choose(&plan)) return nullptr;
  return &plans_.emplace(key, plan).first->second;
}

bool Gemm::Choose(Plan* plan) {
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulHeuristicResult_t best = {};
  int found = 0;
  Note(cublasLtMatmulPreferenceCreate(&preference), "preference");
  Note(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                            &kWorkspaceBytes, sizeof kWorkspaceBytes),
       "preference");
  Note(cublasLtMatmulAlgoGetHeuristic(handle_, plan->product, plan->weight, plan->x, plan->y,
                                      plan->y, preference, 1, &best, &found),
       "cublasLtMatmulAlgoGetHeuristic");
  cublasLtMatmulPreferenceDestroy(preference);
  plan->algorithm = best.algo;
  return found > 0;
}

void Gemm::Multiply(const void* weight, Matrix x, Matrix y, cudaStream_t stream) {
  const Plan* plan = PlanFor(x, y);
  if (plan == nullptr) return;
  const float one = 1, zero = 0;
  Note(cublasLtMatmul(handle_, plan->product, &one, weight, plan->weight, x.data, plan->x, &zero,
                      y.data, plan->y, y.data, plan->y, &plan->algorithm, workspace_,
                      kWorkspaceBytes, stream),
       "cublasLtMatmul");
}

}  // namespace lorikeet::cuda
