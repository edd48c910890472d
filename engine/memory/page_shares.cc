#include "engine/memory/page_shares.h"

#include <bit>
#include <vector>

#include "engine/base/check.h"

namespace lorikeet {
namespace {

constexpr uint32_t MaskOf(int32_t first, int32_t count) { return ((uint32_t{1} << count) - 1) << first; }

// The first of so many free slots; -1: there are none.
int32_t FirstFree(uint32_t taken, int32_t count) {
  for (int32_t first = 0; first + count <= ImageSize::kSlots; ++first) {
    if ((taken & MaskOf(first, count)) == 0) return first;
  }
  return -1;
}

}  // namespace

// Keeps can_go_ true of the page.
template <typename Fn>
void PageShares::Change(Page* page, const Fn& change) {
  const auto count = [&](int32_t by) {
    if (page->runs > 0 && CanGo(*page, true)) can_go_[!CanGo(*page, false)] += by;
  };
  count(-1);
  change();
  count(1);
}

PageShares::Run PageShares::Take(int32_t slots) {
  LK_CHECK(slots > 0 && slots < ImageSize::kSlots);
  Run run{.count = slots};
  int32_t fullest = -1;
  for (const auto& [id, page] : pages_) {
    const int32_t first = FirstFree(page.taken, slots), taken = std::popcount(page.taken);
    if (first < 0 || taken <= fullest) continue;
    fullest = taken;
    run.page = id;
    run.first = first;
  }
  if (run.page < 0) {
    std::vector<int32_t> ids;
    LK_CHECK(pool_->Alloc(1, &ids));
    run.page = ids[0];
  }
  Page* page = &pages_[run.page];
  Change(page, [&] {
    page->taken |= MaskOf(run.first, run.count);
    ++page->runs;
  });
  return run;
}

void PageShares::Free(const Run& run) {
  Page* page = &pages_.at(run.page);
  Change(page, [&] {
    page->taken &= ~MaskOf(run.first, run.count);
    --page->runs;
  });
  if (page->runs > 0) return;
  pages_.erase(run.page);
  pool_->Free({&run.page, 1});
}

void PageShares::SetIdle(const Run& run, bool wanted, bool idle) {
  Page* page = &pages_.at(run.page);
  Change(page, [&] { page->idle[wanted] += idle ? 1 : -1; });
}

}  // namespace lorikeet
