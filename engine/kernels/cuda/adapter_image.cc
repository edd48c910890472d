#include "engine/kernels/cuda/adapter_image.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <tuple>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/kernels/cuda/narrow.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet::cuda {
namespace {

constexpr int64_t kAlign = 16;
constexpr int64_t kSlotAlign = 256;
constexpr int32_t kMostSlots = ImageSize::kSlots * 7 / 8;  // of a page that is shared

int32_t DivideUp(int32_t a, int32_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Rows on the host.
struct HostRows {
  const void* data = nullptr;  // nullptr: none
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int32_t width = 0;
  int64_t stride = 0;  // elements from row to row; 0: width
  int64_t step = 1;    // elements from one of a row to the next
};

class Planner {
 public:
  Planner(DType dtype, int64_t page_bytes, ImagePlan* plan)
      : dtype_(dtype), page_bytes_(page_bytes), plan_(plan) {}

  // Room for rows of a factor, in at most two places; returns how many lie in the first.
  int32_t PlaceRanks(const HostRows& from, const void* (&places)[2]) {
    const int64_t pitch = ByteSize(dtype_, RowPitch(from.width));
    LK_CHECK(from.rows * pitch <= page_bytes_);
    const int64_t room = (page_bytes_ - at_ % page_bytes_) / pitch;
    const int32_t here = static_cast<int32_t>(std::min<int64_t>(from.rows, room));
    if (here > 0) places[0] = PlaceTogether(from, 0, here, dtype_, pitch);
    if (here < from.rows) places[1] = PlaceTogether(from, here, from.rows - here, dtype_, pitch);
    return here;
  }

  const float* PlaceVector(const float* values, int32_t width) {
    return static_cast<const float*>(Vector(values, width).first);
  }

  // Rows in the activation type.
  PagedRows Matrix(const HostRows& from) { return Place(from, dtype_); }
  // One row of elements of four bytes, which stay as they are.
  PagedRows Vector(const void* values, int32_t width) {
    return Place({values, DType::kF32, 1, width}, DType::kF32);
  }
  // Rows of one element of four bytes.
  PagedRows List(const void* values, int64_t count) {
    return Place({values, DType::kF32, count, 1}, DType::kF32);
  }
  ReplacedParts Replaced(const ReplacedRows& rows, int32_t width) {
    const DenseRows& dense = rows.rows;
    return {Matrix({dense.data, dense.dtype, dense.rows, width}), List(rows.index, dense.rows)};
  }

  // What is at most a sixteenth of the whole, or is nearly a page, has the last page alone, and so do pages that slots
  // would not be aligned in. An image of nothing has a place as well.
  ImageSize Size() const {
    const int64_t slot_bytes = page_bytes_ / ImageSize::kSlots;
    const auto pages = static_cast<int32_t>(at_ / page_bytes_);
    const auto slots = static_cast<int32_t>((at_ % page_bytes_ + slot_bytes - 1) / slot_bytes);
    if (slots == 0 && pages > 0) return {pages, 0};
    const bool shares = page_bytes_ % (ImageSize::kSlots * kSlotAlign) == 0 && pages < ImageSize::kSlots &&
                        slots <= kMostSlots;
    return shares ? ImageSize{pages, std::max(1, slots)} : ImageSize{pages + 1, 0};
  }
  // The first row that was larger than a page.
  const absl::Status& status() const { return status_; }

 private:
  static const void* Offset(int64_t at) { return reinterpret_cast<const void*>(at + 1); }
  void ToNextPage() { at_ = (at_ + page_bytes_ - 1) / page_bytes_ * page_bytes_; }

  // `count` rows from row `first` at the next place that takes a row.
  const void* PlaceTogether(const HostRows& from, int64_t first, int64_t count, DType to_dtype,
                            int64_t pitch) {
    if (at_ % page_bytes_ + pitch > page_bytes_) ToNextPage();
    const int64_t stride = from.stride > 0 ? from.stride : from.width;
    const auto* data = static_cast<const std::byte*>(from.data);
    plan_->pieces.push_back({data + ByteSize(from.dtype, first * stride), from.dtype, stride,
                             from.step, static_cast<int32_t>(count), from.width, to_dtype, pitch,
                             at_});
    const void* place = Offset(at_);
    at_ += count * pitch;
    plan_->bytes += count * pitch;
    return place;
  }

  PagedRows Place(const HostRows& from, DType to_dtype) {
    PagedRows out;
    if (from.data == nullptr || from.rows == 0) return out;
    const int64_t pitch = ByteSize(to_dtype, from.width);
    if (pitch > page_bytes_) {
      status_.Update(absl::InvalidArgumentError(
          absl::StrCat("a row of ", pitch, " bytes of an adapter needs pages of as many; this model's ",
                       "have ", page_bytes_)));
      return out;
    }
    const int64_t page_rows = page_bytes_ / pitch;
    int64_t room = (page_bytes_ - at_ % page_bytes_) / pitch;
    if (room == 0) room = page_rows;
    out.pitch = static_cast<uint32_t>(pitch);
    out.page_rows = static_cast<uint32_t>(page_rows);
    out.rows = static_cast<int32_t>(from.rows);
    out.first_rows = static_cast<uint32_t>(std::min(room, from.rows));
    out.first = PlaceTogether(from, 0, out.first_rows, to_dtype, pitch);
    for (int64_t row = out.first_rows; row < from.rows; row += page_rows) {
      ToNextPage();
      if (out.pages == nullptr) {
        out.pages = static_cast<const void* const*>(Offset(at_ / page_bytes_));
      }
      PlaceTogether(from, row, std::min(page_rows, from.rows - row), to_dtype, pitch);
    }
    at_ = RoundUp(at_);
    return out;
  }

  const DType dtype_;
  const int64_t page_bytes_;
  ImagePlan* const plan_;
  int64_t at_ = 0;
  absl::Status status_;
};

// Columns of rank rows, in units of eight.
struct Columns {
  int32_t begin = 0, end = 0;

  int32_t width() const { return end - begin; }
};
constexpr int32_t kUnit = 8;

// One factor of a module: its rows on the host and the columns that the module uses.
struct Factor {
  const std::byte* rows = nullptr;
  int64_t stride = 0;
  int32_t width = 0;
  bool shared = false;
};

Factor FactorA(const LowRank& pair, ModuleWidths widths) {
  return {pair.a, pair.a_stride, widths.in, pair.shares_a};
}
Factor FactorB(const LowRank& pair, ModuleWidths widths) {
  return {pair.b, pair.b_stride, widths.out, pair.shares_b};
}

// Where the rows have values.
Columns NonZero(const Factor& factor, DType dtype, int32_t first, int32_t rows) {
  const int64_t bytes = ByteSize(dtype, 1);
  Columns columns{DivideUp(factor.width, kUnit), 0};
  for (int32_t k = first; k < first + rows; ++k) {
    const std::byte* row = factor.rows + ByteSize(dtype, k * factor.stride);
    const std::byte* end = row + factor.width * bytes;
    const auto is_set = [](std::byte b) { return b != std::byte{0}; };
    const auto from = std::find_if(row, end, is_set);
    if (from == end) continue;
    const auto to = std::find_if(std::make_reverse_iterator(end), std::make_reverse_iterator(row), is_set).base();
    columns.begin = std::min(columns.begin, static_cast<int32_t>((from - row) / bytes / kUnit));
    columns.end = std::max(columns.end, DivideUp(static_cast<int32_t>((to - row - 1) / bytes) + 1, kUnit));
  }
  if (columns.begin < columns.end) return columns;
  return {0, 1};  // rows of zeros
}

// A tile's rows of one factor, as they are kept.
struct RowTile {
  const void* places[2] = {};
  int32_t first = 0;  // rows in the first place
  int32_t ranks = 0;
  Columns columns;
};

// By rows on the host, the rank a tile begins with, and its ranks.
using RowTiles = std::map<std::tuple<const std::byte*, int32_t, int32_t>, RowTile>;

// Rows that adapters have in common, whole: each adapter's linears use as much of them as they are wide. What
// is so wide that a page has no room for a tile is left to the adapters.
RowTiles PlanShared(const std::vector<SharedRows>& all, DType dtype, int64_t page_bytes, Planner* planner) {
  RowTiles tiles;
  for (const SharedRows& rows : all) {
    const auto width = static_cast<int32_t>(rows.stride);
    if (kTileRanks * ByteSize(dtype, RowPitch(width)) > page_bytes || width > UINT16_MAX * kUnit) continue;
    for (int32_t first = 0; first < rows.rows; first += kTileRanks) {
      RowTile tile{.ranks = std::min(kTileRanks, rows.rows - first), .columns = {0, DivideUp(width, kUnit)}};
      const std::byte* from = rows.data + ByteSize(rows.dtype, first * rows.stride);
      tile.first = planner->PlaceRanks({from, rows.dtype, tile.ranks, width, rows.stride}, tile.places);
      tiles[{rows.data, first, tile.ranks}] = tile;
    }
  }
  return tiles;
}

// The same as the adapter that has these rows in common with others sees them.
RowTiles TilesInShared(const Adapter& adapter, DType dtype, int64_t page_bytes) {
  if (adapter.shared == nullptr) return {};
  ImagePlan plan;
  Planner planner(dtype, page_bytes, &plan);
  RowTiles tiles = PlanShared(adapter.shared->shared_rows, dtype, page_bytes, &planner);
  for (auto& [key, tile] : tiles) {
    for (const void*& place : tile.places) {
      if (place != nullptr) place = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(place) | kInShared);
    }
  }
  return tiles;
}

// Linears with pairs: the model's, and behind them those of a mixture's LoRAs.
struct PairedModules {
  std::vector<ModuleDelta> deltas;
  std::vector<ModuleWidths> widths;
};

PairedModules PairedModulesOf(const Adapter& adapter, const std::vector<ModuleWidths>& widths, int32_t layers) {
  PairedModules all{adapter.modules, widths};
  if (adapter.mlp_mixture.experts.empty()) return all;
  all.deltas.resize(ModuleCount(layers));
  all.widths.resize(ModuleCount(layers));
  for (const auto& lora : adapter.mlp_mixture.experts) {
    for (int32_t layer = 0; layer < layers; ++layer) {
      for (const Linear linear : {Linear::kGate, Linear::kUp, Linear::kDown}) {
        const ModuleId module = LayerModule(layer, linear);
        all.deltas.push_back(lora->module(module));
        all.widths.push_back(widths[module]);
      }
    }
  }
  return all;
}

// Lays out the rank rows of an adapter's linears.
class TilePlanner {
 public:
  TilePlanner(const Adapter& adapter, const PairedModules& modules, DType dtype, int64_t page_bytes,
              Planner* planner)
      : deltas_(modules.deltas),
        widths_(modules.widths),
        dtype_(dtype),
        page_bytes_(page_bytes),
        planner_(planner),
        shared_(TilesInShared(adapter, dtype, page_bytes)) {}

  absl::Status Plan(ImagePlan* plan) {
    const size_t modules = deltas_.size();
    for (size_t m = 0; m < modules; ++m) NoteShared(deltas_[m].low_rank, widths_[m]);
    std::vector<int32_t> tile_ranks(modules, kTileRanks);
    plan->tiles_per_module = 1;
    for (size_t m = 0; m < modules; ++m) {
      const LowRank& pair = deltas_[m].low_rank;
      if (pair.rank == 0) continue;
      LK_ASSIGN_OR_RETURN(tile_ranks[m], TileRanks(pair, widths_[m]));
      plan->tiles_per_module = std::max(plan->tiles_per_module, DivideUp(pair.rank, tile_ranks[m]));
    }
    // Kernels look up every linear of the model, whether the adapter goes so far or not.
    plan->tiles.resize(std::max(modules, widths_.size()) * plan->tiles_per_module);
    for (size_t m = 0; m < modules; ++m) {
      if (deltas_[m].empty()) continue;
      PlanModule(deltas_[m], widths_[m], tile_ranks[m], &plan->tiles[m * plan->tiles_per_module]);
    }
    return absl::OkStatus();
  }

 private:
  // A head's rows are so long that a page has room for few: its tiles would be everybody's, so it has its own.
  bool Shares(const Factor& factor) const {
    return factor.shared && kTileRanks * ByteSize(dtype_, RowPitch(factor.width)) <= page_bytes_;
  }

  // The widest of the linears that share a factor says how much of its rows is kept.
  void NoteShared(const LowRank& pair, ModuleWidths widths) {
    for (const Factor& factor : {FactorA(pair, widths), FactorB(pair, widths)}) {
      if (pair.rank == 0 || !Shares(factor)) continue;
      int32_t& widest = widest_[factor.rows];
      widest = std::max(widest, factor.width);
    }
  }

  int32_t WidthOf(const Factor& factor) const {
    return Shares(factor) ? widest_.at(factor.rows) : factor.width;
  }

  // Ranks of a module's tile: sixteen, fewer where a page has no room for so many or where the blocks of
  // a pair are smaller, so that much less is kept.
  absl::StatusOr<int32_t> TileRanks(const LowRank& pair, ModuleWidths widths) const {
    const int32_t widest = std::max(WidthOf(FactorA(pair, widths)), WidthOf(FactorB(pair, widths)));
    const int64_t row = ByteSize(dtype_, RowPitch(widest));
    if (row > page_bytes_ || widest > UINT16_MAX * kUnit) {
      return absl::InvalidArgumentError(
          absl::StrCat("low-rank adapters of a linear of ", widths.in, " to ", widths.out,
                       " need pages of ", row, " bytes; this model's have ", page_bytes_));
    }
    const int32_t most = static_cast<int32_t>(std::min<int64_t>(kTileRanks, page_bytes_ / row));
    int32_t best = most;
    if (!pair.blocks) return best;
    for (int32_t ranks = most / 2; ranks >= kFewestRanks && pair.rank <= kMostTiles * ranks; ranks /= 2) {
      if (4 * UnitsKept(pair, widths, ranks) < 3 * UnitsKept(pair, widths, best)) best = ranks;
    }
    return best;
  }

  int64_t UnitsKept(const LowRank& pair, ModuleWidths widths, int32_t tile_ranks) const {
    int64_t units = 0;
    for (int32_t first = 0; first < pair.rank; first += tile_ranks) {
      const int32_t ranks = std::min(tile_ranks, pair.rank - first);
      for (const Factor& factor : {FactorA(pair, widths), FactorB(pair, widths)}) {
        units += int64_t{ranks} * NonZero(factor, pair.dtype, first, ranks).width();
      }
    }
    return units;
  }

  void PlanModule(const ModuleDelta& delta, ModuleWidths widths, int32_t tile_ranks, RankTile* tiles) {
    const LowRank& pair = delta.low_rank;
    LK_CHECK(!pair.rank_mix);  // folded for a device
    tiles[0].module_tiles = static_cast<int16_t>(DivideUp(pair.rank, tile_ranks));
    for (int32_t i = 0; i < tiles[0].module_tiles; ++i) {
      RankTile& tile = tiles[i];
      const int32_t first = i * tile_ranks, ranks = std::min(tile_ranks, pair.rank - first);
      tile.ranks = static_cast<uint16_t>(ranks);
      tile.scale = pair.scale;
      const RowTile a = PlaceTile(pair, FactorA(pair, widths), first, ranks);
      std::copy_n(a.places, 2, tile.a);
      tile.a_first = static_cast<uint16_t>(a.first);
      tile.a_begin = static_cast<uint16_t>(a.columns.begin);
      tile.a_pitch = static_cast<uint16_t>(a.columns.width());
      const RowTile b = PlaceTile(pair, FactorB(pair, widths), first, ranks);
      std::copy_n(b.places, 2, tile.b);
      tile.b_first = static_cast<uint16_t>(b.first);
      tile.b_begin = static_cast<uint16_t>(b.columns.begin);
      tile.b_pitch = static_cast<uint16_t>(b.columns.width());
    }
    tiles[0].out_scale = planner_->PlaceVector(delta.out_scale, widths.out);
    tiles[0].bias = planner_->PlaceVector(delta.bias, widths.out);
  }

  RowTile PlaceTile(const LowRank& pair, const Factor& factor, int32_t first, int32_t ranks) {
    const auto place = [&](Columns columns, int32_t width) {
      RowTile tile{.ranks = ranks, .columns = columns};
      const std::byte* rows = factor.rows + ByteSize(pair.dtype, first * factor.stride + columns.begin * kUnit);
      tile.first = planner_->PlaceRanks({rows, pair.dtype, ranks, width, factor.stride}, tile.places);
      return tile;
    };
    if (Shares(factor)) {
      const auto [it, is_new] = shared_.try_emplace({factor.rows, first, ranks});
      const int32_t width = WidthOf(factor);
      if (is_new) it->second = place({0, DivideUp(width, kUnit)}, width);
      return it->second;
    }
    Columns columns{0, DivideUp(factor.width, kUnit)};
    if (pair.blocks) columns = NonZero(factor, pair.dtype, first, ranks);
    return place(columns, std::min(columns.width() * kUnit, factor.width - columns.begin * kUnit));
  }

  static constexpr int32_t kFewestRanks = 4;
  static constexpr int32_t kMostTiles = 32;  // kernels work and keep sums by tiles, however few ranks these have

  const std::vector<ModuleDelta>& deltas_;
  const std::vector<ModuleWidths>& widths_;
  const DType dtype_;
  const int64_t page_bytes_;
  Planner* const planner_;
  std::map<const std::byte*, int32_t> widest_;  // of linears that share a factor, by its rows
  RowTiles shared_;  // what linears share: of Adapter::shared, and what this one has placed itself
};

ModuleParts PlanModule(const Adapter& adapter, ModuleId module, ModuleWidths widths, Planner* planner) {
  const ModuleDelta& delta = adapter.modules[module];
  const auto [in, out] = widths;
  ModuleParts parts;
  if (const int32_t block = delta.input_rotation.block; block > 0) {
    parts.rotation_block = block;
    parts.rotation = planner->Matrix({delta.input_rotation.r, DType::kF32, in, block});
  }
  parts.output_half = delta.output_rotation.half;
  parts.output_scale = planner->Vector(delta.output_rotation.scale, out);
  parts.output_cross = planner->Vector(delta.output_rotation.cross, out);
  const KroneckerDelta& k = delta.kronecker;
  parts.in1 = k.in1, parts.in2 = k.in2, parts.out1 = k.out1, parts.out2 = k.out2;
  parts.w1 = planner->Matrix({k.w1, DType::kF32, k.out1, k.in1});
  parts.w2 = planner->Matrix({k.w2, DType::kF32, k.out2, k.in2});
  if (const int32_t block = delta.circulant.block; block > 0) {
    parts.circulant_block = block;
    const int64_t blocks = int64_t{out / block} * (in / block);
    parts.circulant = planner->Matrix({delta.circulant.kernel, DType::kF32, blocks, block});
  }
  if (const SparseDelta& sparse = delta.sparse; sparse.row_begin != nullptr) {
    parts.row_begin = planner->List(sparse.row_begin, int64_t{out} + 1);
    parts.column = planner->List(sparse.column, sparse.row_begin[out]);
    parts.value = planner->List(sparse.value, sparse.row_begin[out]);
  }
  parts.dense = planner->Matrix({delta.dense.data, delta.dense.dtype, delta.dense.rows, in});
  parts.rank_scale = planner->Vector(delta.low_rank.rank_scale, delta.low_rank.rank);
  parts.delta_scale = planner->Vector(delta.low_rank.delta_scale, out);
  parts.rank_gate = planner->Vector(delta.rank_gate, delta.low_rank.rank);
  if (const Gating& gating = adapter.gating; gating.experts > 0) parts.first_gate = gating.set_of[module] * gating.experts;
  parts.prototypes = planner->Matrix({delta.prototypes, DType::kF32, adapter.prototype_gates.experts, in});
  parts.replaced = planner->Replaced(delta.rows, in);
  return parts;
}

EmbeddingParts PlanEmbedding(const EmbeddingDelta& delta, int32_t vocab, int32_t width,
                             Planner* planner) {
  EmbeddingParts parts;
  const LowRank& pair = delta.low_rank;
  parts.rank = pair.rank;
  parts.scale = pair.scale;
  if (pair.rank > 0) {
    parts.a = planner->Matrix({pair.a, pair.dtype, vocab, pair.rank, 1, pair.a_stride});
    parts.b = planner->Matrix({pair.b, pair.dtype, pair.rank, width, pair.b_stride});
  }
  parts.out_scale = planner->Vector(delta.out_scale, width);
  parts.replaced = planner->Replaced(delta.rows, width);
  return parts;
}

BottleneckParts PlanBottleneck(const Bottleneck& b, int32_t width, Planner* planner) {
  return {b.width,
          b.input,
          b.activation,
          b.scale,
          planner->Matrix({b.down, DType::kF32, b.width, width}),
          planner->Matrix({b.up, DType::kF32, width, b.width}),
          planner->Vector(b.down_bias, b.width),
          planner->Vector(b.up_bias, width)};
}

void PlanParts(const Adapter& adapter, const std::vector<ModuleWidths>& widths, int32_t layers,
               Planner* planner, PartTables* tables) {
  const size_t modules = adapter.modules.size();
  const int32_t width = widths[LayerModule(0, Linear::kQ)].in;
  const auto structured = [](const ModuleDelta& delta) { return delta.structured() || IsScaled(delta); };
  if (std::any_of(adapter.modules.begin(), adapter.modules.end(), structured)) {
    for (size_t m = 0; m < modules; ++m) {
      tables->modules.push_back(structured(adapter.modules[m])
                                    ? PlanModule(adapter, static_cast<ModuleId>(m), widths[m], planner)
                                    : ModuleParts());
    }
    tables->modules.resize(std::max(modules, widths.size()));
  }
  if (!adapter.embedding.empty()) {
    const int32_t vocab = adapter.vocab > 0 ? adapter.vocab : widths[HeadModule(layers)].out;
    tables->adapter.embedding = PlanEmbedding(adapter.embedding, vocab, width, planner);
  }
  for (const float* norm : adapter.norms) tables->norms.push_back(planner->Vector(norm, width));
  if (const VirtualTokens& tokens = adapter.virtual_tokens; tokens.count > 0) {
    VirtualTokenParts& parts = tables->adapter.virtual_tokens;
    parts.count = tokens.count;
    parts.rows = planner->Matrix({tokens.rows, DType::kF32, tokens.count, width});
    const int32_t kv_width = widths[LayerModule(0, Linear::kK)].out;
    const int64_t kv_rows = int64_t{layers} * 2 * tokens.count;
    parts.kv = planner->Matrix({tokens.kv, DType::kF32, kv_rows, kv_width});
  }
  for (const PromptAttention& prompt : adapter.prompt_attention) {
    const int32_t kv_width = widths[LayerModule(0, Linear::kK)].out;
    tables->prompt_attention.push_back(
        {prompt.count, prompt.gate, planner->Matrix({prompt.k, DType::kF32, prompt.count, kv_width}),
         planner->Matrix({prompt.v, DType::kF32, prompt.count, kv_width})});
  }
  for (const Bottleneck& bottleneck : adapter.bottlenecks) {
    tables->bottlenecks.push_back(PlanBottleneck(bottleneck, width, planner));
  }
  tables->adapter.prototype_gates = adapter.prototype_gates;
  const MlpMixture& mixture = adapter.mlp_mixture;
  const auto loras = static_cast<int32_t>(mixture.experts.size());
  tables->adapter.mixture = {loras, mixture.chosen};
  for (const std::vector<float>& router : mixture.routers) {
    tables->routers.push_back(planner->Matrix({router.data(), DType::kF32, loras, width}));
  }
}

// What the kernels of parts do not take.
absl::Status CheckParts(const Adapter& adapter, const std::vector<ModuleWidths>& widths) {
  for (const ModuleDelta& delta : adapter.modules) {
    if (delta.kronecker.in1 > kMaxKroneckerRows) {
      return absl::InvalidArgumentError(absl::StrCat("a Kronecker factor of ", delta.kronecker.in1,
                                                     " columns; at most ", kMaxKroneckerRows));
    }
    if (delta.circulant.block > kMaxCirculantBlock) {
      return absl::InvalidArgumentError(absl::StrCat("circulant blocks of ", delta.circulant.block,
                                                     "; at most ", kMaxCirculantBlock));
    }
  }
  for (const Bottleneck& bottleneck : adapter.bottlenecks) {
    const int32_t width = widths[LayerModule(0, Linear::kQ)].in;
    if (bottleneck.width <= width) continue;
    return absl::InvalidArgumentError(absl::StrCat("a bottleneck of ", bottleneck.width,
                                                   ", wider than the model's ", width));
  }
  return absl::OkStatus();
}

absl::Status CheckExperts(const Adapter& adapter, const ExpertModules& experts) {
  if (experts.layers > 0 && !adapter.mlp_mixture.experts.empty()) {
    return absl::InvalidArgumentError(
        "the adapter deals tokens out among LoRAs of MLPs, and this model has experts in their place; set device to cpu");
  }
  const auto modules = static_cast<int32_t>(adapter.modules.size());
  for (ModuleId m = 0; m < modules; ++m) {
    const ModuleDelta& delta = adapter.modules[m];
    if (!experts.contains(m) || !(delta.structured() || IsScaled(delta))) continue;
    return absl::InvalidArgumentError(
        "the adapter changes experts by more than low-rank pairs, output scales and biases, which "
        "only the CPU computes; set device to cpu");
  }
  return absl::OkStatus();
}

}  // namespace

void WritePiece(const ImagePlan::Piece& piece, std::byte* to) {
  const auto from = [&piece](int64_t row, int64_t i) {
    return piece.from + ByteSize(piece.dtype, row * piece.from_stride + i * piece.from_step);
  };
  if (piece.dtype == piece.to_dtype && piece.from_step == 1) {
    const int64_t bytes = ByteSize(piece.dtype, piece.width);
    if (piece.to_pitch == bytes && piece.from_stride == piece.width) {
      std::memcpy(to, piece.from, piece.rows * bytes);
      return;
    }
    for (int32_t r = 0; r < piece.rows; ++r) std::memcpy(to + r * piece.to_pitch, from(r, 0), bytes);
    return;
  }
  std::vector<float> row(piece.width);
  for (int32_t r = 0; r < piece.rows; ++r) {
    if (piece.from_step == 1) {
      Dequantize(piece.dtype, from(r, 0), piece.width, row.data());
    } else {
      for (int32_t i = 0; i < piece.width; ++i) Dequantize(piece.dtype, from(r, i), 1, &row[i]);
    }
    Narrow(row.data(), piece.width, piece.to_dtype, to + r * piece.to_pitch);
  }
}

void ForEachRows(PartTables* tables, const std::function<void(PagedRows*)>& fn) {
  const auto all = [&fn](auto&... rows) { (fn(&rows), ...); };
  EmbeddingParts& e = tables->adapter.embedding;
  VirtualTokenParts& t = tables->adapter.virtual_tokens;
  all(e.a, e.b, e.out_scale, e.replaced.rows, e.replaced.index, t.rows, t.kv);
  for (ModuleParts& m : tables->modules) {
    all(m.rotation, m.output_scale, m.output_cross, m.w1, m.w2, m.circulant, m.row_begin, m.column,
        m.value, m.dense, m.replaced.rows, m.replaced.index, m.rank_scale, m.delta_scale, m.rank_gate,
        m.prototypes);
  }
  for (PagedRows& norm : tables->norms) all(norm);
  for (PromptAttentionParts& p : tables->prompt_attention) all(p.k, p.v);
  for (PagedRows& router : tables->routers) all(router);
  for (BottleneckParts& b : tables->bottlenecks) all(b.down, b.up, b.down_bias, b.up_bias);
}

absl::StatusOr<ImagePlan> PlanImage(const Adapter& adapter, const std::vector<ModuleWidths>& widths,
                                    const ExpertModules& experts, DType dtype, int64_t page_bytes) {
  ImagePlan plan;
  Planner planner(dtype, page_bytes, &plan);
  if (!adapter.shared_rows.empty()) {
    PlanShared(adapter.shared_rows, dtype, page_bytes, &planner);
    plan.tiles.resize(1);  // a table, as every image has one
    plan.size = planner.Size();
    return plan;
  }
  LK_RETURN_IF_ERROR(CheckParts(adapter, widths));
  LK_RETURN_IF_ERROR(CheckExperts(adapter, experts));
  const int32_t layers = experts.layers_of(adapter.modules.size());
  const PairedModules modules = PairedModulesOf(adapter, widths, layers);
  LK_RETURN_IF_ERROR(TilePlanner(adapter, modules, dtype, page_bytes, &planner).Plan(&plan));
  PlanParts(adapter, widths, layers, &planner, &plan.parts);
  LK_RETURN_IF_ERROR(planner.status());
  plan.size = planner.Size();
  return plan;
}

}  // namespace lorikeet::cuda
