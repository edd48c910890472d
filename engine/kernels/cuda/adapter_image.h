// An adapter on the device as kernels read it.
//
// The image is cut into pages that lie anywhere. Its unit is a rank row: row k of A or column k of B,
// `width` elements of the backend's activation type, never across a page. Up to sixteen consecutive
// ranks of a module, what a tensor-core product takes at a time, are a RankTile: a tile's rows of A
// are no more than a page holds and so lie in at most two places, and so do those of B. Of rows that are
// zero but for a part (LowRank::blocks) the part is kept; rows that several linears share are kept once. What
// is no rank row or vector of a linear lies in PagedRows (engine/kernels/cuda/adapter_parts.h).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/adapter.h"
#include "engine/api/adapter_images.h"
#include "engine/api/module.h"
#include "engine/base/dtype.h"
#include "engine/kernels/cuda/adapter_parts.h"

namespace lorikeet::cuda {

inline constexpr int32_t kTileRanks = 16;
inline constexpr int32_t kMaxKroneckerRows = 8192;     // in1 of a Kronecker delta
inline constexpr int32_t kMaxCirculantBlock = 8192;

// Some consecutive ranks of one module: sixteen, but for its last tile and for rows so wide that a
// page holds fewer.
struct alignas(64) RankTile {
  // Rank row k is at a[0] + k rows for k < a_first, else at a[1] + (k - a_first) rows.
  const void* a[2] = {};
  const void* b[2] = {};
  // In units of eight columns: where the rows begin, and from row to row. What is outside of a row is zero;
  // what is behind the module's width is another's.
  uint16_t a_begin = 0, a_pitch = 0;
  uint16_t b_begin = 0, b_pitch = 0;
  uint16_t a_first : 5 = 0;
  uint16_t b_first : 5 = 0;
  uint16_t ranks : 5 = 0;  // 0: nothing here
  int16_t module_tiles = 0;  // tiles of the module that hold ranks
  float scale = 0;    // on x Aᵀ
  const float* out_scale = nullptr;  // [out] of the module or nullptr
  const float* bias = nullptr;       // [out]
};
static_assert(sizeof(RankTile) == 64);

// Elements from one rank row to the next: rows start 16-byte aligned.
constexpr int64_t RowPitch(int32_t width) { return (int64_t{width} + 7) / 8 * 8; }

struct ModuleWidths {
  int32_t in = 0;
  int32_t out = 0;
};

// The parts as tables to be copied: PagedRows::first is an image offset + 1, PagedRows::pages a page
// of the image + 1.
struct PartTables {
  AdapterParts adapter;  // without the pointers to what follows
  std::vector<ModuleParts> modules;
  std::vector<PagedRows> norms;
  std::vector<PromptAttentionParts> prompt_attention;
  std::vector<BottleneckParts> bottlenecks;
  std::vector<PagedRows> routers;
};

// fn(PagedRows&) for all that there are.
void ForEachRows(PartTables* tables, const std::function<void(PagedRows*)>& fn);

inline constexpr uintptr_t kInShared = uintptr_t{1} << 62;

// Where an adapter's parts go: pure arithmetic over page-relative offsets, no device.
struct ImagePlan {
  struct Piece {  // rows that lie together
    const std::byte* from = nullptr;  // host
    DType dtype = DType::kF32;        // of `from`
    int64_t from_stride = 0;          // elements from row to row
    int64_t from_step = 1;            // elements from one of a row to the next
    int32_t rows = 0;
    int32_t width = 0;
    DType to_dtype = DType::kF32;     // int32 goes as float32: what has its type is copied
    int64_t to_pitch = 0;             // bytes from row to row
    int64_t to = 0;                   // byte offset in the image
  };
  std::vector<Piece> pieces;
  // [modules, and those of a mixture, * tiles_per_module]; pointers are image offsets + 1, those into Adapter::shared's image with
  // kInShared as well.
  std::vector<RankTile> tiles;
  int32_t tiles_per_module = 0;
  PartTables parts;
  ImageSize size;
  int64_t bytes = 0;  // of the pieces, all rows at their pitch
};

// The piece's rows in their type.
void WritePiece(const ImagePlan::Piece& piece, std::byte* to);

// `widths` by ModuleId. INVALID_ARGUMENT: a row or vector is larger than a page, a part larger than
// its kernel takes, or an expert changed by more than pairs, output scales and biases.
absl::StatusOr<ImagePlan> PlanImage(const Adapter& adapter, const std::vector<ModuleWidths>& widths,
                                    const ExpertModules& experts, DType dtype, int64_t page_bytes);

}  // namespace lorikeet::cuda
