// A step's integers on the device: built on the host in one pinned block, sent in one copy.
//
// The block begins with a header at a fixed address and the per-row arrays at addresses that depend
// on the number of rows alone, so that recorded kernels find them; everything of varying length
// lies behind and is reached through the header.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/adapter_parts.h"
#include "engine/kernels/cuda/attention.h"
#include "engine/kernels/cuda/cuda_status.h"
#include "engine/kernels/cuda/experts.h"
#include "engine/kernels/cuda/extension.h"
#include "engine/kernels/cuda/low_rank.h"

namespace lorikeet::cuda {

struct StepHeader {
  AttentionList attention;
  LowRankList rows;     // short segments
  LowRankList prompts;  // long ones
  LowRankList logits;   // over the logit rows
};

// Rows of one adapter that has parts beyond the low-rank ones.
struct PartsSegment {
  int32_t row_begin = 0;
  int32_t row_end = 0;
  const AdapterParts* parts = nullptr;
};

// Of a row whose adapter's gates come with the step.
struct RowGates {
  int32_t row = 0;
  std::span<const float> values;
};

enum AdaptedRow : int32_t { kExtendsProducts = 1, kExtendsNone = 2 };

// What a step computes, worked out before anything is sent.
struct StepWork {
  int32_t chunk_pages = 0;
  std::vector<DecodeItem> decodes;
  std::vector<PromptItem> prompts;
  LowRankWork rows;              // short segments
  LowRankWork prompts_low_rank;  // long ones
  LowRankWork logits;
  ExtensionPlan extension;       // of the long ones, where products are extended
  std::vector<PartsSegment> parts;
  std::vector<RowGates> gates;
  std::vector<DeviceSegment> experts;  // of adapters that change experts, or have mixtures
  std::vector<int32_t> mixed_rows;     // of adapters with mixtures
  int32_t mixture_chosen = 0;          // the most of theirs
};

// all_prompts: rows alone, too, are prompts', whose pages are folded in one order whatever else is in the step.
void PlanAttention(const StepInput& step, int32_t kv_heads, bool all_prompts, StepWork* work);
// Segments of the step in rows of its logit rows.
std::vector<DeviceSegment> LogitSegments(const std::vector<DeviceSegment>& segments,
                                         std::span<const int32_t> logit_rows);

class StepArrays {
 public:
  explicit StepArrays(FirstError* errors) : errors_(errors) {}
  ~StepArrays();
  StepArrays(const StepArrays&) = delete;
  StepArrays& operator=(const StepArrays&) = delete;

  // Sends the step, padded to `rows` rows with token 0 at position -1. Waits until the copy before
  // has left the host. True if the block moved: recorded kernels are of no use any more.
  bool Send(const StepInput& step, const StepWork& work, int32_t rows, cudaStream_t stream);

  // Device pointers of the step sent last.
  const StepHeader* header() const { return reinterpret_cast<const StepHeader*>(device_); }
  const int32_t* tokens() const { return RowArray(0); }
  const int32_t* positions() const { return RowArray(1); }
  const int32_t* row_sequence() const { return RowArray(2); }
  const int32_t* adapted() const { return RowArray(3); }  // AdaptedRow; 0: the row has no adapter
  const AdapterParts* const* parts() const {  // [rows] nullptr: a row without
    return reinterpret_cast<const AdapterParts* const*>(RowArray(kRowArrays));
  }
  const float* const* gates() const {  // [rows] nullptr: a row without
    return reinterpret_cast<const float* const*>(parts() + rows_);
  }
  const RowTiles* row_tiles() const {  // [rows] of work.experts
    return reinterpret_cast<const RowTiles*>(gates() + rows_);
  }
  const ExtendedRow* extended_rows() const {  // [rows] where products are extended
    return reinterpret_cast<const ExtendedRow*>(row_tiles() + rows_);
  }
  const GatherItem* gathers() const { return gathers_; }
  const int32_t* logit_rows() const { return logit_rows_; }
  const int32_t* mixed_rows() const { return mixed_rows_; }

 private:
  static constexpr int64_t kRowArrays = 4;
  static constexpr int64_t kHeaderBytes = 256;
  static_assert(sizeof(StepHeader) <= kHeaderBytes);

  const int32_t* RowArray(int32_t i) const {
    return reinterpret_cast<const int32_t*>(device_ + kHeaderBytes) + int64_t{i} * rows_;
  }
  // Of all per-row arrays.
  static int64_t RowBytes(int32_t rows);
  bool Reserve(int64_t bytes, cudaStream_t stream);
  // The per-row arrays of rows_ rows, to the host's block; but for gates.
  void WriteRows(const StepInput& step, const StepWork& work);
  void AppendGates(std::span<const RowGates> gates);
  // Copies values to the end of the block; returns where they will be on the device.
  template <typename T>
  const T* Append(std::span<const T> values);

  FirstError* const errors_;
  std::byte* host_ = nullptr;
  std::byte* device_ = nullptr;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
  int32_t rows_ = 0;
  const int32_t* logit_rows_ = nullptr;
  const int32_t* mixed_rows_ = nullptr;
  const GatherItem* gathers_ = nullptr;
  cudaEvent_t sent_ = nullptr;
};

}  // namespace lorikeet::cuda
