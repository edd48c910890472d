#include "engine/model/config.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace lorikeet {

absl::Status CheckConfig(const ModelConfig& config, std::string_view where) {
  auto invalid = [where](const auto&... parts) {
    return absl::InvalidArgumentError(
        absl::StrCat(absl::string_view(where.data(), where.size()), ": ", parts...));
  };
  if (config.heads % config.kv_heads != 0) {
    return invalid(config.heads, " query heads are not a multiple of ", config.kv_heads,
                   " key-value heads");
  }
  if (config.head_dim % 2 != 0) {
    return invalid("head size ", config.head_dim, " is odd; rotary embedding pairs its values");
  }
  const size_t layers = static_cast<size_t>(config.layers);
  if (config.layer_uses_rope.size() != layers || config.layer_uses_window.size() != layers) {
    return invalid("per-layer settings for ", config.layer_uses_rope.size(), " and ",
                   config.layer_uses_window.size(), " layers; the model has ", layers);
  }
  if (config.experts_per_token > config.experts) {
    return invalid(config.experts_per_token, " experts a token, but only ", config.experts,
                   " of them");
  }
  for (size_t i = 0; i < config.rope_inverse_frequencies.size(); ++i) {
    const float frequency = config.rope_inverse_frequencies[i];
    if (std::isfinite(frequency)) continue;
    return invalid("rotary frequency ", i, " comes out as ", frequency,
                   "; the rotary base or its scaling is out of range");
  }
  return absl::OkStatus();
}

}  // namespace lorikeet
