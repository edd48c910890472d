// Layers with experts on the CUDA backend against their definition (ExpertsArgs) in double precision:
// random routings, shapes, adapters and types, on poisoned outputs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "tests/gpu/device_rows.h"
#include "tests/support/load_images.h"
#include "tests/support/random_adapter.h"

namespace lorikeet {
namespace {

// Experts of equal widths, so that one RandomAdapter has all their linears.
struct Layer {
  int32_t width, count, chosen;
  bool normalise;

  explicit Layer(std::mt19937& rng)
      : width(8 * (1 + rng() % 40)),
        count(1 + rng() % 40),
        chosen(1 + rng() % std::min(count, 8)),
        normalise(rng() % 2) {}
  int32_t modules() const { return ModuleCount(1, count); }
  ModuleId module(int32_t expert, Linear linear) const { return ExpertModule(1, count, 0, expert, linear); }
};

struct Weights {
  std::vector<std::vector<float>> values;  // [modules] of [width, width]; experts' alone
  std::vector<std::vector<std::byte>> stored;
  std::vector<TensorView> views;
  std::vector<std::unique_ptr<LinearWeight>> linears;
  std::vector<Expert> experts;

  Weights(const Layer& layer, DType dtype, Backend* backend, std::mt19937& rng)
      : values(layer.modules()), stored(layer.modules()), views(layer.modules()) {
    const auto load = [&](ModuleId first, int32_t parts) {
      std::vector<LinearSource> sources;
      for (ModuleId m = first; m < first + parts; ++m) {
        values[m] = RandomFloats(int64_t{layer.width} * layer.width, rng);
        RoundTo(dtype, &values[m]);
        stored[m] = Encode(dtype, values[m]);
        views[m] = {dtype, {layer.width, layer.width}, stored[m]};
        sources.push_back({.weight = &views[m], .quantize = false, .expert = true});
      }
      linears.push_back(backend->LoadLinear(first, sources));
      return linears.back().get();
    };
    for (int32_t e = 0; e < layer.count; ++e) {
      const LinearWeight* gate_up = load(layer.module(e, Linear::kGate), 2);
      experts.push_back({gate_up, load(layer.module(e, Linear::kDown), 1)});
    }
  }
};

// One row's sum over its experts, and the sum of its last products' magnitudes.
void ReferenceSum(const Layer& layer, const Weights& weights, const float* x, const float* scores,
                  const RandomAdapter* adapter, std::vector<double>* out, std::vector<double>* size) {
  std::vector<int32_t> order(layer.count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  double total = 0;
  for (int32_t i = 0; i < (layer.normalise ? layer.chosen : layer.count); ++i) {
    total += std::exp(double{scores[order[i]]});
  }
  const int32_t width = layer.width;
  out->assign(width, 0);
  size->assign(width, 0);
  std::vector<double> gate, up, down, magnitude;
  for (int32_t i = 0; i < layer.chosen; ++i) {
    const ModuleId m = layer.module(order[i], Linear::kGate);
    ReferenceRow(x, width, width, weights.values[m], {}, adapter, m, &gate, &magnitude);
    ReferenceRow(x, width, width, weights.values[m + 1], {}, adapter, m + 1, &up, &magnitude);
    std::vector<float> gated(width);
    for (int32_t c = 0; c < width; ++c) {
      gated[c] = static_cast<float>(gate[c] / (1 + std::exp(-gate[c])) * up[c]);
    }
    ReferenceRow(gated.data(), width, width, weights.values[m + 2], {}, adapter, m + 2, &down, &magnitude);
    const double weight = std::exp(double{scores[order[i]]}) / total;
    for (int32_t c = 0; c < width; ++c) {
      (*out)[c] += weight * down[c];
      (*size)[c] += weight * magnitude[c];
    }
  }
}

struct Step {
  std::vector<std::unique_ptr<RandomAdapter>> adapters;
  std::vector<AdapterSegment> segments;
  std::vector<const RandomAdapter*> of_row;

  Step(const Layer& layer, int32_t rows, DType dtype, std::mt19937& rng) : of_row(rows) {
    const ModuleId first = layer.module(0, Linear::kGate);
    for (int32_t r = rng() % 3; r < rows;) {
      const std::vector<int32_t> outs(layer.modules(), layer.width);
      adapters.push_back(std::make_unique<RandomAdapter>(layer.width, outs, dtype, 20, rng));
      std::vector<ModuleDelta>& modules = adapters.back()->adapter.modules;
      std::fill(modules.begin(), modules.begin() + first, ModuleDelta());
      const int32_t end = std::min<int32_t>(rows, r + 1 + rng() % 60);
      segments.push_back({r, end, &adapters.back()->adapter});
      std::fill(of_row.begin() + r, of_row.begin() + end, adapters.back().get());
      r = end + rng() % 5;
    }
  }
};

void CheckExperts(const TypeCase& type, uint32_t seed) {
  std::mt19937 rng(seed);
  const Layer layer(rng);
  const int32_t rows = 1 + rng() % (seed % 2 == 0 ? 12 : 400), width = layer.width;
  auto made = MakeCudaBackend({.precision = type.precision, .stored = type.stored,
                               .experts = {1, layer.count}, .experts_per_token = layer.chosen,
                               .max_rows = 512});
  ASSERT_TRUE(made.ok()) << made.status();
  Backend* const backend = made->get();
  const Weights weights(layer, type.dtype, backend, rng);
  ASSERT_GT(backend->AllocatePages(KvLayout::Make(8, 2, 64, DType::kBF16), 256 << 20), 0);
  const Step step(layer, rows, type.dtype, rng);
  std::vector<std::shared_ptr<const Adapter>> adapters;
  for (const auto& random : step.adapters) adapters.emplace_back(std::shared_ptr<const Adapter>(), &random->adapter);
  LoadImages(backend->images(), adapters, 1);
  std::vector<float> x = RandomFloats(int64_t{rows} * width, rng);
  for (float& v : x) v /= 128;  // three products deep, within float16
  std::vector<float> scores = RandomFloats(int64_t{rows} * layer.count, rng);
  for (float& score : scores) score = std::round(2 * score);  // equal ones go to the first
  RoundTo(type.dtype, &x);
  const std::vector<int32_t> tokens(rows), positions(rows), begin = {0, rows}, page_begin = {0, 0};
  const int32_t padded = backend->BeginStep({.tokens = tokens, .positions = positions,
                                             .sequence_begin = begin, .page_begin = page_begin,
                                             .segments = step.segments});
  DeviceRows dx(backend, padded, width, type.dtype), out(backend, padded, width, type.dtype);
  DeviceRows dscores(backend, padded, layer.count, DType::kF32);
  std::vector<float> padded_x = x, padded_scores = scores;
  padded_x.resize(int64_t{padded} * width, NAN);  // rows computed for nothing must touch no other
  padded_scores.resize(int64_t{padded} * layer.count, NAN);
  dx.Write(padded_x);
  dscores.Write(padded_scores);
  backend->Experts({.experts = weights.experts, .scores = dscores.matrix, .chosen = layer.chosen,
                    .normalise = layer.normalise, .x = dx.matrix, .out = out.matrix});
  const std::vector<float> y = out.Read();
  ASSERT_TRUE(backend->status().ok()) << backend->status();
  std::vector<double> expected, size;
  for (int32_t r = 0; r < rows; ++r) {
    ReferenceSum(layer, weights, &x[int64_t{r} * width], &scores[int64_t{r} * layer.count],
                 step.of_row[r], &expected, &size);
    for (int32_t c = 0; c < width; ++c) {
      // Each of a dozen roundings is of about the size that random signs leave of the magnitude.
      const double tolerance = type.step * (12 * std::abs(expected[c]) + 12 * size[c] / std::sqrt(width)) +
                               0x1p-22 * size[c];
      ASSERT_NEAR(y[int64_t{r} * width + c], expected[c], tolerance)
          << Info(type.dtype).name << " seed " << seed << " width " << width << " experts "
          << layer.count << " chosen " << layer.chosen << " rows " << rows << " row " << r
          << " column " << c << (step.of_row[r] ? " adapted" : "");
    }
  }
  AdapterMoves end;
  for (const auto& adapter : adapters) end.drops.push_back(adapter->serial);
  backend->images()->Move(std::move(end));
}

TEST(CudaExperts, RowsOfAnyAdapterMatchTheDefinition) {
  for (const TypeCase& type : kTypes) {
    for (uint32_t seed = 0; seed < 12; ++seed) {
      CheckExperts(type, seed);
      if (HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace lorikeet
