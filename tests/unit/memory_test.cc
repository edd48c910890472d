#include <set>
#include <vector>

#include "engine/memory/kv_layout.h"
#include "engine/memory/page_pool.h"
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
  {
    SequencePages pages(&pool, &layout);
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

}  // namespace
}  // namespace lorikeet
