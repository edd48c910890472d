// How the keys and values of a sequence lie in pages.
//
// A block is kPageTokens tokens of all layers: pages_per_block pages, each holding
// layers_per_page consecutive layers. Inside a page: [layer][K, V][kv_head][token][head_dim].
// layers_per_page is the largest count that keeps a page within kMaxPageBytes, evened out over the
// pages of a block.
#pragma once

#include <cstdint>

#include "engine/base/check.h"
#include "engine/base/dtype.h"

namespace lorikeet {

struct KvLayout {
  static constexpr int32_t kPageTokens = 16;
  static constexpr int64_t kMaxPageBytes = 512 << 10;

  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  DType dtype = DType::kF32;  // kF32, kF16 or kBF16
  int32_t layers_per_page = 0;
  int32_t pages_per_block = 0;

  static KvLayout Make(int32_t layers, int32_t kv_heads, int32_t head_dim, DType dtype) {
    KvLayout layout{layers, kv_heads, head_dim, dtype, 0, 0};
    const int64_t fit = kMaxPageBytes / layout.layer_bytes();
    const int32_t most = fit < 1 ? 1 : fit > layers ? layers : static_cast<int32_t>(fit);
    layout.pages_per_block = (layers + most - 1) / most;
    layout.layers_per_page = (layers + layout.pages_per_block - 1) / layout.pages_per_block;
    return layout;
  }

  // K or V of one head in one page: [kPageTokens, head_dim].
  constexpr int64_t head_bytes() const { return ByteSize(dtype, int64_t{kPageTokens} * head_dim); }
  constexpr int64_t layer_bytes() const { return 2 * kv_heads * head_bytes(); }
  constexpr int64_t page_bytes() const { return layers_per_page * layer_bytes(); }

  constexpr int32_t PageOfLayer(int32_t layer) const { return layer / layers_per_page; }
  // Byte offset in its page of K (or V) of `head` in `layer`.
  constexpr int64_t Offset(int32_t layer, bool value, int32_t head) const {
    return (layer % layers_per_page) * layer_bytes() + (value ? kv_heads + head : head) * head_bytes();
  }
  // Pages for `tokens` tokens.
  int32_t PagesFor(int64_t tokens) const {
    return static_cast<int32_t>((tokens + kPageTokens - 1) / kPageTokens) * pages_per_block;
  }
};

}  // namespace lorikeet
