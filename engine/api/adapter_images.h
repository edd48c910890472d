// Adapters on a device: their images lie in pages of the pool that keys and values also come from.
// The scheduler decides which are there and where; this copies them, beside the steps.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/api/adapter_store.h"

namespace lorikeet {

// What an image takes of the pool: pages of its own and, where little would be in the last of them, so many slots of
// one that it shares with others' images.
struct ImageSize {
  static constexpr int32_t kSlots = 16;  // of a page

  int32_t pages = 0;
  int32_t slots = 0;

  bool operator==(const ImageSize&) const = default;
  bool empty() const { return pages == 0 && slots == 0; }
  // That are enough, whoever shares the last.
  int32_t most_pages() const { return pages + (slots > 0 ? 1 : 0); }
  int64_t all_slots() const { return int64_t{pages} * kSlots + slots; }
  int64_t bytes(int64_t page_bytes) const { return pages * page_bytes + slots * (page_bytes / kSlots); }
};

struct AdapterLoad {
  AdapterLease adapter;        // not the base
  ImageSize size;              // AdapterImages::Size(adapter)
  std::vector<int32_t> pages;  // [size.most_pages()]
  int32_t first_slot = 0;      // of the last page, where its part is the image's
};

// Drops come first: their pages may be among the loads'.
struct AdapterMoves {
  std::vector<uint64_t> drops;  // Adapter::serial
  std::vector<AdapterLoad> loads;

  bool empty() const { return drops.empty() && loads.empty(); }
};

struct AdapterLoaded {
  uint64_t serial = 0;  // of the adapter
  absl::Status status;  // not OK: it is not there, its pages are free
  int64_t bytes = 0;    // of its pages, those that hold something
};

class AdapterImages {
 public:
  virtual ~AdapterImages() = default;

  // What the adapter's image takes, without that of Adapter::shared; never nothing. Any thread.
  // INVALID_ARGUMENT: a page is too small for one of its rank rows or vectors.
  virtual absl::StatusOr<ImageSize> Size(const Adapter& adapter) const = 0;

  // `wake` is called, on a thread of the images' own, whenever TakeLoaded has something new.
  virtual void SetWake(std::function<void()> wake) = 0;

  // The rest on the engine's thread, between steps.
  // Starts to copy; returns at once. Steps may use an adapter once TakeLoaded has named it and what it
  // shares. A load fails where Adapter::shared is neither there nor on its way.
  virtual void Move(AdapterMoves moves) = 0;
  // Loads that have ended since the last call.
  virtual std::vector<AdapterLoaded> TakeLoaded() = 0;
};

}  // namespace lorikeet
