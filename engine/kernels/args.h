// Plain arguments of backend operations. Shapes in comments: T rows of the step, S sequences, D
// hidden width. Matrices hold the backend's activation type (float on the CPU).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/api/module.h"
#include "engine/memory/kv_layout.h"

namespace lorikeet {

struct Matrix {
  float* data = nullptr;
  int32_t rows = 0;
  int32_t width = 0;  // also the row stride

  float* row(int32_t r) const { return data + int64_t{r} * width; }
};

// A weight [out, in] (and bias [out], perhaps) in the form the backend computes with.
class LinearWeight {
 public:
  virtual ~LinearWeight() = default;
  int32_t in = 0;
  int32_t out = 0;
  std::vector<float> bias;  // [out] or empty
};

// One product y = x Wᵀ + bias of a LinearGroup, with the adapters' deltas of `module` on their rows.
struct LinearOutput {
  const LinearWeight* weight = nullptr;
  ModuleId module = 0;
  Matrix y;  // [T, out]
};

// Products that share their input: q, k, v or gate, up, or a single one.
struct LinearGroup {
  Matrix x;  // [T, in]
  std::span<const LinearOutput> outputs;
  std::span<const AdapterSegment> segments;
};

// Rotary embedding of q and k in place, then k and v to the pages of their sequences.
struct RopeStoreArgs {
  Matrix q, k, v;                  // [T, heads * head_dim], [T, kv_heads * head_dim] twice
  const float* q_norm = nullptr;   // [head_dim] RMS norm before rotary, or nullptr
  const float* k_norm = nullptr;
  float norm_eps = 0;
  const float* cos = nullptr;      // [T, head_dim / 2] of each row's position; nullptr: no rotary
  const float* sin = nullptr;
  int32_t head_dim = 0;
  int32_t layer = 0;
};

struct AttentionArgs {
  Matrix q;    // [T, heads * head_dim]
  Matrix out;  // [T, heads * head_dim]
  int32_t heads = 0;
  int32_t layer = 0;
  int32_t window = 0;  // 0: full causal; w: itself and w - 1 tokens before
  float scale = 0;     // on q·k
};

// Where the step's sequences live; the same for all layers of a step.
struct KvView {
  KvLayout layout;
  std::byte* pages = nullptr;                // page p at pages + p * layout.page_bytes()
  std::span<const int32_t> sequence_begin;   // [S + 1] rows of sequence s
  std::span<const int32_t> first_position;   // [S] position of the sequence's first row
  std::span<const int32_t> page_begin;       // [S + 1] into page_ids
  std::span<const int32_t> page_ids;         // block-major
};

}  // namespace lorikeet
