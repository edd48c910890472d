#include "engine/kernels/cuda/adapter_images.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/kernels/cuda/cuda_status.h"
#include "engine/kernels/cuda/narrow.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet::cuda {
namespace {

constexpr int64_t kGranule = int64_t{2} << 20;  // what the driver hands out
constexpr int64_t kContiguous = std::numeric_limits<int64_t>::max() / 2;

// Rows of a piece in the image's type.
void WritePiece(const ImagePlan::Piece& piece, DType dtype, std::byte* image) {
  std::byte* to = image + piece.to;
  if (piece.vector || piece.dtype == dtype) {
    const DType same = piece.dtype;
    const int64_t pitch = piece.vector ? piece.width : RowPitch(piece.width);
    for (int32_t r = 0; r < piece.rows; ++r) {
      std::memcpy(to + ByteSize(same, r * pitch), piece.from + ByteSize(same, r * piece.from_stride),
                  ByteSize(same, piece.width));
    }
    return;
  }
  std::vector<float> row(piece.width);
  for (int32_t r = 0; r < piece.rows; ++r) {
    Dequantize(piece.dtype, piece.from + ByteSize(piece.dtype, r * piece.from_stride), piece.width,
               row.data());
    Narrow(row.data(), piece.width, dtype, to + ByteSize(dtype, r * RowPitch(piece.width)));
  }
}

uint32_t ChangedLinears(const Adapter& adapter) {
  uint32_t linears = 0;
  const size_t head = adapter.modules.size() - 1;
  for (size_t m = 0; m < adapter.modules.size(); ++m) {
    if (adapter.modules[m].empty()) continue;
    linears |= 1u << (m == head ? DeviceAdapter::kHeadBit : m % kLinearsPerLayer);
    if (adapter.modules[m].out_scale) linears |= 1u << DeviceAdapter::kScaledBit;
  }
  return linears;
}

}  // namespace

AdapterImages::~AdapterImages() {
  for (auto& [serial, image] : images_) cudaFree(image.memory);
  cudaFreeHost(staging_);
  if (staged_ != nullptr) cudaEventDestroy(staged_);
}

// Pinned memory that no copy reads any more.
std::byte* AdapterImages::Staging(int64_t bytes) {
  if (staged_ == nullptr) cudaEventCreateWithFlags(&staged_, cudaEventDisableTiming);
  cudaEventSynchronize(staged_);
  if (bytes > staging_bytes_) {
    cudaFreeHost(staging_);
    staging_ = nullptr;
    cudaMallocHost(reinterpret_cast<void**>(&staging_), bytes);
    staging_bytes_ = staging_ != nullptr ? bytes : 0;
  }
  return staging_;
}

void AdapterImages::SetWidths(ModuleId module, ModuleWidths widths) {
  if (module >= static_cast<int32_t>(widths_.size())) widths_.resize(module + 1);
  widths_[module] = widths;
}

bool AdapterImages::DropOldest() {
  auto oldest = images_.end();
  for (auto it = images_.begin(); it != images_.end(); ++it) {
    if (it->second.last_step == step_) continue;
    if (oldest == images_.end() || it->second.last_step < oldest->second.last_step) oldest = it;
  }
  if (oldest == images_.end()) return false;
  cudaStreamSynchronize(stream_);  // a step before this one may still read it
  cudaFree(oldest->second.memory);
  used_ -= oldest->second.bytes;
  images_.erase(oldest);
  return true;
}

absl::StatusOr<std::byte*> AdapterImages::Allocate(int64_t bytes) {
  std::byte* memory = nullptr;
  while (true) {
    if (used_ + bytes <= limit_) {
      const cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&memory), bytes);
      if (error == cudaSuccess) break;
      if (error != cudaErrorMemoryAllocation) return ToStatus(error, "memory of an adapter");
      cudaGetLastError();
    }
    if (!DropOldest()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("an adapter of ", bytes, " bytes does not fit beside the ", used_,
                       " bytes of the others of its step; adapters may have ", limit_));
    }
  }
  used_ += bytes;
  return memory;
}

absl::StatusOr<AdapterImages::Image> AdapterImages::Copy(const Adapter& adapter) {
  ImagePlan plan = PlanImage(adapter, widths_, dtype_, kContiguous);
  int64_t data_bytes = 0;
  for (const ImagePlan::Piece& p : plan.pieces) {
    const DType type = p.vector ? p.dtype : dtype_;
    data_bytes = std::max(data_bytes, p.to + ByteSize(type, p.rows * RowPitch(p.width)));
  }
  data_bytes = (data_bytes + 63) / 64 * 64;
  const int64_t tile_bytes = static_cast<int64_t>(plan.tiles.size() * sizeof(RankTile));
  Image image;
  const int64_t bytes = data_bytes + tile_bytes;
  image.bytes = (bytes + kGranule - 1) / kGranule * kGranule;
  std::byte* host = Staging(bytes);
  if (host == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no ", bytes, " bytes of pinned host memory for an adapter"));
  }
  LK_ASSIGN_OR_RETURN(image.memory, Allocate(image.bytes));
  for (const ImagePlan::Piece& piece : plan.pieces) WritePiece(piece, dtype_, host);
  const auto place = [&](auto* pointer) {  // an offset + 1 becomes an address
    if (pointer == nullptr) return pointer;
    return reinterpret_cast<decltype(pointer)>(image.memory - 1 +
                                               reinterpret_cast<uintptr_t>(pointer));
  };
  for (RankTile& tile : plan.tiles) {
    for (const void*& p : tile.a) p = place(p);
    for (const void*& p : tile.b) p = place(p);
    tile.out_scale = place(tile.out_scale);
    tile.bias = place(tile.bias);
  }
  std::memcpy(host + data_bytes, plan.tiles.data(), tile_bytes);
  const cudaError_t error =
      cudaMemcpyAsync(image.memory, host, bytes, cudaMemcpyHostToDevice, stream_);
  if (error != cudaSuccess) {
    cudaFree(image.memory);
    used_ -= image.bytes;
    return ToStatus(error, "the copy of an adapter");
  }
  cudaEventRecord(staged_, stream_);
  image.adapter = {reinterpret_cast<const RankTile*>(image.memory + data_bytes),
                   plan.tiles_per_module, ChangedLinears(adapter)};
  return image;
}

absl::StatusOr<DeviceAdapter> AdapterImages::Get(const Adapter& adapter) {
  auto found = images_.find(adapter.serial);
  if (found == images_.end()) {
    LK_ASSIGN_OR_RETURN(Image image, Copy(adapter));
    found = images_.emplace(adapter.serial, image).first;
  }
  found->second.last_step = step_;
  return found->second.adapter;
}

}  // namespace lorikeet::cuda
