// What the tensors of one linear come to, in float32, before it is packed: the parts of
// engine/api/adapter.h's ModuleDelta as plain vectors.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/api/base_model.h"

namespace lorikeet {

// A matrix, row-major.
struct Matrix2 {
  Matrix2() = default;
  Matrix2(int64_t rows, int64_t columns) : rows(rows), columns(columns), values(rows * columns) {}
  Matrix2(int64_t rows, int64_t columns, std::vector<float> values)
      : rows(rows), columns(columns), values(std::move(values)) {}

  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<float> values;

  float& at(int64_t r, int64_t c) { return values[r * columns + c]; }
  float at(int64_t r, int64_t c) const { return values[r * columns + c]; }
  float* row(int64_t r) { return values.data() + r * columns; }
  const float* row(int64_t r) const { return values.data() + r * columns; }
};

// ΔW += delta_scale ∘ (b · (rank_scale ∘ (rank_mix · a))), every other factor in b already.
struct LoweredPair {
  Matrix2 a = {};  // [rank, in]
  Matrix2 b = {};  // [out, rank]
  // In the place of a or b: kept once for all linears and adapters that have it. Columns of a and rows
  // of b behind this linear's are others'.
  std::shared_ptr<const Matrix2> shared_a = nullptr, shared_b = nullptr;
  bool blocks = false;  // LowRank::blocks
  Matrix2 rank_mix = {};                       // [rank, rank] or empty
  std::vector<float> rank_scale = {}, delta_scale = {};  // [rank] and [out], or both empty
};

struct Lowered {
  std::vector<LoweredPair> pairs;  // stacked along the rank when packed
  std::vector<float> out_scale;    // [out] or empty, as all below
  std::vector<float> bias;
  int32_t rotation_block = 0;
  std::vector<float> rotation;  // [in / block, block, block]
  std::vector<float> output_scale;
  std::vector<float> output_cross;
  int32_t output_half = 0;
  Matrix2 kronecker1, kronecker2;
  int32_t circulant_block = 0;
  std::vector<float> circulant;  // [out / b, in / b, b]
  bool has_sparse = false;
  std::vector<int32_t> sparse_row_begin, sparse_column;
  std::vector<float> sparse_value;
  Matrix2 dense;  // [out, in], only with allow_dense
  bool dense_is_choice = false;  // `pairs` says the same as `dense`, at more cost
};

}  // namespace lorikeet
