// What adapters change beyond low-rank pairs and vectors of linears: launched in steps where an
// adapter has it.
#include <algorithm>

#include "engine/api/limits.h"
#include "engine/kernels/cuda/cuda_backend.h"
#include "engine/kernels/cuda/gates.h"
#include "engine/kernels/cuda/model_parts.h"

namespace lorikeet::cuda {

bool CudaBackend::Has(LinearPart part, const LinearArgs& args) const {
  uint32_t linears = kHeadLinear;
  if (args.rows == RowSet::kAll) {
    linears = ((1u << args.weight->out.size()) - 1) << args.weight->first_module % kLinearsPerLayer;
  }
  return (linears_ >> static_cast<uint32_t>(part) & linears) != 0;
}

RowAdapters CudaBackend::AdaptersOf(RowSet rows, int32_t first_row) const {
  return {arrays_.parts(), arrays_.gates(), rows == RowSet::kLogits ? arrays_.logit_rows() : nullptr, first_row};
}

StructuredArgs CudaBackend::StructuredOf(const LinearArgs& args) const {
  StructuredArgs out;
  out.adapters = AdaptersOf(args.rows, args.first_row);
  out.first_module = args.weight->first_module;
  out.parts = static_cast<int32_t>(args.weight->out.size());
  std::copy(args.weight->out.begin(), args.weight->out.end(), out.out);
  out.x = args.x;
  out.y = args.y;
  out.used = part_set_;
  return out;
}

// Each part has inputs of its own.
void CudaBackend::MultiplyRotated(const LinearArgs& args) {
  if (rotated_ == nullptr) {
    rotated_ = Allocate(ByteSize(dtype_, int64_t{options_.max_rows} * widest_input_));
  }
  Matrix x = args.x;
  x.data = rotated_.get();
  x.stride = x.width;
  const RowAdapters adapters = AdaptersOf(args.rows, args.first_row);
  const auto& weight = static_cast<const CudaLinearWeight&>(*args.weight);
  int32_t column = 0;
  for (size_t part = 0; part < args.weight->out.size(); ++part) {
    const int32_t out = args.weight->out[part];
    const ModuleId module = args.weight->first_module + static_cast<ModuleId>(part);
    Note(LaunchRotateInputs(adapters, module, args.x, x, stream_), "input rotations");
    const Matrix y = args.y.Columns(column, out);
    if (weight.is_coded) {
      CodedWeight alone{.count = 1, .width = weight.coded.width};
      alone.parts[0] = weight.coded.parts[part];
      Note(LaunchCodedGemm(alone, x, y, stream_, options_.batch_invariant), "a product of codes");
    } else {
      gemm_.Multiply(weight.rows.Rows(column, out), x, y, stream_);
    }
    column += out;
  }
}

void CudaBackend::DealShares(const LinearArgs& args, cudaStream_t stream) {
  if (shares_ == nullptr) {
    shares_ = Allocate(int64_t{options_.max_rows} * kMaxParts * Limits::kMaxExperts * int64_t{sizeof(float)});
  }
  const auto parts = static_cast<int32_t>(args.weight->out.size());
  Note(LaunchShares({AdaptersOf(args.rows, args.first_row), args.weight->first_module, parts, args.x,
                     reinterpret_cast<float*>(shares_.get())}, stream), "shares of LoRAs");
}

void CudaBackend::Bottlenecks(const BottleneckArgs& args) {
  if (!Has(Part::kBottlenecks)) return;
  if (inner_ == nullptr) {
    inner_ = Allocate(int64_t{options_.max_rows} * args.x.width * int64_t{sizeof(float)});
  }
  Note(LaunchBottlenecks(args, AdaptersOf(RowSet::kAll), reinterpret_cast<float*>(inner_.get()),
                         stream_), "bottlenecks");
}

}  // namespace lorikeet::cuda
