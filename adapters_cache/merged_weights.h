// A base's weights with an adapter in them, for those who want a model without adapters.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/api/adapter.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// Why no weights compute what the adapter does; nullptr: they do.
const char* Unmergeable(const Adapter& adapter);

// One linear W' x + b' = what the adapter makes of W x + b, row by row. The arguments outlive it.
class MergedLinear {
 public:
  MergedLinear(const BaseModel& base, ModuleId id, const Adapter& adapter);

  // Rows of W', those of the base and those behind them that the adapter adds.
  int32_t rows() const { return rows_; }
  // Row `o` of W', [in], and its b', 0 where there is none.
  void Row(int32_t o, float* weight, float* bias) const;
  // Whether b' is not the base's.
  bool changes_bias() const { return delta_.bias || delta_.output_rotation.scale; }

 private:
  void Unrotated(int32_t o, float* weight, float* bias) const;
  void AddLowRank(int32_t o, float* weight) const;
  void AddStructured(int32_t o, float* weight) const;

  const BaseModel& base_;
  const ModuleId id_;
  const LinearShape shape_;
  const ModuleDelta& delta_;
  int32_t rows_;
  std::vector<float> bias_;  // [out] of the base, or zeros
  std::vector<float> a_, b_;  // [rank, in] and [rank, out] in float32
};

// The embedding of token `t`, [D].
void MergedEmbedding(const BaseModel& base, const Adapter& adapter, int32_t t, float* row);

}  // namespace lorikeet
