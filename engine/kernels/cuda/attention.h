// Rotary embedding, key/value store and paged attention.
//
// Inside a head's block of a page K and V are both [kPageTokens, head_dim]. Attention computes
// Sᵀ = K Qᵀ and Oᵀ = Vᵀ Pᵀ a page at a time with a running softmax (Dao et al. 2022), so that the
// 16 tokens of a page are the long side of the tensor cores' tile and the few queries that share a
// KV head the short one. A decoding row is cut into chunks of pages when the rows alone would
// leave much of the device idle.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/elementwise.h"
#include "engine/memory/kv_layout.h"

namespace lorikeet::cuda {

inline constexpr int32_t kPromptQueries = 64;  // rows · heads of a KV head that a prompt's block takes
inline constexpr int32_t kPromptRows = 16;     // of an item

// Pages [chunk * chunk_pages, ...) for the one row of a decoding sequence. Holds all that the
// kernel needs to find its pages, so that few loads wait for one another.
struct alignas(16) DecodeItem {
  int32_t row = 0;
  int32_t position = 0;
  int32_t chunk = 0;
  int32_t page_begin = 0;  // of the sequence, in page_ids
};

// Rows [row_begin, row_end) of a sequence that has several in the step.
struct PromptItem {
  int32_t row_begin = 0;
  int32_t row_end = 0;
  int32_t sequence = 0;
  int32_t pad = 0;
};

struct AttentionList {
  int32_t decode_count = 0;
  int32_t prompt_count = 0;
  int32_t chunk_pages = 0;
  const DecodeItem* decodes = nullptr;
  const PromptItem* prompts = nullptr;
  const int32_t* page_begin = nullptr;  // [S + 1]
  const int32_t* page_ids = nullptr;
};

// What all layers of a step share; device pointers.
struct KvStep {
  KvLayout layout;
  std::byte* pages = nullptr;
  int32_t page_count = 0;
  const int32_t* positions = nullptr;     // [R]; -1: a row computed for nothing
  const int32_t* row_sequence = nullptr;  // [R]
  const AttentionList* list = nullptr;
  int32_t prompts = 0;         // the list's prompt_count
  bool decoding = false;       // decode_count is not 0
  float* partials = nullptr;   // [decodes, heads, PartialStride] of rows with several chunks
  int32_t* arrived = nullptr;  // [R, heads] all zero between launches
};

// Floats of one query's sums, top and total; a multiple of four.
constexpr int32_t PartialStride(int32_t head_dim) { return (head_dim + 3) / 4 * 4 + 4; }

// Floats of `partials` for so many decode items.
constexpr int64_t PartialFloats(int64_t items, int32_t heads, int32_t head_dim) {
  return items * heads * PartialStride(head_dim);
}

// beside: of q, k and v together; q.data is its first column.
cudaError_t LaunchRopeStore(const RopeStoreArgs& args, const Beside& beside, const KvStep& step,
                            cudaStream_t stream);
cudaError_t LaunchAttention(const AttentionArgs& args, const KvStep& step, cudaStream_t stream);

// The same where the copy engine can bring pages: on Hopper, heads 64, 128 or 256 wide of 16 bits.
bool CanBringPages(const KvStep& step);
cudaError_t LaunchPagesAttention(const AttentionArgs& args, const KvStep& step, cudaStream_t stream);

// Any type and head width, a token at a time: for what the tensor cores do not take.
cudaError_t LaunchPlainAttention(const AttentionArgs& args, const KvStep& step,
                                 cudaStream_t stream);

}  // namespace lorikeet::cuda
