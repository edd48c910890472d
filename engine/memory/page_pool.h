// Which pages are free. Page ids only: no memory, no policy, one thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace lorikeet {

class PagePool {
 public:
  explicit PagePool(int32_t pages);  // ids [0, pages)

  // Appends `count` page ids to `out`, or changes nothing and returns false if fewer are free. In few runs
  // of consecutive ids: images are copied run by run, and keys and values that fill the short ones leave
  // the long ones to them.
  bool Alloc(int32_t count, std::vector<int32_t>* out);
  // REQUIRES: every id is allocated; a page given back twice stops the program.
  void Free(std::span<const int32_t> ids);

  int32_t total() const { return total_; }
  int32_t free() const { return free_count_; }
  int32_t used() const { return total() - free(); }

 private:
  struct Run {
    int32_t begin = 0, end = 0;

    int32_t size() const { return end - begin; }
  };

  bool IsFree(int32_t id) const { return (free_[id / 64] >> (id % 64) & 1) != 0; }
  // The first page from `id` on that is free, or that is not; total() if there is none.
  int32_t Next(int32_t id, bool free) const;
  Run NextRun(int32_t id) const;  // of free pages
  void Take(Run run, std::vector<int32_t>* out);

  const int32_t total_;
  int32_t free_count_;
  int32_t lowest_ = 0;          // no page before it is free
  std::vector<uint64_t> free_;  // a bit a page
  std::vector<Run> runs_;       // Alloc's alone
};

}  // namespace lorikeet
