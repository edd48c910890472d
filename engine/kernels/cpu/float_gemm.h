// Products in float32 from weights of any stored type: a panel of rows is widened to float32 in
// cache, then multiplied by oneDNN's sgemm on the calling thread alone.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/kernels/args.h"
#include "engine/tensor/tensor_view.h"

namespace lorikeet {

inline constexpr int32_t kFloatPanelColumns = 32;

// y[:, column_begin, column_end) = x W[column_begin, column_end)ᵀ. `panel` is scratch that grows
// to kFloatPanelColumns rows of the weight. row_by_row: a row's sums do not depend on how many there are.
// REQUIRES: column_end - column_begin <= kFloatPanelColumns.
void FloatGemm(const TensorView& weight, Matrix x, int32_t column_begin, int32_t column_end, bool row_by_row,
               std::vector<float>* panel, Matrix y);

}  // namespace lorikeet
