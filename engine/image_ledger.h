// What others may know of the images on the device: which are there, what they take, how long
// requests waited for them, and when the pages of one that is given back are free.
//
// The engine's thread writes, any thread reads.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "engine/api/adapter_images.h"

namespace lorikeet {

struct ImageCounts {
  int32_t images = 0;       // there
  int64_t image_bytes = 0;  // of their pages and slots
  int64_t used_bytes = 0;   // of them, those that hold something
  int64_t loads = 0;        // images that came, ever
  int64_t load_bytes = 0;   // that their pages hold
  int64_t load_us = 0;      // from their start until the engine saw them there
  int64_t failures = 0;     // loads that failed
  int64_t drops = 0;        // images that went
};

class ImageLedger {
 public:
  explicit ImageLedger(int64_t page_bytes) : page_bytes_(page_bytes) {}
  ~ImageLedger();  // whose release is still to come hears that its pages are free

  // The engine's thread.
  void Begin(const AdapterMoves& moves, int64_t now_us);
  // Returns when the load began.
  int64_t End(const AdapterLoaded& loaded, int64_t now_us);
  // Tells those whose images have gone.
  void Settle();

  // Any thread.
  int64_t Bytes(uint64_t serial) const;  // 0: no image
  // False: there is no image, and `done` was not taken.
  bool Release(uint64_t serial, std::function<void(int64_t bytes)>* done);
  ImageCounts counts() const;

 private:
  struct Image {
    int64_t bytes = 0;
    int64_t used = 0;
    int64_t begun_us = 0;
    bool ready = false;
  };
  struct Waiter {
    uint64_t serial = 0;
    int64_t bytes = 0;
    std::function<void(int64_t bytes)> done;
  };

  void Remove(uint64_t serial);  // with the lock

  const int64_t page_bytes_;
  mutable std::mutex mutex_;  // everything below
  std::unordered_map<uint64_t, Image> images_;  // there or on their way
  std::vector<Waiter> waiters_;
  ImageCounts counts_;
};

}  // namespace lorikeet
