#include "engine/model/base_model_view.h"

#include "engine/base/check.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {

LinearShape BaseModelView::shape(ModuleId id) const {
  const TensorView& weight = source_->weight(id);
  return {static_cast<int32_t>(weight.row_elements()), static_cast<int32_t>(weight.rows())};
}

void BaseModelView::ReadRows(ModuleId id, int32_t first_row, int32_t rows, float* out) const {
  const TensorView& weight = source_->weight(id);
  LK_CHECK(first_row >= 0 && rows >= 0 && first_row + rows <= weight.rows());
  Dequantize(weight.dtype, weight.row(first_row), rows * weight.row_elements(), out);
}

bool BaseModelView::ReadBias(ModuleId id, float* out) const {
  const TensorView* bias = source_->bias(id);
  if (bias == nullptr) return false;
  if (out != nullptr) Dequantize(bias->dtype, bias->bytes.data(), bias->elements(), out);
  return true;
}

void BaseModelView::ReadEmbedding(int32_t first_row, int32_t rows, float* out) const {
  const TensorView& table = source_->embedding();
  LK_CHECK(first_row >= 0 && rows >= 0 && first_row + rows <= table.rows());
  Dequantize(table.dtype, table.row(first_row), rows * table.row_elements(), out);
}

}  // namespace lorikeet
