// Weights on their way to the device.
#include <algorithm>
#include <cstring>

#include "absl/strings/str_format.h"
#include "engine/api/limits.h"
#include "engine/base/check.h"
#include "engine/kernels/cuda/cuda_backend.h"
#include "engine/kernels/cuda/narrow.h"
#include "engine/kernels/cuda/stream_gemm.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet::cuda {
namespace {

constexpr int64_t kStagedElements = 4 << 20;  // that are copied at a time

// Whether the file has codes as products take them: a scale a row.
bool HasRowCodes(const TensorView& view) {
  constexpr DTypeInfo kBlock = Info(DType::kScaledF8E4M3);
  static_assert(kBlock.block_elements == kStripWidth);
  if (view.dtype != DType::kScaledF8E4M3 || view.rows() % kCodedWidthUnit != 0) return false;
  for (int64_t row = 0; row < view.rows(); ++row) {
    const std::byte* const first = view.row(row);
    for (int64_t at = kBlock.block_bytes; at < view.row_bytes(); at += kBlock.block_bytes) {
      if (std::memcmp(first, first + at, sizeof(float)) != 0) return false;
    }
  }
  return true;
}

}  // namespace

DeviceMemory CudaBackend::AllocateWeight(int64_t bytes) {
  std::lock_guard lock(load_mutex_);
  return DeviceMemory(AllocateRaw(bytes, "a weight"), [](std::byte* p) { cudaFree(p); });
}

void CudaBackend::ForRows(const TensorView& view, DType dtype,
                          const std::function<void(int64_t, std::span<const std::byte>)>& take) {
  const int64_t width = view.row_elements();
  const int64_t rows_at_once = std::max<int64_t>(1, kStagedElements / width);
  std::vector<float> wide;
  std::vector<std::byte> narrow;
  for (int64_t row = 0; row < view.rows(); row += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, view.rows() - row), count = rows * width;
    if (view.dtype == dtype) {
      take(row, view.bytes.subspan(row * view.row_bytes(), rows * view.row_bytes()));
      continue;
    }
    wide.resize(count);
    narrow.resize(ByteSize(dtype, count));
    Dequantize(view.dtype, view.row(row), count, wide.data());
    Narrow(wide.data(), count, dtype, narrow.data());
    take(row, narrow);
  }
}

void CudaBackend::CopyWeight(std::byte* to, int64_t pitch, std::span<const std::byte> from, int64_t row_bytes) {
  cudaError_t error = cudaMemcpy2DAsync(to, pitch, from.data(), row_bytes, row_bytes,
                                        static_cast<int64_t>(from.size()) / row_bytes, cudaMemcpyHostToDevice,
                                        stream_);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream_);  // `from` is used again
  std::lock_guard lock(load_mutex_);
  Note(error, "the copy of a weight");
}

void CudaBackend::ClearWeight(std::byte* memory, int64_t bytes) {
  const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, stream_);
  std::lock_guard lock(load_mutex_);
  Note(error, "clearing a weight");
}

DeviceMemory CudaBackend::LoadRows(std::span<const TensorView* const> views, int32_t room) {
  const int64_t row_bytes = ByteSize(dtype_, views[0]->row_elements()), pitch = row_bytes + ByteSize(dtype_, room);
  int64_t rows = 0;
  for (const TensorView* view : views) rows += view->rows();
  DeviceMemory memory = AllocateWeight(rows * pitch);
  if (memory == nullptr) return memory;
  if (room > 0) ClearWeight(memory.get(), rows * pitch);
  std::byte* to = memory.get();
  for (const TensorView* view : views) {
    ForRows(*view, dtype_, [&](int64_t, std::span<const std::byte> from) {
      CopyWeight(to, pitch, from, row_bytes);
      to += static_cast<int64_t>(from.size()) / row_bytes * pitch;
    });
  }
  return memory;
}

DeviceMemory CudaBackend::LoadCodes(std::span<const TensorView* const> views, CodedWeight* coded) {
  coded->width = static_cast<int32_t>(views[0]->row_elements());
  coded->count = static_cast<int32_t>(views.size());
  int64_t bytes = 0;
  for (const TensorView* view : views) {
    const int32_t rows = static_cast<int32_t>(view->rows());
    bytes += coded->CodeBytes(rows) + coded->PaddedRows(rows) * int64_t{sizeof(float)};
  }
  DeviceMemory memory = AllocateWeight(bytes);
  const DeviceMemory staged =
      AllocateWeight(ByteSize(dtype_, std::max<int64_t>(kStagedElements, coded->width)));
  if (memory == nullptr || staged == nullptr) return nullptr;
  cudaError_t error = cudaMemsetAsync(memory.get(), 0, bytes, stream_);
  std::byte* at = memory.get();
  for (size_t p = 0; p < views.size(); ++p) {
    CodedPart& part = coded->parts[p];
    part.rows = static_cast<int32_t>(views[p]->rows());
    part.codes = at;
    at += coded->CodeBytes(part.rows);
    part.scales = reinterpret_cast<float*>(at);
    at += coded->PaddedRows(part.rows) * int64_t{sizeof(float)};
    const bool has_codes = HasRowCodes(*views[p]);
    const DType staged_type = has_codes ? views[p]->dtype : dtype_;
    ForRows(*views[p], staged_type, [&](int64_t row, std::span<const std::byte> rows) {
      const auto bytes = static_cast<int64_t>(rows.size());
      CopyWeight(staged.get(), bytes, rows, bytes);
      const auto first = static_cast<int32_t>(row);
      const auto count = static_cast<int32_t>(rows.size() / ByteSize(staged_type, coded->width));
      if (error != cudaSuccess) return;
      error = has_codes
                  ? LaunchStoreCodes(staged.get(), first, count, part, coded->width, stream_)
                  : LaunchEncode(staged.get(), dtype_, first, count, part, coded->width, stream_);
    });
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream_);  // `staged` goes
  std::lock_guard lock(load_mutex_);
  Note(error, "codes of a weight");
  return memory;
}

std::unique_ptr<LinearWeight> CudaBackend::LoadLinear(ModuleId first_module,
                                                      std::span<const LinearSource> parts) {
  LK_CHECK(!parts.empty() && parts.size() <= kMaxParts);
  auto linear = std::make_unique<CudaLinearWeight>();
  linear->first_module = first_module;
  linear->in = static_cast<int32_t>(parts[0].weight->row_elements());
  std::vector<const TensorView*> views;
  std::vector<float> bias;
  bool biased = false;
  const bool encode = options_.quantization == Quantization::kFp8;
  linear->is_coded = encode || (dtype_ != DType::kF32 && CanMultiplyCoded());
  for (const LinearSource& part : parts) {
    linear->is_coded = linear->is_coded && part.quantize && (encode || HasRowCodes(*part.weight));
    views.push_back(part.weight);
    linear->out.push_back(static_cast<int32_t>(part.weight->rows()));
    const size_t begin = bias.size();
    bias.resize(begin + linear->out.back());
    if (part.bias == nullptr) continue;
    biased = true;
    Dequantize(part.bias->dtype, part.bias->bytes.data(), linear->out.back(), &bias[begin]);
  }
  const int64_t elements = int64_t{linear->in} * linear->width();
  if (linear->is_coded) {
    linear->memory = LoadCodes(views, &linear->coded);
    linear->bytes = elements + linear->width() * int64_t{sizeof(float)};
  } else {
    const bool extends = std::all_of(parts.begin(), parts.end(), [](const auto& part) { return part.quantize; });
    const int32_t room = extends ? x_room(linear->in) : 0;
    linear->memory = LoadRows(views, room);
    linear->rows = Matrix(linear->memory.get(), linear->width(), linear->in, dtype_);
    linear->rows.stride += room;
    linear->bytes = ByteSize(dtype_, elements);
  }
  std::lock_guard lock(load_mutex_);
  const bool multiplied = !linear->is_coded && !parts[0].expert;
  if (options_.batch_invariant && multiplied && !CanStream(linear->rows, Matrix(nullptr, 1, linear->in, dtype_))) {
    errors_.Note(absl::FailedPreconditionError(absl::StrFormat(
        "batch-invariant needs a GPU of compute capability 9.0, a build for 90a, and linears whose inputs are a "
        "multiple of 8; this is %s and a linear of %d", device_name_, linear->in)));
  }
  if (biased) linear->bias = Upload(bias);
  for (size_t p = 0; p < parts.size(); ++p) {
    adapters_.SetWidths(first_module + static_cast<int32_t>(p), {linear->in, linear->out[p]});
  }
  if (parts[0].expert && parts.size() == 2) {
    experts_.gate_up = linear->width();
  } else if (parts[0].expert) {
    experts_.down_in = linear->in;
    experts_.down_out = linear->out[0];
  } else {
    widest_input_ = std::max(widest_input_, linear->in);
    if (!linear->is_coded) most_room_ = std::max(most_room_, static_cast<int32_t>(linear->rows.stride - linear->in));
  }
  slots_per_item_ = std::max(slots_per_item_,
                             static_cast<int32_t>(parts.size()) * PromptSlices(linear->in));
  if (parts.size() == 3) query_group_ = std::max(1, linear->out[0] / linear->out[1]);
  return linear;
}

std::unique_ptr<LinearWeight> CudaBackend::ShareLinear(const LinearWeight& weight, ModuleId first_module) {
  auto shared = std::make_unique<CudaLinearWeight>(static_cast<const CudaLinearWeight&>(weight));
  shared->first_module = first_module;
  for (size_t p = 0; p < shared->out.size(); ++p) {
    adapters_.SetWidths(first_module + static_cast<int32_t>(p), {shared->in, shared->out[p]});
  }
  return shared;
}

void CudaBackend::LoadEmbedding(const TensorView& table) {
  const TensorView* views[] = {&table};
  embedding_ = LoadRows(views, 0);
  sampler_.Prepare(max_logit_rows(), table.rows() + Limits::kMaxAddedTokens);
}

}  // namespace lorikeet::cuda
