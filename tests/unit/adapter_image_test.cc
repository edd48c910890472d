// How an adapter is laid out for the device: every rank row is where its tile says, whole, and
// within a page.
#include "engine/kernels/cuda/adapter_image.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "tests/support/random_adapter.h"

namespace lorikeet::cuda {
namespace {

constexpr DType kType = DType::kBF16;

// Writes the pieces as a copy to the device would; a byte written twice fails.
std::vector<std::byte> Image(const ImagePlan& plan, int64_t page_bytes) {
  std::vector<std::byte> image(plan.pages * page_bytes);
  std::vector<bool> written(image.size());
  for (const ImagePlan::Piece& piece : plan.pieces) {
    const int64_t element = piece.vector ? 4 : 2;
    const int64_t pitch = piece.vector ? piece.width : RowPitch(piece.width);
    const int64_t bytes = piece.rows * pitch * element;
    EXPECT_EQ(piece.to / page_bytes, (piece.to + bytes - 1) / page_bytes) << "across a page";
    for (int32_t r = 0; r < piece.rows; ++r) {
      const int64_t to = piece.to + r * pitch * element;
      for (int64_t i = 0; i < piece.width * element; ++i) {
        EXPECT_FALSE(written[to + i]);
        written[to + i] = true;
      }
      std::memcpy(&image[to], piece.from + r * piece.from_stride * element, piece.width * element);
    }
  }
  return image;
}

int64_t OffsetOf(const void* place) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(place)) - 1;
}

void ExpectRow(const std::vector<std::byte>& image, const void* const (&places)[2], int32_t first,
               int32_t k, int32_t width, const float* expected) {
  const int64_t at = k < first ? OffsetOf(places[0]) + k * RowPitch(width) * 2
                               : OffsetOf(places[1]) + (k - first) * RowPitch(width) * 2;
  for (int32_t i = 0; i < width; ++i) {
    uint16_t bits;
    std::memcpy(&bits, &image[at + 2 * i], 2);
    ASSERT_EQ(BF16ToFloat(bits), expected[i]) << "rank row " << k << " element " << i;
  }
}

TEST(AdapterImage, EveryRankRowIsWhereItsTileSaysWithinAPage) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 rng(seed);
    const int32_t in = 1 + rng() % 200;
    const std::vector<int32_t> outs = {1 + static_cast<int32_t>(rng() % 200), 64, 7};
    const RandomAdapter random(in, outs, kType, 70, rng);
    std::vector<ModuleWidths> widths;
    for (const int32_t out : outs) widths.push_back({in, out});
    // Room for a tile of 16 rows of up to 200 elements, or for fewer.
    const int64_t page_bytes = seed % 2 == 0 ? 8192 : 2048;
    const absl::StatusOr<ImagePlan> planned = PlanImage(random.adapter, widths, kType, page_bytes);
    ASSERT_TRUE(planned.ok()) << planned.status();
    const ImagePlan& plan = *planned;
    const std::vector<std::byte> image = Image(plan, page_bytes);
    for (size_t m = 0; m < outs.size(); ++m) {
      const RankTile* tiles = &plan.tiles[m * plan.tiles_per_module];
      const int32_t rank = random.adapter.modules[m].low_rank.rank;
      const int64_t row_bytes = 2 * RowPitch(std::max(in, outs[m]));
      const int32_t tile = static_cast<int32_t>(std::min<int64_t>(16, page_bytes / row_bytes));
      EXPECT_EQ(tiles[0].module_tiles, (rank + tile - 1) / tile);
      int32_t ranks = 0;
      for (int32_t i = 0; i < plan.tiles_per_module; ++i) {
        for (int32_t k = 0; k < tiles[i].ranks; ++k, ++ranks) {
          ExpectRow(image, tiles[i].a, tiles[i].a_first, k, in, &random.a[m][ranks * in]);
          ExpectRow(image, tiles[i].b, tiles[i].b_first, k, outs[m], &random.b[m][ranks * outs[m]]);
        }
      }
      EXPECT_EQ(ranks, rank) << "seed " << seed << " module " << m;
      if (const float* scale = random.adapter.modules[m].out_scale) {
        EXPECT_EQ(0, std::memcmp(&image[OffsetOf(tiles[0].out_scale)], scale, outs[m] * 4));
      }
    }
  }
}

TEST(AdapterImage, ARankRowWiderThanAPageIsRefusedByName) {
  std::mt19937 rng(1);
  const RandomAdapter random(64, {600}, kType, 8, rng);
  const absl::Status status = PlanImage(random.adapter, {{64, 600}}, kType, 1024).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("64 to 600"), std::string::npos) << status;
}

}  // namespace
}  // namespace lorikeet::cuda
