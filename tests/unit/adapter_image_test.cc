// How an adapter is laid out for the device: every rank row is where its tile says, whole, and
// within a page.
#include "engine/kernels/cuda/adapter_image.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "engine/memory/kv_layout.h"
#include "tests/support/random_adapter.h"

namespace lorikeet::cuda {
namespace {

constexpr DType kType = DType::kBF16;

// Writes the pieces as a copy to the device would; a byte written twice fails.
std::vector<std::byte> Image(const ImagePlan& plan, int64_t page_bytes) {
  std::vector<std::byte> image(plan.size.most_pages() * page_bytes);
  std::vector<bool> written(image.size());
  for (const ImagePlan::Piece& piece : plan.pieces) {
    const int64_t bytes = piece.rows * piece.to_pitch;
    EXPECT_EQ(piece.to / page_bytes, (piece.to + bytes - 1) / page_bytes) << "across a page";
    for (int32_t r = 0; r < piece.rows; ++r) {
      const int64_t to = piece.to + r * piece.to_pitch;
      for (int64_t i = 0; i < ByteSize(piece.to_dtype, piece.width); ++i) {
        EXPECT_FALSE(written[to + i]);
        written[to + i] = true;
      }
    }
    WritePiece(piece, &image[piece.to]);
  }
  return image;
}

int64_t OffsetOf(const void* place) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(place)) - 1;
}

// One factor's rows of a tile: column c of row k.
struct TileRows {
  const void* const* places;
  int32_t first, begin, pitch;

  float at(const std::vector<std::byte>& image, int32_t k, int32_t c) const {
    if (c < 8 * begin || c >= 8 * (begin + pitch)) return 0;
    const int64_t row = k < first ? OffsetOf(places[0]) + k * pitch * 16
                                  : OffsetOf(places[1]) + (k - first) * pitch * 16;
    uint16_t bits;
    std::memcpy(&bits, &image[row + 2 * (c - 8 * begin)], 2);
    return BF16ToFloat(bits);
  }
};
TileRows RowsOfA(const RankTile& t) { return {t.a, t.a_first, t.a_begin, t.a_pitch}; }
TileRows RowsOfB(const RankTile& t) { return {t.b, t.b_first, t.b_begin, t.b_pitch}; }

// All ranks of a module, as the tiles have them.
void ExpectRanks(const std::vector<std::byte>& image, const RankTile* tiles, const RandomAdapter& random,
                 size_t m, int32_t in, int32_t out) {
  const int32_t rank = random.adapter.modules[m].low_rank.rank;
  int32_t ranks = 0;
  for (int32_t i = 0; i < tiles[0].module_tiles; ++i) {
    for (int32_t k = 0; k < tiles[i].ranks; ++k, ++ranks) {
      ASSERT_LT(ranks, rank);
      for (int32_t c = 0; c < in; ++c) {
        ASSERT_EQ(RowsOfA(tiles[i]).at(image, k, c), random.a[m][ranks * in + c]) << "rank " << ranks;
      }
      for (int32_t c = 0; c < out; ++c) {
        ASSERT_EQ(RowsOfB(tiles[i]).at(image, k, c), random.b[m][ranks * out + c]) << "rank " << ranks;
      }
    }
  }
  ASSERT_EQ(ranks, rank);
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
    const absl::StatusOr<ImagePlan> planned = PlanImage(random.adapter, widths, {}, kType, page_bytes);
    ASSERT_TRUE(planned.ok()) << planned.status();
    const ImagePlan& plan = *planned;
    const std::vector<std::byte> image = Image(plan, page_bytes);
    for (size_t m = 0; m < outs.size(); ++m) {
      const RankTile* tiles = &plan.tiles[m * plan.tiles_per_module];
      const int32_t rank = random.adapter.modules[m].low_rank.rank;
      const int64_t row_bytes = 2 * RowPitch(std::max(in, outs[m]));
      const int32_t tile = static_cast<int32_t>(std::min<int64_t>(16, page_bytes / row_bytes));
      EXPECT_EQ(tiles[0].module_tiles, (rank + tile - 1) / tile);
      ExpectRanks(image, tiles, random, m, in, outs[m]);
      if (const float* scale = random.adapter.modules[m].out_scale) {
        EXPECT_EQ(0, std::memcmp(&image[OffsetOf(tiles[0].out_scale)], scale, outs[m] * 4));
      }
    }
  }
}

// By expert, layer and linear; layers that a LoRA is not on have tiles without ranks.
TEST(AdapterImage, LorasOfAMixtureLieBehindTheModelsModules) {
  constexpr int32_t kLayers = 2, kHidden = 24, kInner = 40, kLoras = 3;
  std::mt19937 rng(1);
  std::vector<ModuleWidths> widths(ModuleCount(kLayers), {kHidden, kHidden});
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    widths[LayerModule(layer, Linear::kGate)] = widths[LayerModule(layer, Linear::kUp)] = {kHidden, kInner};
    widths[LayerModule(layer, Linear::kDown)] = {kInner, kHidden};
  }
  Adapter adapter;
  adapter.modules.resize(ModuleCount(kLayers));
  adapter.mlp_mixture.chosen = 2;
  adapter.mlp_mixture.routers.assign(kLayers, RandomFloats(kLoras * kHidden, rng));
  std::vector<std::unique_ptr<RandomAdapter>> inner, outer;
  for (int32_t e = 0; e < kLoras; ++e) {
    inner.push_back(std::make_unique<RandomAdapter>(kHidden, std::vector{kInner, kInner}, kType, 40, rng));
    outer.push_back(std::make_unique<RandomAdapter>(kInner, std::vector{kHidden}, kType, 40, rng));
    auto lora = std::make_shared<Adapter>();
    lora->modules.resize(ModuleCount(kLayers));
    lora->modules[LayerModule(1, Linear::kGate)] = inner[e]->adapter.modules[0];
    lora->modules[LayerModule(1, Linear::kUp)] = inner[e]->adapter.modules[1];
    lora->modules[LayerModule(1, Linear::kDown)] = outer[e]->adapter.modules[0];
    adapter.mlp_mixture.experts.push_back(lora);
  }
  const absl::StatusOr<ImagePlan> plan = PlanImage(adapter, widths, {}, kType, 8192);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const std::vector<std::byte> image = Image(*plan, 8192);
  const auto tiles = [&](int32_t e, int32_t layer, Linear linear) {
    const ModuleId module = FirstMixtureModule(kLayers, layer, linear) + e * kLayers * kLinearsPerExpert;
    return &plan->tiles[int64_t{module} * plan->tiles_per_module];
  };
  for (int32_t e = 0; e < kLoras; ++e) {
    ExpectRanks(image, tiles(e, 1, Linear::kGate), *inner[e], 0, kHidden, kInner);
    ExpectRanks(image, tiles(e, 1, Linear::kUp), *inner[e], 1, kHidden, kInner);
    ExpectRanks(image, tiles(e, 1, Linear::kDown), *outer[e], 0, kInner, kHidden);
    EXPECT_EQ(tiles(e, 0, Linear::kDown)->module_tiles, 0);
  }
  ASSERT_EQ(plan->parts.routers.size(), kLayers);
  EXPECT_EQ(plan->parts.routers[1].rows, kLoras);
  EXPECT_EQ(plan->parts.adapter.mixture.chosen, 2);
}

// Every kind of part, with matrices of several pages, pages lying in reverse order.
struct PartsCase {
  static constexpr int32_t kVocab = 50, kWidth = 24, kKv = 8, kTokens = 9, kRank = 3;
  std::vector<float> dense, rotation, values, a, b, kv, norm;
  std::vector<int32_t> row_begin, columns;
  Adapter adapter;

  explicit PartsCase(std::mt19937& rng) {
    const auto rounded = [&rng](int64_t n) {
      std::vector<float> floats = RandomFloats(n, rng);
      for (float& v : floats) v = BF16ToFloat(FloatToBF16(v));
      return floats;
    };
    dense = rounded(kWidth * kWidth);
    rotation = rounded(kWidth * 4);
    a = rounded(kRank * kVocab);
    b = rounded(kRank * kWidth);
    kv = rounded(2 * kTokens * kKv);
    norm = RandomFloats(kWidth, rng);
    for (int32_t o = 0; o <= kWidth; ++o) row_begin.push_back(o * 7);
    values = RandomFloats(row_begin.back(), rng);
    for (size_t e = 0; e < values.size(); ++e) columns.push_back(rng() % kWidth);
    adapter.modules.resize(ModuleCount(1));
    const auto bytes = [](const std::vector<float>& v) {
      return reinterpret_cast<const std::byte*>(v.data());
    };
    ModuleDelta& delta = adapter.modules[0];
    delta.dense = {DType::kF32, kWidth, bytes(dense)};
    delta.input_rotation = {4, rotation.data()};
    delta.sparse = {row_begin.data(), columns.data(), values.data()};
    adapter.embedding.low_rank = {kRank, DType::kF32, 1, bytes(a), bytes(b), kVocab, kWidth};
    adapter.virtual_tokens = {kTokens, nullptr, kv.data()};
    adapter.norms = {nullptr, norm.data(), nullptr};
  }
};

TEST(AdapterImage, EveryPartIsReadBackThroughItsPages) {
  constexpr int64_t kPageBytes = 256;
  std::mt19937 rng(7);
  const PartsCase c(rng);
  std::vector<ModuleWidths> widths(ModuleCount(1), {c.kWidth, c.kWidth});
  widths[LayerModule(0, Linear::kK)].out = c.kKv;
  widths[HeadModule(1)].out = c.kVocab;
  const absl::StatusOr<ImagePlan> plan = PlanImage(c.adapter, widths, {}, kType, kPageBytes);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const std::vector<std::byte> image = Image(*plan, kPageBytes);
  std::vector<std::vector<std::byte>> pages;
  std::vector<const void*> addresses;
  for (int64_t p = 0; p < plan->size.most_pages(); ++p) {
    pages.emplace_back(&image[p * kPageBytes], &image[p * kPageBytes] + kPageBytes);
  }
  for (const auto& page : pages) addresses.push_back(page.data());
  PartTables parts = plan->parts;
  ForEachRows(&parts, [&](PagedRows* rows) {
    if (rows->first == nullptr) return;
    const int64_t at = OffsetOf(rows->first);
    rows->first = &pages[at / kPageBytes][at % kPageBytes];
    if (rows->pages != nullptr) rows->pages = &addresses[OffsetOf(rows->pages)];
  });
  const auto expect = [](const PagedRows& rows, int32_t width, const auto& expected) {
    ASSERT_EQ(rows.rows * width, static_cast<int32_t>(expected.size()));
    for (int32_t r = 0; r < rows.rows; ++r) {
      for (int32_t i = 0; i < width; ++i) {
        const float value = rows.pitch == 2u * width ? BF16ToFloat(rows.row<uint16_t>(r)[i])
                                                     : rows.row<float>(r)[i];
        ASSERT_EQ(value, static_cast<float>(expected[r * width + i])) << "row " << r << ", " << i;
      }
    }
  };
  const ModuleParts& module = parts.modules[0];
  EXPECT_NE(module.dense.pages, nullptr);
  expect(module.dense, c.kWidth, c.dense);
  expect(module.rotation, 4, c.rotation);
  expect(module.value, 1, c.values);
  EXPECT_NE(module.column.pages, nullptr);
  for (size_t e = 0; e < c.columns.size(); ++e) {
    ASSERT_EQ(*module.column.row<int32_t>(e), c.columns[e]);
  }
  expect(parts.adapter.embedding.b, c.kWidth, c.b);
  std::vector<float> by_token;
  for (int32_t t = 0; t < c.kVocab; ++t) {
    for (int32_t k = 0; k < c.kRank; ++k) by_token.push_back(c.a[k * c.kVocab + t]);
  }
  expect(parts.adapter.embedding.a, c.kRank, by_token);
  expect(parts.adapter.virtual_tokens.kv, c.kKv, c.kv);
  expect(parts.norms[1], c.kWidth, c.norm);
  EXPECT_EQ(parts.norms[0].rows, 0);
  EXPECT_EQ(PartsOf(c.adapter, {}), Bit(Part::kInputRotation) | Bit(Part::kRows) | Bit(Part::kEmbedding) |
                                    Bit(Part::kPrefix) | Bit(Part::kNorms));
  for (int32_t r = 0; r < module.rotation.rows;) {
    const uint16_t* first = module.rotation.row<uint16_t>(r);
    const uint32_t together = module.rotation.together(r);
    ASSERT_GT(together, 0u);
    for (uint32_t k = 0; k < together && r < module.rotation.rows; ++k, ++r) {
      EXPECT_EQ(first + k * module.rotation.pitch / sizeof(uint16_t), module.rotation.row<uint16_t>(r)) << r;
    }
  }
  EXPECT_EQ(LinearsOf(c.adapter, {}), 1u | 1u << 8 | 1u << 16);  // q: any, rotation, sum
}

// Of ranks that `is_wanted` says, without vectors.
template <typename IsWanted>
std::unique_ptr<RandomAdapter> PairsAlone(int32_t in, const std::vector<int32_t>& outs, int32_t max_rank,
                                          std::mt19937& rng, const IsWanted& is_wanted) {
  while (true) {
    auto random = std::make_unique<RandomAdapter>(in, outs, kType, max_rank, rng);
    std::vector<ModuleDelta>& modules = random->adapter.modules;
    for (ModuleDelta& delta : modules) delta.out_scale = delta.bias = nullptr;
    if (std::all_of(modules.begin(), modules.end(), [&](const auto& m) { return is_wanted(m.low_rank.rank); })) {
      return random;
    }
  }
}

// A factor that linears share takes room for the widest of them, what scales its ranks a vector each.
TEST(AdapterImage, SharedRowsLieThereOnce) {
  for (const int64_t page_bytes : {8192, 1024}) {
    std::mt19937 rng(3);
    const int32_t in = 64;
    const std::vector<int32_t> outs = {96, 64, 48};
    const auto made = PairsAlone(in, outs, 40, rng, [](int32_t rank) { return rank > 0; });
    RandomAdapter& random = *made;
    random.Share(in, outs);
    std::vector<ModuleWidths> widths;
    for (const int32_t out : outs) widths.push_back({in, out});
    const absl::StatusOr<ImagePlan> plan = PlanImage(random.adapter, widths, {}, kType, page_bytes);
    ASSERT_TRUE(plan.ok()) << plan.status();
    const std::vector<std::byte> image = Image(*plan, page_bytes);
    for (size_t m = 0; m < outs.size(); ++m) {
      ExpectRanks(image, &plan->tiles[m * plan->tiles_per_module], random, m, in, outs[m]);
    }
  }
}

// The same rows in an image that other adapters use too: none of them in the adapter's own.
TEST(AdapterImage, RowsInCommonWithOthersLieInAnImageOfTheirOwn) {
  for (const int64_t page_bytes : {8192, 4096}) {
    std::mt19937 rng(3);
    const int32_t in = 64;
    const std::vector<int32_t> outs = {96, 64};
    const auto made = PairsAlone(in, outs, 20, rng, [](int32_t rank) { return rank == 20; });
    RandomAdapter& random = *made;
    random.Share(in, outs);
    const auto shared = std::make_shared<Adapter>();
    const LowRank& pair = random.adapter.modules[0].low_rank;
    shared->shared_rows = {{pair.a, pair.dtype, pair.rank, pair.a_stride},
                           {pair.b, pair.dtype, pair.rank, pair.b_stride}};
    random.adapter.shared = shared;
    std::vector<ModuleWidths> widths;
    for (const int32_t out : outs) widths.push_back({in, out});
    const auto plan = PlanImage(random.adapter, widths, {}, kType, page_bytes);
    const auto in_common = PlanImage(*shared, widths, {}, kType, page_bytes);
    ASSERT_TRUE(plan.ok() && in_common.ok()) << plan.status() << in_common.status();
    EXPECT_EQ(plan->bytes, 0);
    EXPECT_GT(in_common->bytes, 0);
    const std::vector<std::byte> image = Image(*in_common, page_bytes);
    std::vector<RankTile> tiles = plan->tiles;
    for (RankTile& tile : tiles) {
      for (const void** place : {&tile.a[0], &tile.a[1], &tile.b[0], &tile.b[1]}) {
        const auto tagged = reinterpret_cast<uintptr_t>(*place);
        if (tagged == 0) continue;
        ASSERT_TRUE(tagged & kInShared);
        *place = reinterpret_cast<const void*>(tagged & ~kInShared);
      }
    }
    for (size_t m = 0; m < outs.size(); ++m) {
      ExpectRanks(image, &tiles[m * plan->tiles_per_module], random, m, in, outs[m]);
    }
  }
}

// What has no room for a tile in a page each adapter keeps itself.
TEST(AdapterImage, RowsTooWideForATileAreNotInCommon) {
  std::mt19937 rng(3);
  const auto made = PairsAlone(64, {96, 64}, 20, rng, [](int32_t rank) { return rank > 0; });
  made->Share(64, {96, 64});
  const auto shared = std::make_shared<Adapter>();
  const LowRank& pair = made->adapter.modules[0].low_rank;
  shared->shared_rows = {{pair.a, pair.dtype, pair.rank, pair.a_stride},
                         {pair.b, pair.dtype, pair.rank, pair.b_stride}};
  made->adapter.shared = shared;
  const std::vector<ModuleWidths> widths = {{64, 96}, {64, 64}};
  const auto in_common = PlanImage(*shared, widths, {}, kType, 1024);
  const auto plan = PlanImage(made->adapter, widths, {}, kType, 1024);
  ASSERT_TRUE(plan.ok() && in_common.ok()) << plan.status() << in_common.status();
  EXPECT_EQ(in_common->bytes, 0);
  const std::vector<std::byte> image = Image(*plan, 1024);
  for (size_t m = 0; m < 2; ++m) {
    ExpectRanks(image, &plan->tiles[m * plan->tiles_per_module], *made, m, 64, widths[m].out);
  }
}

TEST(AdapterImage, ThePairOfVeraIsThereOnceWithItsScalesBeside) {
  std::mt19937 rng(5);
  const int32_t in = 64, rank = 32;
  const std::vector<int32_t> outs = {96, 64, 48};
  RandomAdapter random(in, outs, kType, 1, rng);
  std::vector<ModuleWidths> widths;
  std::vector<std::byte> a(rank * in * 2), b(rank * outs[0] * 2);
  const std::vector<float> rank_scale = RandomFloats(rank, rng), delta_scale = RandomFloats(96, rng);
  for (size_t m = 0; m < outs.size(); ++m) {
    widths.push_back({in, outs[m]});
    random.adapter.modules[m] = {};
    random.adapter.modules[m].low_rank = {.rank = rank, .dtype = kType, .a = a.data(), .b = b.data(),
                                          .a_stride = in, .b_stride = outs[0], .shares_a = true,
                                          .shares_b = true, .rank_scale = rank_scale.data(),
                                          .delta_scale = delta_scale.data()};
  }
  const absl::StatusOr<ImagePlan> plan = PlanImage(random.adapter, widths, {}, kType, 1 << 16);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->bytes, 2 * rank * (in + outs[0]) + 4 * (3 * rank + 96 + 64 + 48));
  EXPECT_EQ(PartsOf(random.adapter, {}), Bit(Part::kScaledPairs));
  const std::vector<std::byte> image = Image(*plan, 1 << 16);
  const ModuleParts& module = plan->parts.modules[2];
  EXPECT_EQ(0, std::memcmp(&image[OffsetOf(module.rank_scale.first)], rank_scale.data(), rank * 4));
  EXPECT_EQ(0, std::memcmp(&image[OffsetOf(module.delta_scale.first)], delta_scale.data(), 48 * 4));
}

// Of rows that are zero but for a block the block is kept, in tiles as small as the blocks need.
TEST(AdapterImage, BlocksAreKeptWithoutTheirZeros) {
  for (const int32_t rank : {64, 32, 16, 8, 6, 1}) {
    std::mt19937 rng(rank);
    const int32_t in = 96, out = 160;
    const auto made = PairsAlone(in, {out}, rank, rng, [rank](int32_t r) { return r == rank; });
    RandomAdapter& random = *made;
    random.MakeBlocks(in, {out});
    const absl::StatusOr<ImagePlan> plan = PlanImage(random.adapter, {{in, out}}, {}, kType, 8192);
    ASSERT_TRUE(plan.ok()) << plan.status();
    ExpectRanks(Image(*plan, 8192), plan->tiles.data(), random, 0, in, out);
    const int64_t whole = 2 * rank * (in + out);
    EXPECT_EQ(plan->bytes, rank >= 8 || rank == 1 ? whole / 2 : whole) << rank;
  }
}

struct Llama {
  int32_t kv_heads, kv, ffn;
};

// Of S-LoRA's mixes, rank 8 alone included, on all seven linears of 7B's and 8B's shapes.
TEST(AdapterImage, LessThanATwentiethOfItsPagesIsEmpty) {
  constexpr int32_t kLayers = 32, kHidden = 4096, kHeadDim = 128;
  for (const Llama& llama : {Llama{32, 4096, 11008}, Llama{8, 1024, 14336}}) {
    std::vector<ModuleWidths> widths;
    for (int layer = 0; layer < kLayers; ++layer) {
      for (const int32_t out : {kHidden, llama.kv, llama.kv, kHidden, llama.ffn, llama.ffn}) {
        widths.push_back({kHidden, out});
      }
      widths.push_back({llama.ffn, kHidden});
    }
    const int64_t page_bytes =
        KvLayout::Make(kLayers, llama.kv_heads, kHeadDim, kType).page_bytes();
    for (const int32_t rank : {8, 16, 32, 64}) {
      Adapter adapter;
      int64_t bytes = 0;
      const std::vector<std::byte> nothing(1);
      for (const ModuleWidths& module : widths) {
        LowRank& pair = adapter.modules.emplace_back().low_rank;
        pair = {.rank = rank, .a_stride = module.in, .b_stride = module.out};
        pair.a = pair.b = nothing.data();
        bytes += ByteSize(kType, rank * (module.in + module.out));
      }
      const absl::StatusOr<ImagePlan> plan = PlanImage(adapter, widths, {}, kType, page_bytes);
      ASSERT_TRUE(plan.ok()) << plan.status();
      EXPECT_LT(static_cast<double>(plan->size.bytes(page_bytes)), 1.05 * static_cast<double>(bytes))
          << "rank " << rank << " of " << llama.ffn;
    }
  }
}

// Vectors of 4096 floats in a page of 64 KiB, four to each.
TEST(AdapterImage, WhatASmallImageLeavesOverTakesSlots) {
  constexpr int32_t kWidth = 4096, kPageBytes = 1 << 16;
  const std::vector<float> vector(kWidth);
  const auto size_of = [&](int32_t vectors, int64_t page_bytes) {
    Adapter adapter;
    adapter.modules.resize(vectors);
    for (ModuleDelta& delta : adapter.modules) delta.bias = vector.data();
    const std::vector<ModuleWidths> widths(ModuleCount(10), {kWidth, kWidth});
    return PlanImage(adapter, widths, {}, kType, page_bytes)->size;
  };
  EXPECT_EQ(size_of(1, kPageBytes), (ImageSize{0, 4}));
  EXPECT_EQ(size_of(6, kPageBytes), (ImageSize{1, 8}));
  EXPECT_EQ(size_of(8, kPageBytes), (ImageSize{2, 0}));
  EXPECT_EQ(size_of(65, kPageBytes), (ImageSize{17, 0})) << "a whole page is no more than a sixteenth";
  EXPECT_EQ(size_of(1, 17 * 1024), (ImageSize{1, 0})) << "nearly a page";
  EXPECT_EQ(size_of(1, kPageBytes + 16), (ImageSize{1, 0})) << "slots would not be aligned";
  EXPECT_EQ(size_of(0, kPageBytes), (ImageSize{0, 1}));
}

TEST(AdapterImage, ARankRowWiderThanAPageIsRefusedByName) {
  std::mt19937 rng(1);
  const RandomAdapter random(64, {600}, kType, 8, rng);
  const absl::Status status = PlanImage(random.adapter, {{64, 600}}, {}, kType, 1024).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("64 to 600"), std::string::npos) << status;
}

}  // namespace
}  // namespace lorikeet::cuda
