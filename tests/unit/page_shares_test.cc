#include "engine/memory/page_shares.h"

#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace lorikeet {
namespace {

TEST(PageShares, FillTheFullestPageThatHasRoom) {
  PagePool pool(3);
  PageShares shares(&pool);
  const PageShares::Run a = shares.Take(9), b = shares.Take(10), c = shares.Take(6), d = shares.Take(7);
  EXPECT_NE(a.page, b.page) << "nine and ten are more than a page";
  EXPECT_EQ(c.page, b.page);
  EXPECT_EQ(d.page, a.page);
  EXPECT_EQ(pool.used(), 2);
  shares.Free(b);
  EXPECT_EQ(pool.used(), 2) << "c is still there";
  EXPECT_EQ(shares.Take(10).page, c.page);
  EXPECT_EQ(pool.used(), 2);
}

// Runs that come, go and change their minds: none lie in one another, counts are those of a recount, and pages
// are the pool's again when the last has gone.
TEST(PageShares, RandomHistoriesCountWhatCouldGo) {
  constexpr int32_t kPages = 6;
  struct Known {
    PageShares::Run run;
    bool wanted = false, idle = false;
  };
  int64_t could_go = 0;
  for (uint32_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 rng(seed);
    PagePool pool(kPages);
    PageShares shares(&pool);
    std::vector<Known> all;
    for (int i = 0; i < 100; ++i) {
      if (rng() % 2 == 0 && pool.free() > 0) {
        all.push_back({shares.Take(1 + static_cast<int32_t>(rng() % (ImageSize::kSlots - 1)))});
      } else if (!all.empty()) {
        Known& known = all[rng() % all.size()];
        if (known.idle) shares.SetIdle(known.run, known.wanted, false);
        known.idle = !known.idle && rng() % 4 > 0;
        known.wanted = rng() % 2 == 0;
        if (known.idle) {
          shares.SetIdle(known.run, known.wanted, true);
        } else {
          shares.Free(known.run);
          std::swap(known, all.back());
          all.pop_back();
        }
      }
      std::set<std::pair<int32_t, int32_t>> slots;
      std::set<int32_t> pages, stay[2];
      for (const Known& known : all) {
        for (int32_t s = known.run.first; s < known.run.first + known.run.count; ++s) {
          ASSERT_LT(s, ImageSize::kSlots);
          ASSERT_TRUE(slots.insert({known.run.page, s}).second) << "two runs in a slot";
        }
        pages.insert(known.run.page);
        if (!known.idle) stay[1].insert(known.run.page);
        if (!known.idle || known.wanted) stay[0].insert(known.run.page);
      }
      ASSERT_EQ(pool.used(), std::ssize(pages));
      ASSERT_EQ(shares.pages(), std::ssize(pages));
      for (const bool wanted : {false, true}) {
        ASSERT_EQ(shares.CanGo(wanted), std::ssize(pages) - std::ssize(stay[wanted])) << "wanted " << wanted;
        for (const int32_t page : pages) ASSERT_EQ(shares.CanGo(page, wanted), !stay[wanted].contains(page));
      }
      could_go += shares.CanGo(true);
    }
  }
  EXPECT_GT(could_go, 1000);
}

}  // namespace
}  // namespace lorikeet
