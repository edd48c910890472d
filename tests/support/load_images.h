// Adapters on a device without a scheduler.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <thread>
#include <vector>

#include "engine/api/adapter_images.h"
#include "engine/base/check.h"

namespace lorikeet {

// Copies the adapters to pages [first, ...) and waits until they are there; returns the page behind
// them. `images` may be nullptr: nothing is to be done.
inline int32_t LoadImages(AdapterImages* images,
                          std::span<const std::shared_ptr<const Adapter>> adapters,
                          int32_t first) {
  if (images == nullptr) return first;
  AdapterMoves moves;
  for (const std::shared_ptr<const Adapter>& adapter : adapters) {
    const absl::StatusOr<int32_t> count = images->Pages(*adapter);
    LK_CHECK_MSG(count.ok(), count.status().ToString());
    std::vector<int32_t> pages(*count);
    std::iota(pages.begin(), pages.end(), first);
    first += *count;
    moves.loads.push_back({AdapterLease(adapter), std::move(pages)});
  }
  images->Move(std::move(moves));
  for (size_t missing = adapters.size(); missing > 0;) {
    for (const AdapterLoaded& loaded : images->TakeLoaded()) {
      LK_CHECK_MSG(loaded.status.ok(), loaded.status.ToString());
      --missing;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return first;
}

}  // namespace lorikeet
