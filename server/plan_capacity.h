// How many adapters of a shape fit beside how many tokens.
#pragma once

#include <cstdint>
#include <limits>

#include "absl/status/statusor.h"
#include "engine/api/adapter_images.h"
#include "engine/api/base_model.h"
#include "engine/memory/kv_layout.h"
#include "lorikeet/v1/adapters.pb.h"

namespace lorikeet {

// What there is of memory. Everything pointed to outlives it.
struct Capacity {
  const BaseModel* base = nullptr;
  int64_t host_bytes = std::numeric_limits<int64_t>::max();  // for adapters
  KvLayout kv;
  int32_t pages = 0;                      // that keys, values and images share
  const AdapterImages* images = nullptr;  // nullptr: adapters take no pages
};

// INVALID_ARGUMENT names the field, the value and the bound.
absl::StatusOr<v1::PlanCapacityResponse> PlanCapacity(const v1::PlanCapacityRequest& request,
                                                      const Capacity& capacity);

}  // namespace lorikeet
