// What the adapter cache asks about adapters on the device.
#pragma once

#include <cstdint>
#include <functional>

namespace lorikeet {

// Any thread.
class DeviceTier {
 public:
  virtual ~DeviceTier() = default;

  // Bytes of the pages that the image of an adapter (Adapter::serial) takes now; 0: it has none.
  virtual int64_t ImageBytes(uint64_t serial) const = 0;

  // Of an adapter that has left host memory. Calls `done` once, when the pages of its image are
  // free, with their bytes: on the engine's thread, which it must not hold up, or at once on this
  // one where there is no image.
  virtual void Release(uint64_t serial, std::function<void(int64_t bytes)> done) = 0;
};

}  // namespace lorikeet
