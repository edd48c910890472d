#include "engine/memory/page_pool.h"

#include <numeric>
#include <ranges>
#include <string>

#include "engine/base/check.h"

namespace lorikeet {

PagePool::PagePool(int32_t pages) : free_(pages), allocated_(pages, 0) {
  std::iota(free_.rbegin(), free_.rend(), 0);
}

bool PagePool::Alloc(int32_t count, std::vector<int32_t>* out) {
  LK_CHECK(count >= 0);
  if (count > free()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t id = free_.back();
    free_.pop_back();
    allocated_[id] = 1;
    out->push_back(id);
  }
  return true;
}

void PagePool::Free(std::span<const int32_t> ids) {
  for (const int32_t id : ids | std::views::reverse) {
    LK_CHECK_MSG(id >= 0 && id < total(), "page " + std::to_string(id) + " is not of this pool");
    LK_CHECK_MSG(allocated_[id], "page " + std::to_string(id) + " is already free");
    allocated_[id] = 0;
    free_.push_back(id);
  }
}

}  // namespace lorikeet
