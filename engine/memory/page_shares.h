// Pages of the pool in which what several images leave over lies side by side, a run of slots each: an image of half a
// page takes half a page. Page ids and counts only: no memory, no policy, one thread.
//
// A page is freed with its last run. So that room can be counted before it is made, runs that could go are told
// apart: those nobody asks for, and those wanted.
#pragma once

#include <cstdint>
#include <map>

#include "engine/api/adapter_images.h"
#include "engine/memory/page_pool.h"

namespace lorikeet {

class PageShares {
 public:
  struct Run {
    int32_t page = -1;
    int32_t first = 0, count = 0;  // slots
  };

  explicit PageShares(PagePool* pool) : pool_(pool) {}

  // In the fullest page that has room, else in one of the pool; it could not go. REQUIRES: 0 < slots <
  // ImageSize::kSlots; the pool has a free page.
  Run Take(int32_t slots);
  void Free(const Run& run);  // REQUIRES: it is not idle

  // Whether the run could go, wanted or not.
  void SetIdle(const Run& run, bool wanted, bool idle);

  // Whether the page would be free if all runs went that could, those that are wanted as well if `wanted`.
  bool CanGo(int32_t page, bool wanted) const { return CanGo(pages_.at(page), wanted); }
  int32_t CanGo(bool wanted) const { return can_go_[0] + (wanted ? can_go_[1] : 0); }  // pages

  int32_t pages() const { return static_cast<int32_t>(pages_.size()); }

 private:
  struct Page {
    uint32_t taken = 0;  // a bit a slot
    int32_t runs = 0;
    int32_t idle[2] = {};  // runs that could go: unwanted, wanted
  };

  static bool CanGo(const Page& page, bool wanted) {
    return page.idle[0] + (wanted ? page.idle[1] : 0) == page.runs;
  }
  template <typename Fn>
  void Change(Page* page, const Fn& change);

  PagePool* const pool_;
  std::map<int32_t, Page> pages_;
  int32_t can_go_[2] = {};  // pages of unwanted runs alone, others of idle runs alone
};

}  // namespace lorikeet
