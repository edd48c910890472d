// Layers with experts on the CPU backend against their definition (ExpertsArgs), in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "engine/kernels/backend.h"
#include "tests/support/random_adapter.h"

namespace lorikeet {
namespace {

// Of equal widths, so that one RandomAdapter has all their linears: gate, up, down of each expert.
struct RandomExperts {
  int32_t width, count, chosen;
  bool normalise;
  std::vector<std::vector<float>> weights;  // [3 * count] of [width, width]
  std::vector<TensorView> views;
  std::vector<std::unique_ptr<LinearWeight>> linears;
  std::vector<Expert> experts;

  RandomExperts(Backend* backend, std::mt19937& rng)
      : width(8 * (1 + rng() % 4)), count(1 + rng() % 7), chosen(1 + rng() % count), normalise(rng() % 2) {
    for (int32_t m = 0; m < 3 * count; ++m) weights.push_back(RandomFloats(int64_t{width} * width, rng));
    for (const auto& w : weights) {
      views.push_back({DType::kF32, {width, width}, std::as_bytes(std::span(w))});
    }
    for (int32_t e = 0; e < count; ++e) {
      const LinearSource sources[] = {{&views[3 * e]}, {&views[3 * e + 1]}, {&views[3 * e + 2]}};
      linears.push_back(backend->LoadLinear(3 * e, std::span(sources).first(2)));
      linears.push_back(backend->LoadLinear(3 * e + 2, std::span(sources).subspan(2)));
      experts.push_back({linears[2 * e].get(), linears[2 * e + 1].get()});
    }
  }

  // One row's sum over its experts.
  std::vector<double> Reference(const float* x, const float* scores, const RandomAdapter* adapter) const {
    std::vector<int32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
    double total = 0;
    for (int32_t i = 0; i < (normalise ? chosen : count); ++i) total += std::exp(double{scores[order[i]]});
    std::vector<double> out(width), gate, up, down, unused;
    for (int32_t i = 0; i < chosen; ++i) {
      const int32_t e = order[i];
      ReferenceRow(x, width, width, weights[3 * e], {}, adapter, 3 * e, &gate, &unused);
      ReferenceRow(x, width, width, weights[3 * e + 1], {}, adapter, 3 * e + 1, &up, &unused);
      std::vector<float> gated(width);
      for (int32_t c = 0; c < width; ++c) {
        gated[c] = static_cast<float>(gate[c] / (1 + std::exp(-gate[c])) * up[c]);
      }
      ReferenceRow(gated.data(), width, width, weights[3 * e + 2], {}, adapter, 3 * e + 2, &down, &unused);
      for (int32_t c = 0; c < width; ++c) out[c] += std::exp(double{scores[e]}) / total * down[c];
    }
    return out;
  }
};

// Rows of several adapters and of none, in one step, as each row alone and as the definition has it.
TEST(Experts, RowsOfAnyAdapterMatchTheDefinition) {
  for (uint32_t seed = 0; seed < 40; ++seed) {
    std::mt19937 rng(seed);
    auto made = MakeCpuBackend({.precision = Precision::kExact, .threads = 2, .experts = {1, 7}, .max_rows = 64});
    ASSERT_TRUE(made.ok()) << made.status();
    Backend* backend = made->get();
    const RandomExperts layer(backend, rng);
    const int32_t rows = 1 + rng() % 30, width = layer.width;
    std::vector<std::unique_ptr<RandomAdapter>> adapters;
    std::vector<AdapterSegment> segments;
    std::vector<const RandomAdapter*> of_row(rows);
    for (int32_t r = rng() % 3; r < rows;) {
      adapters.push_back(std::make_unique<RandomAdapter>(
          width, std::vector<int32_t>(3 * layer.count, width), DType::kF32, 5, rng));
      const int32_t end = std::min<int32_t>(rows, r + 1 + rng() % 6);
      segments.push_back({r, end, &adapters.back()->adapter});
      std::fill(of_row.begin() + r, of_row.begin() + end, adapters.back().get());
      r = end + rng() % 3;
    }
    std::vector<float> x = RandomFloats(int64_t{rows} * width, rng);
    std::vector<float> scores = RandomFloats(int64_t{rows} * layer.count, rng);
    for (float& score : scores) score = std::round(score);  // equal ones go to the first
    std::vector<float> out = Poisoned(x.size()), alone = Poisoned(width);
    const std::vector<int32_t> tokens(rows);
    const auto run = [&](int32_t row, int32_t count, float* to) {
      backend->Experts({.experts = layer.experts,
                        .scores = {&scores[row * layer.count], count, layer.count},
                        .chosen = layer.chosen, .normalise = layer.normalise,
                        .x = {&x[row * width], count, width}, .out = {to, count, width}});
    };
    backend->BeginStep({.tokens = tokens, .segments = segments});
    run(0, rows, out.data());
    for (int32_t r = 0; r < rows; ++r) {
      const std::vector<double> expected =
          layer.Reference(&x[r * width], &scores[r * layer.count], of_row[r]);
      const AdapterSegment own{0, 1, of_row[r] ? &of_row[r]->adapter : nullptr};
      backend->BeginStep({.tokens = std::span(tokens).first(1), .segments = {&own, own.adapter ? 1u : 0u}});
      run(r, 1, alone.data());
      double top = 0;
      for (const double value : expected) top = std::max(top, std::abs(value));
      for (int32_t c = 0; c < width; ++c) {
        // Three products, each with terms that may be larger than what they come to.
        ASSERT_NEAR(out[r * width + c], expected[c], 1e-5 * (1 + top)) << "seed " << seed << " row " << r;
        ASSERT_NEAR(out[r * width + c], alone[c], 1e-5 * (1 + top)) << "seed " << seed << " row " << r;
      }
    }
  }
}

}  // namespace
}  // namespace lorikeet
