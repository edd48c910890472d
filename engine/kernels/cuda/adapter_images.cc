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
#include "engine/base/in_parallel.h"
#include "engine/base/status_macros.h"
#include "engine/kernels/cuda/cuda_status.h"
#include "engine/kernels/cuda/low_rank.h"

namespace lorikeet::cuda {
namespace {

constexpr int64_t kExtentBytes = int64_t{256} << 20;
// Behind each extent, so that two are never neighbours: one copy must not span both.
constexpr int64_t kGuardBytes = int64_t{2} << 20;

// Tables one after the other, as they will be at `base` on the device.
class TableWriter {
 public:
  TableWriter(std::vector<std::byte>* bytes, std::byte* base) : bytes_(bytes), base_(base) {
    bytes_->clear();
  }

  // Where the values will be; nullptr: there are none.
  template <typename T>
  const T* Append(const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    const size_t at = bytes_->size();
    bytes_->resize(at + Size(values));
    std::memcpy(bytes_->data() + at, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<const T*>(base_ + at);
  }

  template <typename T>
  static size_t Size(const std::vector<T>& values) {
    constexpr size_t kAlign = alignof(RankTile);
    return (values.size() * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }

 private:
  std::vector<std::byte>* const bytes_;
  std::byte* const base_;
};

}  // namespace

DeviceImages::~DeviceImages() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  if (thread_.joinable()) thread_.join();
  for (auto& [serial, resident] : resident_) cudaFreeAsync(resident.tables, stream_);
  if (stream_ != nullptr) {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    for (const cudaEvent_t event : {copied_[0], copied_[1], stepped_}) cudaEventDestroy(event);
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
  for (cudaEvent_t& event : copied_) {
    errors.Note(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync),
                "an event");
  }
  errors.Note(cudaEventCreateWithFlags(&stepped_, cudaEventDisableTiming), "an event");
  // Tables come from the device's own pool, which shall keep what it has.
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

absl::StatusOr<ImageSize> DeviceImages::Size(const Adapter& adapter) const {
  LK_ASSIGN_OR_RETURN(const ImagePlan plan, PlanImage(adapter, widths_, experts_, dtype_, page_bytes_));
  return plan.size;
}

void DeviceImages::SetWake(std::function<void()> wake) {
  std::lock_guard lock(mutex_);
  wake_ = std::move(wake);
}

// The step before may still read what is dropped and write to pages that are loaded now: a step whose
// results nobody wants is not waited for.
void DeviceImages::Move(AdapterMoves moves) {
  cudaEventRecord(stepped_, steps_);
  cudaStreamWaitEvent(stream_, stepped_);
  {
    std::lock_guard lock(mutex_);
    for (const uint64_t serial : moves.drops) {
      const auto found = resident_.find(serial);
      LK_CHECK(found != resident_.end());
      cudaFreeAsync(found->second.tables, stream_);
      resident_.erase(found);
      shared_pages_.erase(serial);
    }
    for (AdapterLoad& load : moves.loads) {
      const Adapter& adapter = *load.adapter.get();
      if (!adapter.shared_rows.empty()) shared_pages_[adapter.serial] = PagesOf(load);
      queue_.push_back(std::move(load));
    }
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

// A copy begins while the one before is under way, so that the bus does not rest between them; what has
// to be packed first begins when nobody waits for that.
void DeviceImages::Loop() {
  std::optional<Copy> under_way;
  while (true) {
    std::optional<AdapterLoad> next;
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [&] { return stop_ || under_way || !queue_.empty(); });
      if (!stop_ && !queue_.empty()) {
        next = std::move(queue_.front());
        queue_.pop_front();
      } else if (stop_ && !under_way) {
        return;
      }
    }
    std::optional<Copy> begun;
    if (next && FindPacked(*next->adapter.get()) != packed_.end()) begun = Begin(*std::move(next));
    if (under_way) End(*std::move(under_way));
    if (next && !begun) begun = Begin(*std::move(next));
    under_way = std::move(begun);
    const int64_t free = static_cast<int64_t>(free_chunks_.size()) * page_bytes_;
    if (!under_way && free < kExtentBytes / 2) Grow();
  }
}

DeviceImages::Copy DeviceImages::Begin(AdapterLoad load) {
  Copy copy{std::move(load), copied_[0], Resident()};
  std::swap(copied_[0], copied_[1]);
  std::swap(tables_[0], tables_[1]);
  copy.resident = [&]() -> absl::StatusOr<Resident> {
    const Adapter& adapter = *copy.load.adapter.get();
    LK_ASSIGN_OR_RETURN(const Pages shared_pages, SharedPages(adapter));
    LK_ASSIGN_OR_RETURN(const Packed* packed, Pack(adapter));
    Resident resident{.bytes = packed->plan.bytes};
    const Pages pages = PagesOf(copy.load);
    cudaError_t error = CopyPages(*packed, pages);
    if (error == cudaSuccess) error = CopyTables(*packed, pages, shared_pages, &resident);
    if (error == cudaSuccess) error = cudaEventRecord(copy.done, stream_);
    if (error == cudaSuccess) return resident;
    cudaStreamSynchronize(stream_);  // the pages become others'
    cudaFreeAsync(resident.tables, stream_);
    return ToStatus(error, "the copy of an adapter");
  }();
  if (!copy.resident.ok()) {  // before those that share it begin
    std::lock_guard lock(mutex_);
    shared_pages_.erase(copy.load.adapter.get()->serial);
  }
  return copy;
}

DeviceImages::Pages DeviceImages::PagesOf(const AdapterLoad& load) const {
  Pages pages;
  for (const int32_t page : load.pages) pages.push_back(pages_ + page * page_bytes_);
  pages.back() += load.first_slot * (page_bytes_ / ImageSize::kSlots);
  return pages;
}

absl::StatusOr<DeviceImages::Pages> DeviceImages::SharedPages(const Adapter& adapter) const {
  if (adapter.shared == nullptr) return Pages();
  std::lock_guard lock(mutex_);
  const auto found = shared_pages_.find(adapter.shared->serial);
  if (found != shared_pages_.end()) return found->second;
  return absl::FailedPreconditionError("what the adapter shares with others is not on the device");
}

void DeviceImages::End(Copy copy) {
  absl::StatusOr<Resident>& resident = copy.resident;
  if (resident.ok()) {
    const cudaError_t error = cudaEventSynchronize(copy.done);
    if (error != cudaSuccess) resident = ToStatus(error, "the copy of an adapter");
  }
  std::lock_guard lock(mutex_);
  const uint64_t serial = copy.load.adapter.get()->serial;
  loaded_.push_back({serial, resident.status(), resident.ok() ? resident->bytes : 0});
  if (resident.ok()) resident_.emplace(serial, *resident);
  if (wake_) wake_();
}

std::list<DeviceImages::Packed>::iterator DeviceImages::FindPacked(const Adapter& adapter) {
  return std::find_if(packed_.begin(), packed_.end(),
                      [&](const Packed& p) { return p.serial == adapter.serial; });
}

absl::StatusOr<const DeviceImages::Packed*> DeviceImages::Pack(const Adapter& adapter) {
  const auto found = FindPacked(adapter);
  if (found != packed_.end()) {
    packed_.splice(packed_.begin(), packed_, found);
    return &packed_.front();
  }
  Packed packed;
  packed.serial = adapter.serial;
  packed.linears = LinearsOf(adapter, experts_);
  packed.part_set = PartsOf(adapter, experts_);
  LK_ASSIGN_OR_RETURN(packed.plan, PlanImage(adapter, widths_, experts_, dtype_, page_bytes_));
  if (packed.plan.tiles_per_module > kFewTiles) packed.part_set |= Bit(Part::kLongRanks);
  LK_RETURN_IF_ERROR(TakeChunks(packed.plan.size.most_pages(), &packed.chunks));
  const std::vector<ImagePlan::Piece>& pieces = packed.plan.pieces;
  InParallel(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    std::byte* page = packed.chunks[pieces[i].to / page_bytes_];
    WritePiece(pieces[i], page + pieces[i].to % page_bytes_);
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
  InParallel(kExtentBytes / kTouched,
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

// Pages that follow one another on both sides go in one copy. Of one that others share only what is the image's.
cudaError_t DeviceImages::CopyPages(const Packed& packed, const Pages& pages) {
  const int64_t count = std::ssize(pages), bytes = packed.plan.size.bytes(page_bytes_);
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    const auto follows = [&](int64_t i) {
      return pages[i] == pages[i - 1] + page_bytes_ && packed.chunks[i] == packed.chunks[i - 1] + page_bytes_;
    };
    for (end = begin + 1; end < count && follows(end);) ++end;
    const int64_t until = std::min(end * page_bytes_, bytes);
    const cudaError_t error = cudaMemcpyAsync(pages[begin], packed.chunks[begin], until - begin * page_bytes_,
                                              cudaMemcpyHostToDevice, stream_);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The plan's tables with image offsets and pages turned into addresses.
cudaError_t DeviceImages::CopyTables(const Packed& packed, const Pages& pages, const Pages& shared_pages,
                                     Resident* resident) {
  const auto offset_of = [](const void* pointer) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer) & ~kInShared) - 1;
  };
  const auto place = [&](auto* pointer) {
    if (pointer == nullptr) return pointer;
    const int64_t offset = offset_of(pointer);
    const bool shared = (reinterpret_cast<uintptr_t>(pointer) & kInShared) != 0;
    std::byte* page = (shared ? shared_pages : pages)[offset / page_bytes_];
    return reinterpret_cast<decltype(pointer)>(page + offset % page_bytes_);
  };
  std::vector<RankTile> tiles = packed.plan.tiles;
  for (RankTile& tile : tiles) {
    for (const void*& p : tile.a) p = place(p);
    for (const void*& p : tile.b) p = place(p);
    tile.out_scale = place(tile.out_scale);
    tile.bias = place(tile.bias);
  }
  PartTables parts = packed.plan.parts;
  std::vector<const void*> addresses;   // of the pages, and
  std::vector<AdapterParts> adapter;    // one, if the adapter has any parts
  if (BeyondLowRank(packed.part_set)) {
    addresses.assign(pages.begin(), pages.end());
    adapter.resize(1);
  }
  const auto size = [](const auto&... tables) { return (TableWriter::Size(tables) + ...); };
  const size_t bytes = size(tiles, addresses, parts.modules, parts.norms, parts.prompt_attention,
                            parts.bottlenecks, parts.routers, adapter);
  void* base = nullptr;
  const cudaError_t error = cudaMallocAsync(&base, bytes, stream_);
  if (error != cudaSuccess) return error;
  resident->tables = static_cast<std::byte*>(base);
  TableWriter writer(&tables_[0], resident->tables);
  resident->adapter = {writer.Append(tiles), packed.plan.tiles_per_module, packed.linears,
                       packed.part_set, nullptr};
  const void* const* device_pages = writer.Append(addresses);
  ForEachRows(&parts, [&](PagedRows* rows) {
    rows->first = place(rows->first);
    if (rows->pages != nullptr) rows->pages = device_pages + offset_of(rows->pages);
  });
  for (AdapterParts& a : adapter) {
    a = parts.adapter;
    a.modules = writer.Append(parts.modules);
    a.norms = writer.Append(parts.norms);
    a.prompt_attention = writer.Append(parts.prompt_attention);
    a.bottlenecks = writer.Append(parts.bottlenecks);
    a.mixture.routers = writer.Append(parts.routers);
  }
  resident->adapter.parts = writer.Append(adapter);
  return cudaMemcpyAsync(base, tables_[0].data(), tables_[0].size(), cudaMemcpyHostToDevice, stream_);
}

}  // namespace lorikeet::cuda
