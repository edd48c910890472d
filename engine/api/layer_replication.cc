#include "engine/api/layer_replication.h"

#include "absl/strings/str_cat.h"
#include "engine/tensor/json.h"

namespace lorikeet {
namespace {

constexpr int32_t kMostLayers = 4096;

}  // namespace

absl::StatusOr<LayerReplication> ParseLayerReplication(std::string_view json) {
  LayerReplication replication;
  if (json.empty()) return replication;
  const nlohmann::json ranges = ParseJson(json, "layer replication").value_or(nlohmann::json());
  const auto is_layer = [](const nlohmann::json& value) {
    return value.is_number_integer() && value >= 0 && value <= kMostLayers;
  };
  int64_t layers = 0;
  bool valid = ranges.is_array();
  for (size_t i = 0; valid && i < ranges.size(); ++i) {
    const nlohmann::json& range = ranges[i];
    valid = range.is_array() && range.size() == 2 && is_layer(range[0]) && is_layer(range[1]) && range[0] < range[1];
    if (!valid) break;
    replication.emplace_back(range[0], range[1]);
    layers += replication.back().second - replication.back().first;
    valid = layers <= kMostLayers;
  }
  if (valid) return replication;
  return absl::InvalidArgumentError(absl::StrCat(
      "'", std::string(json.substr(0, 200)), "' is not a list of ranges of layers like [[0,4],[2,6]], of at most ", kMostLayers,
      " layers in all"));
}

std::string ToString(const LayerReplication& replication) { return nlohmann::json(replication).dump(); }

}  // namespace lorikeet
