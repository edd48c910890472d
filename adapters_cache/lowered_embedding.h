// Methods of linears on the input embedding, which is a linear from D to the tokens for them: its row of a
// token is what the token's input becomes.
#pragma once

#include "absl/status/status.h"
#include "adapters_cache/formats/lowered.h"
#include "adapters_cache/pack.h"
#include "engine/api/adapter.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// The table as the only linear of a model. `base` outlives it.
class EmbeddingAsLinear final : public BaseModel {
 public:
  explicit EmbeddingAsLinear(const BaseModel& base) : base_(base) {}

  int layers() const override { return base_.layers(); }
  int32_t vocab_size() const override { return base_.vocab_size(); }
  std::string path(ModuleId id) const override;
  LinearShape shape(ModuleId id) const override;
  void ReadRows(ModuleId id, int32_t first_row, int32_t rows, float* out) const override;

 private:
  const BaseModel& base_;
};

// Pairs stay pairs. A delta of all rows, or a rotation of them, makes a table of the adapter's own, dense.
absl::Status PackLoweredEmbedding(const BaseModel& base, Lowered lowered, Packer* packer, Adapter* adapter);

}  // namespace lorikeet
