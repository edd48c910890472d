#include "engine/kernels/cpu/float_gemm.h"

#include <dnnl.h>
#include <omp.h>

#include "engine/base/check.h"
#include "engine/kernels/cpu/widen.h"

namespace lorikeet {

void FloatGemm(const TensorView& weight, Matrix x, int32_t column_begin, int32_t column_end, bool row_by_row,
               std::vector<float>* panel, Matrix y) {
  const int64_t in = weight.row_elements();
  const int32_t columns = column_end - column_begin;
  const float* w = nullptr;
  if (weight.dtype == DType::kF32) {
    w = reinterpret_cast<const float*>(weight.row(column_begin));
  } else {
    panel->resize(kFloatPanelColumns * in);
    Widen(weight.dtype, weight.row(column_begin), columns * in, panel->data());
    w = panel->data();
  }
  omp_set_num_threads(1);  // of this thread alone: the pool splits the work, not oneDNN
  const int32_t at_once = row_by_row ? 1 : x.rows;
  for (int32_t row = 0; row < x.rows; row += at_once) {
    const dnnl_status_t status =
        dnnl_sgemm('N', 'T', at_once, columns, in, 1.0f, x.row(row), x.stride, w, in, 0.0f,
                   y.row(row) + column_begin, y.stride);
    LK_CHECK_MSG(status == dnnl_success, "dnnl_sgemm");
  }
}

}  // namespace lorikeet
