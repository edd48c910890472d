#include "engine/kernels/cuda/adapter_images.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/kernels/cuda/cuda_status.h"
#include "engine/kernels/cuda/narrow.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet::cuda {
namespace {

constexpr int64_t kExtentBytes = int64_t{256} << 20;
// Behind each extent, so that two are never neighbours: one copy must not span both.
constexpr int64_t kGuardBytes = int64_t{2} << 20;
constexpr int32_t kPackThreads = 4;

// fn(i) for i in [0, n), on a few threads.
void ForEach(int64_t n, const std::function<void(int64_t)>& fn) {
  const int32_t cores = static_cast<int32_t>(std::thread::hardware_concurrency());
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < n; i = next++) fn(i);
  };
  std::vector<std::jthread> threads;
  for (int32_t t = 1; t < std::min(kPackThreads, cores); ++t) threads.emplace_back(work);
  work();
}

// Rows of a piece in the image's type.
void WritePiece(const ImagePlan::Piece& piece, DType dtype, std::byte* to) {
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

DeviceImages::~DeviceImages() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  if (thread_.joinable()) thread_.join();
  for (auto& [serial, resident] : resident_) cudaFreeAsync(resident.tiles, stream_);
  if (stream_ != nullptr) {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    cudaEventDestroy(copied_);
  }
  for (std::byte* extent : extents_) {
    cudaHostUnregister(extent);
    munmap(extent, kExtentBytes + kGuardBytes);
  }
}

void DeviceImages::SetWidths(ModuleId module, ModuleWidths widths) {
  if (module >= static_cast<int32_t>(widths_.size())) widths_.resize(module + 1);
  widths_[module] = widths;
}

absl::Status DeviceImages::Start(std::byte* pages, int64_t page_bytes, int64_t pinned_bytes) {
  LK_CHECK(!thread_.joinable());
  pages_ = pages;
  page_bytes_ = page_bytes;
  pinned_limit_ = pinned_bytes;
  FirstError errors;
  errors.Note(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
  errors.Note(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming | cudaEventBlockingSync),
              "an event");
  // Tables of tiles come from the device's own pool, which shall keep what it has.
  int device = 0;
  cudaMemPool_t pool = nullptr;
  uint64_t keep = UINT64_MAX;
  errors.Note(cudaGetDevice(&device), "the device");
  errors.Note(cudaDeviceGetDefaultMemPool(&pool, device), "memory for tables");
  if (pool != nullptr) cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep);
  LK_RETURN_IF_ERROR(errors.status());
  thread_ = std::thread([this, device] {
    cudaSetDevice(device);
    Loop();
  });
  return absl::OkStatus();
}

absl::StatusOr<int32_t> DeviceImages::Pages(const Adapter& adapter) const {
  LK_ASSIGN_OR_RETURN(const ImagePlan plan, PlanImage(adapter, widths_, dtype_, page_bytes_));
  return static_cast<int32_t>(std::max<int64_t>(1, plan.pages));
}

void DeviceImages::SetWake(std::function<void()> wake) {
  std::lock_guard lock(mutex_);
  wake_ = std::move(wake);
}

void DeviceImages::Move(AdapterMoves moves) {
  {
    std::lock_guard lock(mutex_);
    for (const uint64_t serial : moves.drops) {
      const auto found = resident_.find(serial);
      LK_CHECK(found != resident_.end());
      cudaFreeAsync(found->second.tiles, stream_);
      resident_.erase(found);
    }
    for (AdapterLoad& load : moves.loads) queue_.push_back(std::move(load));
  }
  work_.notify_one();
}

std::vector<AdapterLoaded> DeviceImages::TakeLoaded() {
  std::lock_guard lock(mutex_);
  return std::exchange(loaded_, {});
}

const DeviceAdapter& DeviceImages::Get(const Adapter& adapter) const {
  std::lock_guard lock(mutex_);
  const auto found = resident_.find(adapter.serial);
  LK_CHECK_MSG(found != resident_.end(), "a step before its adapter");
  return found->second.adapter;
}

void DeviceImages::Loop() {
  while (true) {
    AdapterLoad load;
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (stop_) return;
      load = std::move(queue_.front());
      queue_.pop_front();
    }
    const absl::StatusOr<Resident> resident = Load(load);
    {
      std::lock_guard lock(mutex_);
      const uint64_t serial = load.adapter.get()->serial;
      loaded_.push_back({serial, resident.status(), resident.ok() ? resident->bytes : 0});
      if (resident.ok()) resident_.emplace(serial, *resident);
      if (wake_) wake_();
    }
    const int64_t free = static_cast<int64_t>(free_chunks_.size()) * page_bytes_;
    if (free < kExtentBytes / 2) Grow();
  }
}

absl::StatusOr<DeviceImages::Resident> DeviceImages::Load(const AdapterLoad& load) {
  LK_ASSIGN_OR_RETURN(const Packed* packed, Pack(*load.adapter.get()));
  Resident resident;
  cudaError_t error = CopyPages(*packed, load.pages);
  if (error == cudaSuccess) error = CopyTiles(*packed, load.pages, &resident.tiles);
  if (error == cudaSuccess) error = cudaEventRecord(copied_, stream_);
  if (error == cudaSuccess) error = cudaEventSynchronize(copied_);
  if (error != cudaSuccess) return ToStatus(error, "the copy of an adapter");
  resident.adapter = {resident.tiles, packed->plan.tiles_per_module, packed->linears};
  resident.bytes = packed->plan.bytes;
  return resident;
}

absl::StatusOr<const DeviceImages::Packed*> DeviceImages::Pack(const Adapter& adapter) {
  const auto found = std::find_if(packed_.begin(), packed_.end(), [&](const Packed& p) {
    return p.serial == adapter.serial;
  });
  if (found != packed_.end()) {
    packed_.splice(packed_.begin(), packed_, found);
    return &packed_.front();
  }
  Packed packed;
  packed.serial = adapter.serial;
  packed.linears = ChangedLinears(adapter);
  LK_ASSIGN_OR_RETURN(packed.plan, PlanImage(adapter, widths_, dtype_, page_bytes_));
  LK_RETURN_IF_ERROR(TakeChunks(packed.plan.pages, &packed.chunks));
  const std::vector<ImagePlan::Piece>& pieces = packed.plan.pieces;
  ForEach(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    std::byte* page = packed.chunks[pieces[i].to / page_bytes_];
    WritePiece(pieces[i], dtype_, page + pieces[i].to % page_bytes_);
  });
  packed.plan.pieces = {};
  packed_.push_front(std::move(packed));
  return &packed_.front();
}

absl::Status DeviceImages::TakeChunks(int64_t count, std::vector<std::byte*>* chunks) {
  while (static_cast<int64_t>(free_chunks_.size()) < count) {
    const cudaError_t error = Grow();
    if (error == cudaSuccess) continue;
    if (packed_.empty()) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "an adapter takes ", count * page_bytes_, " bytes of pinned host memory; it has ",
          static_cast<int64_t>(extents_.size()) * kExtentBytes, " of at most ", pinned_limit_));
    }
    const std::vector<std::byte*>& oldest = packed_.back().chunks;
    free_chunks_.insert(free_chunks_.end(), oldest.rbegin(), oldest.rend());
    packed_.pop_back();
  }
  for (int64_t i = 0; i < count; ++i) {
    chunks->push_back(free_chunks_.back());
    free_chunks_.pop_back();
  }
  return absl::OkStatus();
}

// One extent more, or cudaErrorMemoryAllocation. Its pages are there before the driver pins them,
// which it does in a fraction of the time then.
cudaError_t DeviceImages::Grow() {
  constexpr int64_t kTouched = int64_t{2} << 20;
  const int64_t pinned = static_cast<int64_t>(extents_.size()) * kExtentBytes;
  if (pinned + kExtentBytes > pinned_limit_) return cudaErrorMemoryAllocation;
  void* memory = mmap(nullptr, kExtentBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return cudaErrorMemoryAllocation;
  std::byte* extent = static_cast<std::byte*>(memory);
  madvise(extent, kExtentBytes, MADV_HUGEPAGE);
  ForEach(kExtentBytes / kTouched,
          [&](int64_t i) { std::memset(extent + i * kTouched, 0, kTouched); });
  const cudaError_t error = cudaHostRegister(extent, kExtentBytes, cudaHostRegisterDefault);
  if (error != cudaSuccess) {
    munmap(extent, kExtentBytes + kGuardBytes);
    return cudaErrorMemoryAllocation;
  }
  extents_.push_back(extent);
  for (int64_t i = kExtentBytes / page_bytes_ - 1; i >= 0; --i) {  // the first on top
    free_chunks_.push_back(extent + i * page_bytes_);
  }
  return cudaSuccess;
}

// Pages that follow one another on both sides go in one copy.
cudaError_t DeviceImages::CopyPages(const Packed& packed, const std::vector<int32_t>& pages) {
  const int64_t count = packed.plan.pages;
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    const auto follows = [&](int64_t i) {
      return pages[i] == pages[i - 1] + 1 && packed.chunks[i] == packed.chunks[i - 1] + page_bytes_;
    };
    for (end = begin + 1; end < count && follows(end);) ++end;
    const cudaError_t error =
        cudaMemcpyAsync(pages_ + pages[begin] * page_bytes_, packed.chunks[begin],
                        (end - begin) * page_bytes_, cudaMemcpyHostToDevice, stream_);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t DeviceImages::CopyTiles(const Packed& packed, const std::vector<int32_t>& pages,
                                    RankTile** tiles) {
  const auto place = [&](auto* pointer) {  // an image offset + 1 becomes an address
    if (pointer == nullptr) return pointer;
    const int64_t offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)) - 1;
    std::byte* address = pages_ + pages[offset / page_bytes_] * page_bytes_ + offset % page_bytes_;
    return reinterpret_cast<decltype(pointer)>(address);
  };
  std::vector<RankTile>& placed = tiles_;  // as long as the copy
  placed = packed.plan.tiles;
  for (RankTile& tile : placed) {
    for (const void*& p : tile.a) p = place(p);
    for (const void*& p : tile.b) p = place(p);
    tile.out_scale = place(tile.out_scale);
    tile.bias = place(tile.bias);
  }
  const size_t bytes = placed.size() * sizeof(RankTile);
  cudaError_t error = cudaMallocAsync(reinterpret_cast<void**>(tiles), bytes, stream_);
  if (error != cudaSuccess) return error;
  error = cudaMemcpyAsync(*tiles, placed.data(), bytes, cudaMemcpyHostToDevice, stream_);
  return error;
}

}  // namespace lorikeet::cuda
