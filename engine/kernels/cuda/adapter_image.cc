#include "engine/kernels/cuda/adapter_image.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace lorikeet::cuda {
namespace {

constexpr int64_t kAlign = 16;

int32_t DivideUp(int32_t a, int32_t b) { return (a + b - 1) / b; }

class Planner {
 public:
  Planner(DType dtype, int64_t page_bytes, ImagePlan* plan)
      : element_bytes_(ByteSize(dtype, 1)), page_bytes_(page_bytes), plan_(plan) {}

  // Room for `rows` rows from rank row `first` of a factor, in at most two places; returns where
  // they begin and how many lie in the first.
  int32_t PlaceRows(const std::byte* factor, DType dtype, int64_t stride, int32_t first,
                    int32_t rows, int32_t width, const void* (&places)[2]) {
    const int64_t row_bytes = RowPitch(width) * element_bytes_;
    LK_CHECK(rows * row_bytes <= page_bytes_);
    const int64_t room = (page_bytes_ - at_ % page_bytes_) / row_bytes;
    const int32_t here = static_cast<int32_t>(std::min<int64_t>(rows, room));
    const auto add = [&](int32_t from, int32_t count, const void** place) {
      if (count == 0) return;
      if (at_ % page_bytes_ + row_bytes > page_bytes_) at_ = DivideUpPages() * page_bytes_;
      *place = Offset(at_);
      plan_->pieces.push_back({factor + ByteSize(dtype, (first + from) * stride), dtype, stride,
                               count, width, false, at_});
      at_ += count * row_bytes;
      plan_->bytes += count * row_bytes;
    };
    add(0, here, &places[0]);
    add(here, rows - here, &places[1]);
    return here;
  }

  const float* PlaceVector(const float* values, int32_t width) {
    if (values == nullptr) return nullptr;
    const int64_t bytes = (width * int64_t{sizeof(float)} + kAlign - 1) / kAlign * kAlign;
    if (at_ % page_bytes_ + bytes > page_bytes_) at_ = DivideUpPages() * page_bytes_;
    LK_CHECK(bytes <= page_bytes_);
    plan_->pieces.push_back({reinterpret_cast<const std::byte*>(values), DType::kF32, width, 1,
                             width, true, at_});
    const void* place = Offset(at_);
    at_ += bytes;
    plan_->bytes += bytes;
    return static_cast<const float*>(place);
  }

  int64_t DivideUpPages() const { return (at_ + page_bytes_ - 1) / page_bytes_; }

 private:
  static const void* Offset(int64_t at) { return reinterpret_cast<const void*>(at + 1); }

  const int64_t element_bytes_;
  const int64_t page_bytes_;
  ImagePlan* const plan_;
  int64_t at_ = 0;
};

// Ranks of a module's tile.
absl::StatusOr<int32_t> TileRanks(ModuleWidths widths, DType dtype, int64_t page_bytes) {
  const int64_t row = ByteSize(dtype, RowPitch(std::max(widths.in, widths.out)));
  const int64_t vector = int64_t{widths.out} * sizeof(float) + kAlign;
  if (std::max(row, vector) > page_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("adapters of a linear of ", widths.in, " to ",
                                                   widths.out, " need pages of ",
                                                   std::max(row, vector), " bytes; this model's have ",
                                                   page_bytes));
  }
  return static_cast<int32_t>(std::min<int64_t>(kTileRanks, page_bytes / row));
}

}  // namespace

absl::StatusOr<ImagePlan> PlanImage(const Adapter& adapter, const std::vector<ModuleWidths>& widths,
                                    DType dtype, int64_t page_bytes) {
  ImagePlan plan;
  std::vector<int32_t> tile_ranks(adapter.modules.size(), kTileRanks);
  plan.tiles_per_module = 1;
  for (size_t m = 0; m < adapter.modules.size(); ++m) {
    if (adapter.modules[m].empty()) continue;
    LK_ASSIGN_OR_RETURN(tile_ranks[m], TileRanks(widths[m], dtype, page_bytes));
    plan.tiles_per_module = std::max(
        plan.tiles_per_module, DivideUp(adapter.modules[m].low_rank.rank, tile_ranks[m]));
  }
  plan.tiles.resize(adapter.modules.size() * plan.tiles_per_module);
  Planner planner(dtype, page_bytes, &plan);
  for (size_t m = 0; m < adapter.modules.size(); ++m) {
    const ModuleDelta& delta = adapter.modules[m];
    if (delta.empty()) continue;
    const LowRank& pair = delta.low_rank;
    RankTile* tiles = &plan.tiles[m * plan.tiles_per_module];
    tiles[0].module_tiles = static_cast<int16_t>(DivideUp(pair.rank, tile_ranks[m]));
    for (int32_t i = 0; i < tiles[0].module_tiles; ++i) {
      const int32_t first = i * tile_ranks[m];
      tiles[i].ranks = static_cast<int16_t>(std::min(tile_ranks[m], pair.rank - first));
      tiles[i].scale = pair.scale;
      tiles[i].a_first = static_cast<int16_t>(planner.PlaceRows(
          pair.a, pair.dtype, pair.a_stride, first, tiles[i].ranks, widths[m].in, tiles[i].a));
      tiles[i].b_first = static_cast<int16_t>(planner.PlaceRows(
          pair.b, pair.dtype, pair.b_stride, first, tiles[i].ranks, widths[m].out, tiles[i].b));
    }
    tiles[0].out_scale = planner.PlaceVector(delta.out_scale, widths[m].out);
    tiles[0].bias = planner.PlaceVector(delta.bias, widths[m].out);
  }
  plan.pages = planner.DivideUpPages();
  return plan;
}

}  // namespace lorikeet::cuda
