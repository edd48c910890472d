// Which pages are free. Page ids only: no memory, no policy, one thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace lorikeet {

class PagePool {
 public:
  explicit PagePool(int32_t pages);  // ids [0, pages)

  // Appends `count` page ids to `out`, or changes nothing and returns false if fewer are free.
  bool Alloc(int32_t count, std::vector<int32_t>* out);
  // Pages given back together are taken again in the same order: what follows one another in memory goes on doing
  // so, and is copied at once. REQUIRES: every id is allocated; a page given back twice stops the program.
  void Free(std::span<const int32_t> ids);

  int32_t total() const { return static_cast<int32_t>(allocated_.size()); }
  int32_t free() const { return static_cast<int32_t>(free_.size()); }
  int32_t used() const { return total() - free(); }

 private:
  std::vector<int32_t> free_;       // a stack: the page used last is the warmest
  std::vector<uint8_t> allocated_;  // [pages]
};

}  // namespace lorikeet
