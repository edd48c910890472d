// Plain arguments of backend operations. Shapes in comments: T rows of the step, S sequences, L rows
// whose logits are wanted, D hidden width.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/api/module.h"
#include "engine/base/dtype.h"
#include "engine/tensor/tensor_view.h"

namespace lorikeet {

// Memory of the backend's device, zeroed; freed with its last owner.
using DeviceMemory = std::shared_ptr<std::byte>;

// Rows in device memory. Elements are float32 or the backend's activation type.
struct Matrix {
  Matrix() = default;
  Matrix(void* data, int32_t rows, int32_t width, DType dtype = DType::kF32)
      : data(data), rows(rows), width(width), stride(width), dtype(dtype) {}

  void* data = nullptr;
  int32_t rows = 0;
  int32_t width = 0;
  int64_t stride = 0;  // elements from row to row
  DType dtype = DType::kF32;

  template <typename T = float>
  constexpr T* row(int32_t r) const { return static_cast<T*>(data) + r * stride; }

  // Rows [begin, begin + count).
  Matrix Rows(int32_t begin, int32_t count) const {
    Matrix part = *this;
    part.data = static_cast<std::byte*>(data) + ByteSize(dtype, begin * stride);
    part.rows = count;
    return part;
  }
  // Columns [begin, begin + count).
  Matrix Columns(int32_t begin, int32_t count) const {
    Matrix part = *this;
    part.data = static_cast<std::byte*>(data) + ByteSize(dtype, begin);
    part.width = count;
    return part;
  }
};

// One step. Sequence s owns rows [sequence_begin[s], sequence_begin[s + 1]), consecutive tokens;
// the pages of all its tokens so far are page_ids[page_begin[s], page_begin[s + 1]), block-major.
struct StepInput {
  std::span<const int32_t> tokens;          // [T]
  std::span<const int32_t> positions;       // [T]
  std::span<const int32_t> sequence_begin;  // [S + 1]
  std::span<const int32_t> page_begin;      // [S + 1]
  std::span<const int32_t> page_ids;
  std::span<const int32_t> logit_rows;         // [L] ascending
  std::span<const AdapterSegment> segments;    // ascending, disjoint
  // [T] the gates of rows whose adapter has any, [Gating::width()] each; empty: no row has.
  std::span<const float* const> gates;
};

// Which rows of the step an operation is over: all T, or the L of `logit_rows`, adjacent.
enum class RowSet : uint8_t { kAll, kLogits };

// A linear of the model as its file has it. Views and their bytes outlive what is loaded from them.
struct LinearSource {
  const TensorView* weight = nullptr;  // [out, in]
  const TensorView* bias = nullptr;    // [out] or nullptr
  bool quantize = true;                // as BackendOptions has it; else the weight keeps its type
  bool expert = false;                 // multiplied by Experts alone
  bool feeds_softmax = false;          // its outputs are scores: rounding shows most there
};

// Linears that share their input (q, k, v or gate, up, or a single one) in the form the backend
// computes with: one product whose columns are the parts' one after the other.
class LinearWeight {
 public:
  virtual ~LinearWeight() = default;
  ModuleId first_module = 0;  // part i is module first_module + i
  int32_t in = 0;
  std::vector<int32_t> out;  // [parts]
  int64_t bytes = 0;         // that a product reads of it

  int32_t width() const {
    int32_t sum = 0;
    for (const int32_t columns : out) sum += columns;
    return sum;
  }
};

// The operation that reads a product's y.
enum class Reader : uint8_t { kAny, kRopeStore, kSwiGlu, kAddRmsNorm };

// y = x Wᵀ + bias with the adapters' deltas on their rows.
struct LinearArgs {
  const LinearWeight* weight = nullptr;
  Matrix x;              // [rows, in]
  Matrix y;              // [rows, width()]
  int32_t x_room = 0;    // elements behind each row of x that the backend may write to: Backend::x_room
  RowSet rows = RowSet::kAll;
  int32_t first_row = 0;  // of the row set: x row 0 is its row `first_row`
  // Other than kAny: the next and only operation to read y, in the same Run. The backend may keep the adapters'
  // part apart and leave it to that one to add, or leave it the product.
  Reader reader = Reader::kAny;
};

// An expert of a layer, or a layer's only MLP: two linears.
struct Expert {
  const LinearWeight* gate_up = nullptr;
  const LinearWeight* down = nullptr;
};

// Of each row the `chosen` experts with the largest score, the first where scores are equal; w their
// shares of a softmax over all scores, or with `normalise` over theirs alone.
//     out = Σ over the chosen e, ascending, of w_e · down_e(silu(gate_e x) ∘ up_e x)
// with the adapters' deltas on their rows.
struct ExpertsArgs {
  std::span<const Expert> experts;  // [E]
  Matrix scores;                    // [T, E] float32: what the router's linear gives
  int32_t chosen = 0;
  bool normalise = false;
  Matrix x;    // [T, D]
  Matrix out;  // [T, D]
};

// out's rows of adapters with an MlpMixture become what that makes of x.
struct MlpMixtureArgs {
  Expert mlp;  // the layer's
  Matrix x;    // [T, D]
  Matrix out;  // [T, D]
  int32_t layer = 0;
};

// x += delta (delta.data may be nullptr: nothing added); out = RMSNorm(x) ∘ weight
// (Zhang & Sennrich 2019). With kLogits, out row i is of x row logit_rows[i].
struct NormArgs {
  Matrix x;                       // [T, D] float32, the residual stream
  Matrix delta;                   // [T, D]
  const float* weight = nullptr;  // [D]
  int32_t norm = 0;               // which: an index into Adapter::norms
  float eps = 0;
  Matrix out;                     // [T or L, D]
  RowSet rows = RowSet::kAll;
};

// delta += what the bottleneck after block `block` (NormIndex of the norm before it) makes of it.
struct BottleneckArgs {
  Matrix x;      // [T, D] float32, the residual stream before the block
  Matrix delta;  // [T, D] the block's output
  int32_t block = 0;
};

// Rotary embedding of q and k in place, then k and v to the pages of their sequences.
struct RopeStoreArgs {
  Matrix q, k, v;                  // [T, heads * head_dim], [T, kv_heads * head_dim] twice
  const float* q_norm = nullptr;   // [head_dim] RMS norm before rotary, or nullptr
  const float* k_norm = nullptr;
  float norm_eps = 0;
  const float* inverse_frequencies = nullptr;  // [head_dim / 2] radians a position; nullptr: no rotary
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

}  // namespace lorikeet
