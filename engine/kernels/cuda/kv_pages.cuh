// Where a sequence's keys and values are.
#pragma once

#include "engine/kernels/cuda/attention.h"

namespace lorikeet::cuda {

// K block of a head in a page; V lies kv_heads blocks behind.
__device__ inline const std::byte* KeyBlockIn(const KvStep& step, int32_t page, int32_t layer,
                                       int32_t kv_head) {
  return step.pages + page * step.layout.page_bytes() + step.layout.Offset(layer, false, kv_head);
}

__device__ inline const std::byte* KeyBlock(const KvStep& step, int32_t sequence, int32_t block,
                                     int32_t layer, int32_t kv_head) {
  const int32_t page = step.list->page_ids[step.list->page_begin[sequence] +
                                           block * step.layout.pages_per_block +
                                           step.layout.PageOfLayer(layer)];
  return KeyBlockIn(step, page, layer, kv_head);
}

}  // namespace lorikeet::cuda
