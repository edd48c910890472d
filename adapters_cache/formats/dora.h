// DoRA's output scale (Liu et al. 2024): c = m / ‖W + s·B·A‖row, the norm of every output row of
// the adapted weight.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// a: [rank, in], b: [out, rank], magnitude: [out], out_scale: [out]. Rows are formed in float and
// their squares summed in double. INVALID_ARGUMENT: an adapted row is zero or overflows, so that
// its scale would not be finite.
absl::Status DoraOutScale(const BaseModel& base, ModuleId id, const std::vector<float>& a,
                          const std::vector<float>& b, int32_t rank, float scale,
                          const std::vector<float>& magnitude, float* out_scale);

}  // namespace lorikeet
