// The adapters that are on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/adapter.h"
#include "engine/kernels/cuda/adapter_image.h"

namespace lorikeet::cuda {

struct DeviceAdapter {
  const RankTile* tiles = nullptr;
  int32_t tiles_per_module = 0;
  uint32_t linears = 0;  // bit of each Linear that some layer changes; then kHeadBit, kScaledBit

  static constexpr int32_t kHeadBit = kLinearsPerLayer;  // the head
  static constexpr int32_t kScaledBit = kHeadBit + 1;    // some output is scaled
};

// One thread. An image is one allocation; the least recently used go when the limit is reached.
class AdapterImages {
 public:
  AdapterImages(DType dtype, cudaStream_t stream) : dtype_(dtype), stream_(stream) {}
  ~AdapterImages();

  // Widths of a module, before the first Get.
  void SetWidths(ModuleId module, ModuleWidths widths);

  void SetLimit(int64_t bytes) { limit_ = bytes; }
  int64_t limit() const { return limit_; }

  // Starts a step: adapters of earlier steps may leave.
  void BeginStep() { ++step_; }
  // The adapter on the device, copied there now if it was not; copies are ordered on the stream.
  // RESOURCE_EXHAUSTED: the step's adapters do not fit together.
  absl::StatusOr<DeviceAdapter> Get(const Adapter& adapter);
  // Frees the image not used for longest, but for this step's. False: there is none.
  bool DropOldest();

 private:
  struct Image {
    DeviceAdapter adapter;
    std::byte* memory = nullptr;
    int64_t bytes = 0;
    int64_t last_step = 0;
  };

  absl::StatusOr<Image> Copy(const Adapter& adapter);
  absl::StatusOr<std::byte*> Allocate(int64_t bytes);
  std::byte* Staging(int64_t bytes);

  const DType dtype_;
  const cudaStream_t stream_;
  std::vector<ModuleWidths> widths_;
  std::unordered_map<uint64_t, Image> images_;  // by Adapter::serial
  int64_t step_ = 0;
  int64_t limit_ = std::numeric_limits<int64_t>::max();
  int64_t used_ = 0;

  std::byte* staging_ = nullptr;  // pinned; an image on its way to the device
  int64_t staging_bytes_ = 0;
  cudaEvent_t staged_ = nullptr;  // the last copy out of it
};

}  // namespace lorikeet::cuda
