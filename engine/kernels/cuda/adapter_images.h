// Adapters' images in the pages of the device's pool. A thread of its own packs an image into pinned
// memory and copies it on a stream of its own; steps meanwhile go on. Packed images stay in pinned
// memory, the least recently copied leaving when it is full, so that an adapter that comes back is
// a plain copy.
//
// Pinned memory is taken in extents, one ahead of need, cut into the pool's page size and never
// given back: the driver holds up everybody while it pins.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/adapter_images.h"
#include "engine/kernels/cuda/adapter_image.h"

namespace lorikeet::cuda {

struct DeviceAdapter {
  const RankTile* tiles = nullptr;
  int32_t tiles_per_module = 0;
  LinearSet linears = 0;
  PartSet part_set = 0;
  const AdapterParts* parts = nullptr;  // nullptr: it has none but low-rank pairs and vectors
};

class DeviceImages final : public AdapterImages {
 public:
  // `steps`: the stream of steps.
  DeviceImages(DType dtype, const ExpertModules& experts, cudaStream_t steps)
      : dtype_(dtype), experts_(experts), steps_(steps) {}
  ~DeviceImages() override;

  // Widths of a module, before any load.
  void SetWidths(ModuleId module, ModuleWidths widths);
  // Page p of the pool is at pages + p * page_bytes. Once, before any load. `pinned_bytes`: for
  // packed images; an adapter larger than that fails to load.
  absl::Status Start(std::byte* pages, int64_t page_bytes, int64_t pinned_bytes);

  absl::StatusOr<ImageSize> Size(const Adapter& adapter) const override;
  void SetWake(std::function<void()> wake) override;
  void Move(AdapterMoves moves) override;
  std::vector<AdapterLoaded> TakeLoaded() override;

  // REQUIRES: TakeLoaded has named it and it was not dropped.
  const DeviceAdapter& Get(const Adapter& adapter) const;

 private:
  // An image in pinned memory.
  struct Packed {
    uint64_t serial = 0;
    ImagePlan plan;                  // pieces are dropped once they are written
    std::vector<std::byte*> chunks;  // [plan.size.most_pages()] of page_bytes_
    LinearSet linears = 0;
    PartSet part_set = 0;
  };
  struct Resident {
    DeviceAdapter adapter;
    std::byte* tables = nullptr;
    int64_t bytes = 0;  // ImagePlan's
  };

  // On its way to the device.
  struct Copy {
    AdapterLoad load;
    cudaEvent_t done = nullptr;
    absl::StatusOr<Resident> resident;
  };

  void Loop();
  Copy Begin(AdapterLoad load);
  void End(Copy copy);  // waits for it
  std::list<Packed>::iterator FindPacked(const Adapter& adapter);
  absl::StatusOr<const Packed*> Pack(const Adapter& adapter);
  absl::Status TakeChunks(int64_t count, std::vector<std::byte*>* chunks);
  cudaError_t Grow();
  using Pages = std::vector<std::byte*>;  // of an image on the device; its part of the last one begins there
  Pages PagesOf(const AdapterLoad& load) const;
  absl::StatusOr<Pages> SharedPages(const Adapter& adapter) const;
  cudaError_t CopyPages(const Packed& packed, const Pages& pages);
  cudaError_t CopyTables(const Packed& packed, const Pages& pages, const Pages& shared_pages, Resident* resident);

  const DType dtype_;
  const ExpertModules experts_;
  const cudaStream_t steps_;
  std::vector<ModuleWidths> widths_;
  std::byte* pages_ = nullptr;
  int64_t page_bytes_ = 0;
  int64_t pinned_limit_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t stepped_ = nullptr;

  // The thread's own.
  cudaEvent_t copied_[2] = {};          // the next copy's and the one's after it
  std::list<Packed> packed_;            // copied last first
  std::vector<std::byte*> extents_;     // [kExtentBytes] each, pinned
  std::vector<std::byte*> free_chunks_;
  std::vector<std::byte> tables_[2];    // on their way, of the last copy and the one before

  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::deque<AdapterLoad> queue_;
  std::vector<AdapterLoaded> loaded_;
  std::unordered_map<uint64_t, Resident> resident_;  // by Adapter::serial
  // Where what adapters have in common is, or will be when the copies given so far are done. By serial.
  std::unordered_map<uint64_t, Pages> shared_pages_;
  std::function<void()> wake_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace lorikeet::cuda
