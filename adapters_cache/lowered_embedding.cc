#include "adapters_cache/lowered_embedding.h"

#include <string>
#include <utility>

#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/formats/raw_adapter.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

// x' = x R of every row, block by block.
Matrix2 Rotated(const Matrix2& table, const Lowered& lowered) {
  const int64_t b = lowered.rotation_block;
  Matrix2 out(table.rows, table.columns);
  for (int64_t t = 0; t < table.rows; ++t) {
    for (int64_t first = 0; first < table.columns; first += b) {
      AddProduct(1, table.row(t) + first, &lowered.rotation[first * b], {1, b, b}, out.row(t) + first);
    }
  }
  return out;
}

// The rows of all tokens; none where the method has a pair.
Matrix2 Table(const BaseModel& base, const Lowered& lowered) {
  if (lowered.rotation.empty() && lowered.dense.values.empty()) return {};
  Matrix2 table(base.vocab_size(), base.hidden());
  base.ReadEmbedding(0, base.vocab_size(), table.values.data());
  if (!lowered.rotation.empty()) return Rotated(table, lowered);
  for (size_t i = 0; i < table.values.size(); ++i) table.values[i] += lowered.dense.values[i];
  return table;
}

}  // namespace

std::string EmbeddingAsLinear::path(ModuleId) const { return kEmbeddingPath; }

LinearShape EmbeddingAsLinear::shape(ModuleId) const { return {base_.hidden(), base_.vocab_size()}; }

void EmbeddingAsLinear::ReadRows(ModuleId, int32_t first_row, int32_t rows, float* out) const {
  base_.ReadEmbedding(first_row, rows, out);
}

absl::Status PackLoweredEmbedding(const BaseModel& base, Lowered lowered, Packer* packer, Adapter* adapter) {
  LK_CHECK(lowered.out_scale.empty() && lowered.bias.empty() && lowered.output_scale.empty());
  LK_CHECK(lowered.kronecker1.values.empty() && lowered.circulant.empty() && !lowered.has_sparse);
  Lowered of_tokens{.dense = Table(base, lowered)};
  for (LoweredPair& pair : lowered.pairs) {
    Fold({base.hidden(), base.vocab_size()}, &pair);
    of_tokens.pairs.push_back({.a = Transpose(pair.b), .b = Transpose(pair.a)});
  }
  ModuleDelta delta;
  LK_RETURN_IF_ERROR(packer->Module(kEmbeddingPath, std::move(of_tokens), &delta));
  adapter->embedding.low_rank = delta.low_rank;
  adapter->embedding.rows.rows = delta.dense;
  return absl::OkStatus();
}

}  // namespace lorikeet
