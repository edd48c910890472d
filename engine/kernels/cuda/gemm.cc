#include "engine/kernels/cuda/gemm.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/kernels/cuda/elementwise.h"
#include "engine/kernels/cuda/skinny_gemm.h"
#include "engine/kernels/cuda/stream_gemm.h"
#include "engine/kernels/cuda/tile_gemm.h"

namespace lorikeet::cuda {
namespace {

constexpr size_t kWorkspaceBytes = 64 << 20;  // for products split along the contracted dimension

constexpr int kProposals = 12;
constexpr int kFirstRuns = 2;  // that each is timed: the first brings its kernel to the device
constexpr int kBest = 3;       // of them are timed again,
constexpr int kRuns = 5;       // so often

// Milliseconds of the fastest run; `before` is not counted.
template <typename Before, typename Fn>
float FastestOf(int runs, cudaStream_t stream, const Before& before, const Fn& fn) {
  cudaEvent_t begin = nullptr, end = nullptr;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float fastest = std::numeric_limits<float>::infinity();
  for (int i = 0; i < runs; ++i) {
    before();
    cudaEventRecord(begin, stream);
    fn();
    cudaEventRecord(end, stream);
    float ms = 0;
    if (cudaEventSynchronize(end) == cudaSuccess && cudaEventElapsedTime(&ms, begin, end) == cudaSuccess) {
      fastest = std::min(fastest, ms);
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return fastest;
}

cudaDataType_t DataType(DType dtype) {
  switch (dtype) {
    case DType::kF32: return CUDA_R_32F;
    case DType::kF16: return CUDA_R_16F;
    case DType::kBF16: return CUDA_R_16BF;
    default: LK_CHECK_MSG(false, Info(dtype).name);
  }
}

// Bytes that all three are aligned to, as far as cuBLASLt asks.
uint32_t Alignment(const Matrix& weight, const Matrix& x, const Matrix& y) {
  constexpr uintptr_t kMost = 256;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(weight.data) | reinterpret_cast<uintptr_t>(x.data) |
                         reinterpret_cast<uintptr_t>(y.data) | kMost;
  return static_cast<uint32_t>(bits & -bits);
}

bool IsRecording(cudaStream_t stream) {
  cudaStreamCaptureStatus recording = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &recording);
  return recording != cudaStreamCaptureStatusNone;
}

}  // namespace

int32_t PaddedRows(int32_t rows) {
  constexpr int32_t kMostReading = 256;  // rows of steps that read rather than compute
  const int32_t units = rows <= kMostReading ? 16 : 32;
  int32_t unit = 1;
  while (unit * units < rows) unit *= 2;
  return (rows + unit - 1) / unit * unit;
}

struct Gemm::Proposals {
  std::array<cublasLtMatmulHeuristicResult_t, kProposals> of = {};
  int count = 0;
};

Gemm::Gemm(FirstError* errors, bool batch_invariant) : errors_(errors), batch_invariant_(batch_invariant) {
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
Gemm::Plan Gemm::Describe(Matrix weight, Matrix x, Matrix y) {
  Plan plan;
  const cublasOperation_t transpose = CUBLAS_OP_T;
  Note(cublasLtMatmulDescCreate(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "matmul");
  Note(cublasLtMatmulDescSetAttribute(plan.product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                      sizeof transpose), "matmul");
  const cudaDataType_t type = DataType(x.dtype);
  Note(cublasLtMatrixLayoutCreate(&plan.weight, type, x.width, y.width, weight.stride), "layout");
  Note(cublasLtMatrixLayoutCreate(&plan.x, type, x.width, x.rows, x.stride), "layout");
  Note(cublasLtMatrixLayoutCreate(&plan.y, DataType(y.dtype), y.width, y.rows, y.stride), "layout");
  return plan;
}

Gemm::Key Gemm::KeyOf(Matrix weight, Matrix x, Matrix y) {
  return {x.width, y.width, x.rows, weight.stride, x.stride, y.stride, x.dtype, y.dtype, Alignment(weight, x, y)};
}

const Gemm::Plan* Gemm::PlanFor(Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  const Key key = KeyOf(weight, x, y);
  if (const auto found = plans_.find(key); found != plans_.end()) return &found->second;
  Plan plan = Describe(weight, x, y);
  Matrix padded = x;
  padded.rows = PaddedRows(x.rows);
  const auto [choice, is_new] = choices_.try_emplace(KeyOf(weight, padded, y));
  if (is_new) choice->second = Choose(weight, x, y, stream, plan);
  plan.choice = choice->second;
  if (!is_new && !Serves(plan.choice, plan)) plan.choice = Choose(weight, x, y, stream, plan);
  return &plans_.emplace(key, plan).first->second;
}

Gemm::Proposals Gemm::Propose(const Plan& plan, Matrix weight, Matrix x, Matrix y) {
  cublasLtMatmulPreference_t preference = nullptr;
  Proposals proposals;
  Note(cublasLtMatmulPreferenceCreate(&preference), "preference");
  Note(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                            &kWorkspaceBytes, sizeof kWorkspaceBytes),
       "preference");
  const uint32_t alignment = Alignment(weight, x, y);
  for (const auto attribute : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    Note(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &alignment, sizeof alignment),
         "preference");
  }
  Note(cublasLtMatmulAlgoGetHeuristic(handle_, plan.product, plan.weight, plan.x, plan.y, plan.y, preference,
                                      kProposals, proposals.of.data(), &proposals.count),
       "cublasLtMatmulAlgoGetHeuristic");
  cublasLtMatmulPreferenceDestroy(preference);
  return proposals;
}

bool Gemm::Serves(const Choice& choice, const Plan& plan) {
  if (choice.tiled) return true;
  cublasLtMatmulHeuristicResult_t result = {};
  const cublasStatus_t status = cublasLtMatmulAlgoCheck(handle_, plan.product, plan.weight, plan.x, plan.y, plan.y,
                                                        &choice.algorithm, &result);
  return status == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kWorkspaceBytes;
}

Gemm::Choice Gemm::Choose(Matrix weight, Matrix x, Matrix y, cudaStream_t stream, const Plan& plan) {
  const Proposals proposals = Propose(plan, weight, x, y);
  Choice choice{.algorithm = proposals.of[0].algo};
  if (IsRecording(stream) || !errors_->status().ok()) return choice;
  std::vector<std::pair<float, int>> timed;  // milliseconds, proposal
  // Overwriting the workspace pushes the weight out of the second-level cache.
  const auto flush = [&] { cudaMemsetAsync(workspace_, 0, kWorkspaceBytes, stream); };
  const auto time = [&](int runs, int i) {
    Plan candidate = plan;
    candidate.choice.algorithm = proposals.of[i].algo;
    return FastestOf(runs, stream, flush, [&] { Run(candidate, weight, x, y, stream); });
  };
  for (int i = 0; i < proposals.count; ++i) {
    if (proposals.of[i].state == CUBLAS_STATUS_SUCCESS) timed.push_back({time(kFirstRuns, i), i});
  }
  std::sort(timed.begin(), timed.end());
  timed.resize(std::min<size_t>(timed.size(), kBest));
  for (auto& [ms, i] : timed) ms = std::min(ms, time(kRuns, i));
  const auto best = std::min_element(timed.begin(), timed.end());
  if (best == timed.end()) return choice;
  choice.algorithm = proposals.of[best->second].algo;
  if (x.rows <= kFewRows || !CanTile(weight, x, y)) return choice;
  const float tiled_ms = FastestOf(kRuns, stream, flush, [&] {
    errors_->Note(LaunchTileGemm(weight, x, y, stream), "a product of many rows");
  });
  choice.tiled = tiled_ms < best->first;
  return choice;
}

void Gemm::Run(const Plan& plan, Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  const float one = 1, zero = 0;
  Note(cublasLtMatmul(handle_, plan.product, &one, weight.data, plan.weight, x.data, plan.x, &zero,
                      y.data, plan.y, y.data, plan.y, &plan.choice.algorithm, workspace_, kWorkspaceBytes,
                      stream),
       "cublasLtMatmul");
}

void Gemm::MultiplyInvariantly(Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  if (x.rows > kMaxStreamedRows && CanTile(weight, x, y)) {
    errors_->Note(LaunchTileGemm(weight, x, y, stream), "a product of many rows");
    return;
  }
  for (int32_t first = 0; first < x.rows; first += kMaxStreamedRows) {
    const int32_t count = std::min(x.rows - first, kMaxStreamedRows);
    errors_->Note(LaunchStreamGemm(weight, x.Rows(first, count), y.Rows(first, count), stream, /*in_chains=*/true),
                  "a product of few rows");
  }
}

void Gemm::Multiply(Matrix weight, Matrix x, Matrix y, cudaStream_t stream, bool beside) {
  if (batch_invariant_) return MultiplyInvariantly(weight, x, y, stream);
  if (IsSkinny(weight, x, y)) {
    errors_->Note(LaunchSkinnyGemm(weight, x, y, stream), "a product of a handful of rows");
    return;
  }
  if ((x.rows <= kFewRows || beside) && CanStream(weight, x)) {
    errors_->Note(LaunchStreamGemm(weight, x, y, stream), "a product of few rows");
    return;
  }
  const Plan& plan = *PlanFor(weight, x, y, stream);
  if (plan.choice.tiled) errors_->Note(LaunchTileGemm(weight, x, y, stream), "a product of many rows");
  else Run(plan, weight, x, y, stream);
}

void Gemm::MultiplyByLibrary(Matrix weight, Matrix x, Matrix y, cudaStream_t stream) {
  Run(*PlanFor(weight, x, y, stream), weight, x, y, stream);
}

void Gemm::MultiplyExtended(Matrix weight, Matrix x, Matrix y, int32_t more, cudaStream_t stream) {
  const Plan without = *PlanFor(weight, x, y, stream);
  weight.width += more;
  x.width += more;
  if (without.choice.tiled) {
    errors_->Note(LaunchTileGemm(weight, x, y, stream), "an extended product");
    return;
  }
  const auto [at, is_new] = plans_.try_emplace(KeyOf(weight, x, y));
  Plan& plan = at->second;
  if (is_new) {
    plan = Describe(weight, x, y);
    plan.choice = without.choice;
    if (!Serves(plan.choice, plan)) plan.choice.algorithm = Propose(plan, weight, x, y).of[0].algo;
  }
  Run(plan, weight, x, y, stream);
}

bool Gemm::InOneIsFaster(Matrix weight, Matrix x, Matrix gate_up, Matrix out, cudaStream_t stream) {
  if (batch_invariant_ || !CanTileGated(weight, x, out)) return false;
  Matrix padded = x;
  padded.rows = PaddedRows(x.rows);
  const Key key = KeyOf(weight, padded, gate_up);
  if (const auto found = in_one_.find(key); found != in_one_.end()) return found->second;
  if (IsRecording(stream) || !errors_->status().ok()) return false;
  Multiply(weight, x, gate_up, stream);  // which chooses
  const auto flush = [&] { cudaMemsetAsync(workspace_, 0, kWorkspaceBytes, stream); };
  const float apart_ms = FastestOf(kRuns, stream, flush, [&] {
    Multiply(weight, x, gate_up, stream);
    errors_->Note(LaunchSwiGlu(gate_up, {}, out, stream), "activation");
  });
  const float in_one_ms = FastestOf(kRuns, stream, flush, [&] {
    errors_->Note(LaunchGatedTileGemm(weight, x, out, stream), "a gated product");
  });
  return in_one_.emplace(key, in_one_ms < apart_ms).first->second;
}

void Gemm::MultiplyGated(Matrix weight, Matrix x, Matrix gate_up, Matrix out, int32_t more, cudaStream_t stream) {
  if (!batch_invariant_ && more == 0 && CanStream(weight, x)) {
    errors_->Note(LaunchGatedStreamGemm(weight, x, out, stream), "a gated product of few rows");
    return;
  }
  if (!InOneIsFaster(weight, x, gate_up, out, stream)) {
    if (more > 0) MultiplyExtended(weight, x, gate_up, more, stream);
    else Multiply(weight, x, gate_up, stream);
    errors_->Note(LaunchSwiGlu(gate_up, {}, out, stream), "activation");
    return;
  }
  weight.width += more;
  x.width += more;
  errors_->Note(LaunchGatedTileGemm(weight, x, out, stream), "a gated product");
}

}  // namespace lorikeet::cuda
