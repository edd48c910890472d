// Adapters on a device without a scheduler.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "engine/api/adapter_images.h"
#include "engine/base/check.h"

namespace lorikeet {

// Copies the adapters to pages [first, ...) and waits until they are there; returns the page behind them. What they
// leave over lies side by side as far as a page has room. `images` may be nullptr: nothing is to be done.
inline int32_t LoadImages(AdapterImages* images,
                          std::span<const std::shared_ptr<const Adapter>> adapters,
                          int32_t first) {
  if (images == nullptr) return first;
  AdapterMoves moves;
  int32_t rests_page = 0, rests_end = ImageSize::kSlots;  // of the last page of rests, what is taken
  for (const std::shared_ptr<const Adapter>& adapter : adapters) {
    const absl::StatusOr<ImageSize> size = images->Size(*adapter);
    LK_CHECK_MSG(size.ok(), size.status().ToString());
    AdapterLoad load{AdapterLease(adapter), *size, std::vector<int32_t>(size->pages)};
    std::iota(load.pages.begin(), load.pages.end(), first);
    first += size->pages;
    if (size->slots > 0) {
      if (rests_end + size->slots > ImageSize::kSlots) rests_page = first++, rests_end = 0;
      load.pages.push_back(rests_page);
      load.first_slot = std::exchange(rests_end, rests_end + size->slots);
    }
    moves.loads.push_back(std::move(load));
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
