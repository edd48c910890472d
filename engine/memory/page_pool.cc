#include "engine/memory/page_pool.h"

#include <algorithm>
#include <bit>
#include <string>

#include "engine/base/check.h"

namespace lorikeet {
namespace {

// Runs that are looked at: all that are short in a pool of holes would take longer than they are worth.
constexpr int64_t kRunsAPage = 4, kMostRuns = 4096;

}  // namespace

PagePool::PagePool(int32_t pages)
    : total_(pages), free_count_(pages), free_((pages + 63) / 64, ~uint64_t{0}) {}

int32_t PagePool::Next(int32_t id, bool free) const {
  if (id >= total_) return total_;
  const uint64_t flip = free ? 0 : ~uint64_t{0};
  size_t word = id / 64;
  uint64_t bits = (free_[word] ^ flip) & ~uint64_t{0} << (id % 64);
  while (bits == 0 && ++word < free_.size()) bits = free_[word] ^ flip;
  if (bits == 0) return total_;
  return std::min(total_, static_cast<int32_t>(word * 64) + std::countr_zero(bits));
}

PagePool::Run PagePool::NextRun(int32_t id) const {
  const int32_t begin = Next(id, true);
  return {begin, Next(begin, false)};
}

void PagePool::Take(Run run, std::vector<int32_t>* out) {
  for (int32_t id = run.begin; id < run.end; ++id) {
    free_[id / 64] &= ~(uint64_t{1} << (id % 64));
    out->push_back(id);
  }
  free_count_ -= run.size();
}

// The shortest run that has room for all, or else the longest, and so on with the rest.
bool PagePool::Alloc(int32_t count, std::vector<int32_t>* out) {
  LK_CHECK(count >= 0);
  if (count > free()) return false;
  const int64_t most_runs = std::min(kRunsAPage * count, kMostRuns);
  runs_.clear();
  lowest_ = Next(lowest_, true);
  int32_t room = 0;
  for (Run run = NextRun(lowest_); run.size() > 0; run = NextRun(run.end)) {
    runs_.push_back(run);
    room += run.size();
    if (room >= count && (run.size() == count || std::ssize(runs_) >= most_runs)) break;
  }
  std::ranges::sort(runs_, [](const Run& a, const Run& b) {
    return a.size() != b.size() ? a.size() > b.size() : a.begin > b.begin;
  });
  for (size_t i = 0; count > 0; ++i) {
    while (i + 1 < runs_.size() && runs_[i + 1].size() >= count) ++i;
    Run run = runs_[i];
    run.end = std::min(run.end, run.begin + count);
    Take(run, out);
    count -= run.size();
  }
  return true;
}

void PagePool::Free(std::span<const int32_t> ids) {
  for (const int32_t id : ids) {
    LK_CHECK_MSG(id >= 0 && id < total(), "page " + std::to_string(id) + " is not of this pool");
    LK_CHECK_MSG(!IsFree(id), "page " + std::to_string(id) + " is already free");
    free_[id / 64] |= uint64_t{1} << (id % 64);
    lowest_ = std::min(lowest_, id);
  }
  free_count_ += static_cast<int32_t>(ids.size());
}

}  // namespace lorikeet
