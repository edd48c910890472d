#include "engine/runner/gates.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "engine/base/check.h"
#include "engine/base/dot.h"

namespace lorikeet {
namespace {

std::vector<float> Apply(const Gating::Layer& layer, std::span<const float> x) {
  LK_CHECK(static_cast<int32_t>(x.size()) == layer.in);
  std::vector<float> y(layer.bias);
  for (int32_t o = 0; o < layer.out; ++o) {
    y[o] += Dot(x.data(), &layer.weight[int64_t{o} * layer.in], layer.in);
  }
  return y;
}

void Softmax(std::span<float> values, float temperature) {
  const float top = *std::max_element(values.begin(), values.end());
  float sum = 0;
  for (float& value : values) sum += value = std::exp((value - top) / temperature);
  for (float& value : values) value /= sum;
}

// All but the `count` largest become `other`; the first of equals is larger.
void KeepLargest(std::span<float> values, int32_t count, float other) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [values](int32_t a, int32_t b) { return values[a] > values[b]; });
  for (size_t i = count; i < order.size(); ++i) values[order[i]] = other;
}

}  // namespace

void EvaluateGates(const Gating& gating, std::span<const float> hidden, std::span<float> gates) {
  std::vector<float> x(hidden.begin(), hidden.end());
  for (size_t i = 0; i < gating.layers.size(); ++i) {
    x = Apply(gating.layers[i], x);
    if (i + 1 == gating.layers.size()) break;
    for (float& value : x) value = std::max(value, 0.0f);
  }
  LK_CHECK(x.size() == gates.size());
  std::copy(x.begin(), x.end(), gates.begin());
  for (int32_t set = 0; set < gating.sets; ++set) {
    const std::span<float> own = gates.subspan(int64_t{set} * gating.experts, gating.experts);
    if (gating.softmax) Softmax(own, gating.temperature);
    if (gating.top > 0) KeepLargest(own, gating.top, 0);
    if (!gating.softmax_of_top) continue;
    // As PEFT has it: among what is not 0.
    std::replace(own.begin(), own.end(), 0.0f, -std::numeric_limits<float>::infinity());
    Softmax(own, 1);
  }
}

}  // namespace lorikeet
