// A model stacked from the layers of another, as PEFT's layer_replication says it: those of each range
// [begin, end) one range after the other, their weights shared.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace lorikeet {

using LayerReplication = std::vector<std::pair<int32_t, int32_t>>;  // empty: as the model is

// From JSON, "[[0, 4], [2, 6]]"; an empty text is an empty list. INVALID_ARGUMENT: anything else, a range
// without layers, more than 4096 layers in all.
absl::StatusOr<LayerReplication> ParseLayerReplication(std::string_view json);

std::string ToString(const LayerReplication& replication);  // as above, without spaces

}  // namespace lorikeet
