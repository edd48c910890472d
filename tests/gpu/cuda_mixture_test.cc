// Adapters that deal tokens out among LoRAs of an MLP: the CUDA backend against the CPU's float32, with random
// shapes, segments and ranks, and more rows than are computed at a time.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <memory>
#include <random>
#include <vector>

#include "tests/gpu/device_rows.h"
#include "tests/support/load_images.h"
#include "tests/support/random_adapter.h"

namespace lorikeet {
namespace {

// One layer's MLP and a step with rows of several adapters, some without a mixture.
class Mixtures {
 public:
  Mixtures(const TypeCase& type, uint32_t seed)
      : type_(type), rng_(seed), hidden_(8 * (1 + Below(40))), ffn_(8 * (1 + Below(60))), rows_(1 + Below(700)) {
    cuda_ = CudaBackendFor(type);
    auto cpu = MakeCpuBackend({.precision = Precision::kExact, .threads = 2, .max_rows = 2048});
    LK_CHECK_MSG(cpu.ok(), cpu.status().ToString());
    cpu_ = *std::move(cpu);
    for (const int32_t out : {ffn_, ffn_}) views_.push_back(Weight(out, hidden_));
    views_.push_back(Weight(hidden_, ffn_));
    for (int i = 0; i < 4; ++i) adapters_.push_back(MakeAdapter(i > 0));
    for (int32_t r = Below(3); r < rows_;) {
      const int32_t end = std::min(rows_, r + 1 + Below(200));
      segments_.push_back({r, end, adapters_[Below(4)].get()});
      r = end + Below(2);
    }
  }

  void Check() {
    std::vector<float> x = RandomFloats(int64_t{rows_} * hidden_, rng_), before = x;
    for (float& v : x) v /= 32;
    RoundTo(type_.dtype, &x);
    RoundTo(type_.dtype, &before);
    std::vector<float> expected = before;
    Run(cpu_.get(), [&](int32_t, const Expert& mlp) {
      cpu_->MlpMixtures({mlp, {x.data(), rows_, hidden_}, {expected.data(), rows_, hidden_}, 0});
    });
    std::vector<float> found;
    Run(cuda_.get(), [&](int32_t rows, const Expert& mlp) {
      DeviceRows from(cuda_.get(), rows, hidden_, type_.dtype), to(cuda_.get(), rows, hidden_, type_.dtype);
      x.resize(int64_t{rows} * hidden_, NAN);
      before.resize(int64_t{rows} * hidden_, NAN);
      from.Write(x);
      to.Write(before);
      cuda_->MlpMixtures({mlp, from.matrix, to.matrix, 0});
      found = to.Read();
    });
    ASSERT_TRUE(cuda_->status().ok()) << cuda_->status();
    std::vector<bool> mixed(rows_);
    for (const AdapterSegment& s : segments_) {
      const bool has = !s.adapter->mlp_mixture.experts.empty();
      std::fill(mixed.begin() + s.row_begin, mixed.begin() + s.row_end, has);
    }
    for (int32_t r = 0; r < rows_; ++r) {
      double largest = 0;
      for (int32_t c = 0; c < hidden_; ++c) largest = std::max(largest, double{std::abs(expected[At(r, c)])});
      // Rounded to the type: the ranks of both pairs, gate, up, their product, y and the sum, each about as large
      // as what it adds to at most.
      const double tolerance = mixed[r] ? (32 * type_.step + 0x1p-18) * largest : 0;
      for (int32_t c = 0; c < hidden_; ++c) {
        ASSERT_NEAR(found[At(r, c)], expected[At(r, c)], tolerance)
            << Info(type_.dtype).name << " row " << r << " of " << rows_ << " column " << c << " hidden " << hidden_
            << " ffn " << ffn_;
      }
    }
  }

 private:
  int32_t Below(int32_t n) { return static_cast<int32_t>(rng_() % n); }
  size_t At(int32_t row, int32_t column) const { return int64_t{row} * hidden_ + column; }

  TensorView Weight(int32_t rows, int32_t width) {
    std::vector<float> values = RandomFloats(int64_t{rows} * width, rng_);
    for (float& v : values) v /= std::sqrt(static_cast<float>(width));
    stored_.push_back(Encode(type_.dtype, values));
    return {type_.dtype, {rows, width}, stored_.back()};
  }

  // Pairs and some output scales and biases on the MLP's linears.
  std::shared_ptr<const Adapter> MakeLora() {
    const RandomAdapter& inner = pairs_.emplace_back(hidden_, std::vector{ffn_, ffn_}, type_.dtype, 20, rng_);
    const RandomAdapter& outer = pairs_.emplace_back(ffn_, std::vector{hidden_}, type_.dtype, 20, rng_);
    auto lora = std::make_shared<Adapter>();
    lora->modules.resize(ModuleCount(1));
    lora->modules[LayerModule(0, Linear::kGate)] = inner.adapter.modules[0];
    lora->modules[LayerModule(0, Linear::kUp)] = inner.adapter.modules[1];
    lora->modules[LayerModule(0, Linear::kDown)] = outer.adapter.modules[0];
    lora->max_rank = std::max(inner.adapter.max_rank, outer.adapter.max_rank);
    for (ModuleDelta& delta : lora->modules) delta.low_rank.scale /= 32;  // about what the weights make
    return lora;
  }

  std::shared_ptr<const Adapter> MakeAdapter(bool mixes) {
    auto adapter = std::make_shared<Adapter>();
    adapter->modules.resize(ModuleCount(1));
    if (!mixes) return adapter;
    MlpMixture& mixture = adapter->mlp_mixture;
    const int32_t experts = 1 + Below(8);
    mixture.chosen = 1 + Below(std::min(experts, 4));
    for (int32_t e = 0; e < experts; ++e) mixture.experts.push_back(MakeLora());
    std::vector<float>& router = mixture.routers.emplace_back(RandomFloats(int64_t{experts} * hidden_, rng_));
    for (float& v : router) v = std::clamp(std::round(v * 16) / 16, -4.0f, 4.0f);  // as any type has it
    return adapter;
  }

  // run(rows to compute, MLP) in a step of the backend's own.
  template <typename Fn>
  void Run(Backend* backend, const Fn& run) {
    const LinearSource inner[] = {{&views_[0]}, {&views_[1]}}, outer[] = {{&views_[2]}};
    const auto gate_up = backend->LoadLinear(LayerModule(0, Linear::kGate), inner);
    const auto down = backend->LoadLinear(LayerModule(0, Linear::kDown), outer);
    backend->LoadLinear(LayerModule(0, Linear::kQ), inner);  // whose width is the model's
    if (backend->images() != nullptr) {
      backend->AllocatePages(KvLayout::Make(1, 2, 64, type_.dtype), 128 << 20);
      LoadImages(backend->images(), adapters_, 0);
    }
    const std::vector<int32_t> tokens(rows_), positions(rows_), begin = {0, rows_}, page_begin = {0, 0};
    const int32_t rows = backend->BeginStep({.tokens = tokens,
                                             .positions = positions,
                                             .sequence_begin = begin,
                                             .page_begin = page_begin,
                                             .segments = segments_});
    run(rows, Expert{gate_up.get(), down.get()});
  }

  const TypeCase type_;
  std::mt19937 rng_;
  const int32_t hidden_, ffn_, rows_;
  std::unique_ptr<Backend> cpu_, cuda_;
  std::list<std::vector<std::byte>> stored_;
  std::vector<TensorView> views_;
  std::list<RandomAdapter> pairs_;
  std::vector<std::shared_ptr<const Adapter>> adapters_;
  std::vector<AdapterSegment> segments_;
};

TEST(CudaMixtures, RowsAreWhatTheCpuMakesOfThem) {
  for (const TypeCase& type : kTypes) {
    for (uint32_t seed = 0; seed < 12; ++seed) {
      SCOPED_TRACE(seed);
      Mixtures(type, seed).Check();
      if (HasFatalFailure()) break;
    }
  }
}

}  // namespace
}  // namespace lorikeet
