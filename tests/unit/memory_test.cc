#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine/memory/kv_layout.h"
#include "engine/memory/page_pool.h"
#include "engine/memory/prefix_cache.h"
#include "engine/memory/sequence_pages.h"
#include "gtest/gtest.h"

namespace lorikeet {
namespace {

TEST(PagePool, GivesEveryPageOnceAndCountsThem) {
  PagePool pool(5);
  std::vector<int32_t> ids;
  ASSERT_TRUE(pool.Alloc(2, &ids));
  ASSERT_TRUE(pool.Alloc(3, &ids));
  EXPECT_EQ(std::set<int32_t>(ids.begin(), ids.end()), (std::set<int32_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(pool.free(), 0);
  EXPECT_EQ(pool.used(), 5);
  pool.Free(std::span(ids).first(2));
  EXPECT_EQ(pool.free(), 2);
  EXPECT_EQ(pool.total(), 5);
}

TEST(PagePool, AnAllocationThatDoesNotFitChangesNothing) {
  PagePool pool(3);
  std::vector<int32_t> ids = {77};
  EXPECT_FALSE(pool.Alloc(4, &ids));
  EXPECT_EQ(ids, std::vector<int32_t>{77});
  EXPECT_EQ(pool.free(), 3);
}

class PagePoolRuns : public ::testing::Test {
 protected:
  PagePoolRuns() { EXPECT_TRUE(pool_.Alloc(300, &all_)); }

  void Free(int32_t begin, int32_t end) {
    pool_.Free(std::span(all_).subspan(begin, end - begin));
  }
  std::vector<int32_t> Alloc(int32_t count) {
    std::vector<int32_t> ids;
    EXPECT_TRUE(pool_.Alloc(count, &ids));
    return ids;
  }
  static std::vector<int32_t> From(int32_t first, int32_t count) {
    std::vector<int32_t> ids(count);
    std::iota(ids.begin(), ids.end(), first);
    return ids;
  }

  PagePool pool_{300};
  std::vector<int32_t> all_;
};

TEST_F(PagePoolRuns, AreTheShortestWithRoomOrElseTheLongest) {
  Free(0, 3), Free(60, 70), Free(100, 230), Free(299, 300);
  EXPECT_EQ(Alloc(8), From(60, 8));
  EXPECT_EQ(Alloc(1), From(299, 1));
  EXPECT_EQ(Alloc(20), From(100, 20));
  std::vector<int32_t> both = From(120, 110);
  both.insert(both.end(), {68, 69});
  EXPECT_EQ(Alloc(112), both);
  EXPECT_EQ(Alloc(3), From(0, 3));
  EXPECT_EQ(pool_.free(), 0);
}

TEST_F(PagePoolRuns, AFewPagesFillHolesAndLeaveTheLongRun) {
  Free(10, 60);
  for (int32_t hole = 100; hole < 300; hole += 20) Free(hole, hole + 4);
  for (int32_t hole = 100; hole < 300; hole += 20) EXPECT_EQ(Alloc(4), From(hole, 4));
  EXPECT_EQ(Alloc(50), From(10, 50));
}

// More holes than are looked at for so few pages; those behind them are found when it must be.
TEST_F(PagePoolRuns, PagesBehindManyHolesAreFound) {
  for (int32_t hole = 0; hole < 200; hole += 2) Free(hole, hole + 1);
  Free(250, 280);
  EXPECT_EQ(Alloc(1), From(0, 1));
  EXPECT_EQ(Alloc(128).size(), 128u);
  EXPECT_EQ(pool_.free(), 1);
}

// Any history against a set of ids.
TEST(PagePool, NeverGivesAPageTwiceAndLosesNone) {
  std::mt19937 rng(5);
  for (const int32_t total : {1, 63, 64, 65, 1000}) {
    PagePool pool(total);
    std::vector<std::vector<int32_t>> held;
    std::set<int32_t> taken;
    for (int i = 0; i < 2000; ++i) {
      if (!held.empty() && rng() % 2 == 0) {
        std::swap(held[rng() % held.size()], held.back());
        pool.Free(held.back());
        for (const int32_t id : held.back()) taken.erase(id);
        held.pop_back();
      } else {
        const int32_t count = static_cast<int32_t>(rng() % (total / 4 + 1));
        std::vector<int32_t> ids;
        const bool fits = count <= total - static_cast<int32_t>(taken.size());
        ASSERT_EQ(pool.Alloc(count, &ids), fits);
        ASSERT_EQ(ids.size(), fits ? count : 0);
        for (const int32_t id : ids) {
          ASSERT_TRUE(id >= 0 && id < total && taken.insert(id).second) << id << " of " << total;
        }
        held.push_back(std::move(ids));
      }
      ASSERT_EQ(pool.used(), taken.size());
    }
  }
}

TEST(PagePoolDeathTest, APageGivenBackTwiceStopsTheProgram) {
  PagePool pool(3);
  std::vector<int32_t> ids;
  ASSERT_TRUE(pool.Alloc(2, &ids));
  const std::vector<int32_t> twice = {ids[0], ids[0]};
  EXPECT_DEATH(pool.Free(twice), "already free");
  const std::vector<int32_t> foreign = {3};
  EXPECT_DEATH(pool.Free(foreign), "not of this pool");
}

TEST(SequencePages, GrowsByWholeBlocksAndReturnsThemWhenItDies) {
  // A layer takes 24 KiB of keys and values, so 30 layers do not fit in one page.
  const KvLayout layout = KvLayout::Make(30, 3, 64, DType::kF32);
  ASSERT_GT(layout.pages_per_block, 1);
  PagePool pool(3 * layout.pages_per_block + 1);
  PrefixCache cache(&pool);
  {
    SequencePages pages(&cache, &layout);
    ASSERT_TRUE(pages.Reserve(1));
    EXPECT_EQ(pages.count(), layout.pages_per_block);
    const std::vector<int32_t> first(pages.First(1).begin(), pages.First(1).end());
    ASSERT_TRUE(pages.Reserve(16));
    EXPECT_EQ(pages.count(), layout.pages_per_block);
    ASSERT_TRUE(pages.Reserve(17));
    EXPECT_EQ(pages.count(), 2 * layout.pages_per_block);
    EXPECT_EQ(std::vector<int32_t>(pages.First(16).begin(), pages.First(16).end()), first)
        << "growing moved earlier tokens";
    EXPECT_FALSE(pages.Reserve(49)) << "four blocks out of a pool of three";
    EXPECT_EQ(pages.count(), 2 * layout.pages_per_block);
  }
  EXPECT_EQ(pool.used(), 0);
}

// Sequences over a pool of one-page blocks.
class Prefixes : public ::testing::Test {
 protected:
  static std::vector<int32_t> Count(int32_t first, int32_t tokens) {
    std::vector<int32_t> all(tokens);
    std::iota(all.begin(), all.end(), first);
    return all;
  }
  static KvIdentity Identity(const std::string& text) {
    return std::make_shared<const std::string>(text);
  }
  // As a sequence of `tokens` that is computed and ends.
  void Leave(const std::vector<int32_t>& tokens, const KvIdentity& identity) {
    SequencePages pages(&cache_, &layout_);
    pages.Adopt(tokens, identity);
    ASSERT_TRUE(pages.Reserve(static_cast<int64_t>(tokens.size())));
    pages.Share(tokens, identity, /*replace=*/true);
  }
  int32_t Hits(const std::vector<int32_t>& tokens, const KvIdentity& identity) {
    return SequencePages(&cache_, &layout_).Adopt(tokens, identity);
  }

  const KvLayout layout_ = KvLayout::Make(2, 1, 64, DType::kF32);
  const KvIdentity base_ = Identity("");
  PagePool pool_{8};
  PrefixCache cache_{&pool_};
};

TEST_F(Prefixes, WholeBlocksOfTheSameTokensBeforeThemAreFound) {
  Leave(Count(0, 40), base_);
  EXPECT_EQ(Hits(Count(0, 40), base_), 32) << "the last block was not whole";
  EXPECT_EQ(Hits(Count(0, 31), base_), 16);
  std::vector<int32_t> other = Count(0, 48);
  other[20] = 7;
  EXPECT_EQ(Hits(other, base_), 16);
  other = Count(0, 48);
  other[0] = 7;
  EXPECT_EQ(Hits(other, base_), 0) << "a block counts only behind the blocks before it";
  EXPECT_EQ(Hits(Count(16, 16), base_), 0);
  EXPECT_EQ(pool_.used(), 2);
  EXPECT_EQ(cache_.cold_pages(), 2);
}

TEST_F(Prefixes, AnotherIdentityFindsNothing) {
  const std::vector<int32_t> tokens = Count(0, 32);
  Leave(tokens, Identity("a"));
  EXPECT_EQ(Hits(tokens, Identity("a")), 32);
  EXPECT_EQ(Hits(tokens, Identity("b")), 0);
  EXPECT_EQ(Hits(tokens, base_), 0);
  Leave(tokens, base_);
  EXPECT_EQ(Hits(tokens, base_), 32);
  EXPECT_EQ(pool_.used(), 4) << "blocks of two identities are two";
}

TEST_F(Prefixes, ColdBlocksGoWhenPagesAreNeededTheOneUsedLongestAgoFirst) {
  Leave(Count(0, 32), base_);
  Leave(Count(100, 32), base_);
  Leave(Count(200, 32), base_);
  EXPECT_EQ(Hits(Count(0, 32), base_), 32);  // used last now
  SequencePages pages(&cache_, &layout_);
  ASSERT_TRUE(pages.Reserve(2 * 16 + 1 + 16));  // two are free, two come from the cache
  EXPECT_EQ(Hits(Count(0, 32), base_), 32);
  EXPECT_EQ(Hits(Count(200, 32), base_), 32);
  EXPECT_EQ(Hits(Count(100, 32), base_), 0);
  EXPECT_FALSE(pages.Reserve(9 * 16));
  EXPECT_EQ(cache_.cold_pages(), 4) << "what does not fit takes nothing";
  ASSERT_TRUE(pages.Reserve(8 * 16));
  EXPECT_EQ(cache_.cold_pages(), 0);
}

TEST_F(Prefixes, BlocksInUseStayAndTheirBeginningsWithThem) {
  Leave(Count(0, 48), base_);
  SequencePages user(&cache_, &layout_);
  EXPECT_EQ(user.Adopt(Count(0, 32), base_), 32);
  EXPECT_EQ(cache_.cold_pages(), 1);
  SequencePages pages(&cache_, &layout_);
  EXPECT_FALSE(pages.Reserve(7 * 16));
  ASSERT_TRUE(pages.Reserve(6 * 16));
  EXPECT_EQ(Hits(Count(0, 48), base_), 32);
  EXPECT_EQ(cache_.available(), 0);
}

TEST_F(Prefixes, TheSameBlockComputedTwiceIsKeptOnce) {
  const std::vector<int32_t> tokens = Count(0, 33);
  SequencePages a(&cache_, &layout_), b(&cache_, &layout_);
  ASSERT_TRUE(a.Reserve(33) && b.Reserve(33));
  a.Share(tokens, base_, /*replace=*/false);
  b.Share(tokens, base_, /*replace=*/false);
  EXPECT_EQ(pool_.used(), 6);
  EXPECT_NE(b.First(16)[0], a.First(16)[0]);
  b.Share(tokens, base_, /*replace=*/true);
  EXPECT_EQ(pool_.used(), 4);
  EXPECT_EQ(b.First(32)[0], a.First(32)[0]);
  EXPECT_EQ(b.First(32)[1], a.First(32)[1]);
  EXPECT_NE(b.First(33)[2], a.First(33)[2]);
  a.Release();
  b.Release();
  EXPECT_EQ(pool_.used(), 2);
  cache_.Clear();
  EXPECT_EQ(pool_.used(), 0);
}

}  // namespace
}  // namespace lorikeet
