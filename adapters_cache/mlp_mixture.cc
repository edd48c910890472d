#include "adapters_cache/mlp_mixture.h"

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

absl::Status CheckRouters(const RawAdapter& raw, const BaseModel& base) {
  for (int32_t layer = 0; layer < base.layers(); ++layer) {
    if (!raw.routers.contains(layer)) {
      return absl::InvalidArgumentError(absl::StrCat("the file has no router (moe_gate) for layer ", layer));
    }
  }
  const std::vector<int64_t> expected = {static_cast<int64_t>(raw.experts.size()), base.hidden()};
  for (const auto& [layer, router] : raw.routers) {
    if (layer < 0 || layer >= base.layers()) {
      return absl::NotFoundError(absl::StrCat("the base model (", base.layers(), " layers) has no place for ",
                                              router.name));
    }
    if (router.view.shape != expected || IsCode(router.view.dtype)) {
      return absl::InvalidArgumentError(absl::StrCat(
          router.name, " is ", Info(router.view.dtype).name, ShapeString(router.view.shape), "; ",
          raw.experts.size(), " experts on this base need floats ", ShapeString(expected)));
    }
    LK_RETURN_IF_ERROR(CheckFinite(router.name, router.view));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status PackMlpMixture(const RawAdapter& raw, const BaseModel& base,
                            const NormaliseOptions& options, Adapter* adapter) {
  if (raw.routed == 0) return absl::OkStatus();
  LK_RETURN_IF_ERROR(CheckRouters(raw, base));
  MlpMixture& mixture = adapter->mlp_mixture;
  mixture.chosen = raw.routed;
  for (const RawAdapter& raw_expert : raw.experts) {
    auto expert = Normalise(raw_expert, base, options);
    if (!expert.ok()) {
      return absl::Status(expert.status().code(), absl::StrCat("expert ", mixture.experts.size(), ": ",
                                                               expert.status().message()));
    }
    adapter->bytes += (*expert)->bytes;
    mixture.experts.push_back(*std::move(expert));
  }
  for (const auto& [layer, router] : raw.routers) {
    std::vector<float>& values = mixture.routers.emplace_back(router.view.elements());
    Dequantize(router.view.dtype, router.view.bytes.data(), router.view.elements(), values.data());
    adapter->bytes += static_cast<int64_t>(values.size() * sizeof(float));
  }
  return absl::OkStatus();
}

}  // namespace lorikeet
