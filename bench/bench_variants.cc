// What adapters of other kinds than low rank cost on a GPU: decoding steps of Llama-3.1-8B's shapes,
// eight rows at 512 tokens, random weights. Prints the device bytes of an adapter, the time of a step
// in which one row's is of that kind beside seven of rank 16, of one in which all eight rows share it,
// and both over the step of eight of rank 16.
//   bench_variants
#include <cstdio>
#include <functional>
#include <memory>
#include <vector>

#include "bench/device.h"
#include "bench/model_steps.h"
#include "bench/synthetic.h"
#include "engine/base/check.h"
#include "tests/support/load_images.h"

namespace lorikeet::bench {
namespace {

constexpr int32_t kRows = 8, kContext = 512, kRank = 16, kNonzerosPerRow = 64;
constexpr int64_t kKvBytes = int64_t{4} << 30, kImageBytes = int64_t{24} << 30;

// Adapters whose parts all read one block of host memory.
class Maker {
 public:
  explicit Maker(const ModelSource& model)
      : model_(model),
        config_(model.config()),
        block_(2 * int64_t{config_.vocab} * config_.hidden),
        sparse_begin_(config_.ffn + 1),
        columns_(kNonzerosPerRow * config_.ffn) {
    for (size_t i = 0; i < block_.size() / 2; ++i) block_.as<uint16_t>()[i] = 0x3c00 + i % 251;
    for (size_t o = 0; o < sparse_begin_.size(); ++o) {
      sparse_begin_[o] = kNonzerosPerRow * static_cast<int32_t>(o);
    }
    for (size_t e = 0; e < columns_.size(); ++e) columns_[e] = static_cast<int32_t>(e) % config_.hidden;
  }

  using Fill = std::function<void(Linear linear, int32_t in, int32_t out, ModuleDelta* delta)>;

  std::shared_ptr<Adapter> Empty() const {
    auto adapter = std::make_shared<Adapter>();
    adapter->modules.resize(ModuleCount(config_.layers));
    return adapter;
  }
  // The same for the linears of every layer.
  std::shared_ptr<Adapter> Linears(const Fill& fill) const {
    std::shared_ptr<Adapter> adapter = Empty();
    for (ModuleId m = 0; m < HeadModule(config_.layers); ++m) {
      const TensorView& weight = model_.weight(m);
      fill(static_cast<Linear>(m % kLinearsPerLayer), static_cast<int32_t>(weight.row_elements()),
           static_cast<int32_t>(weight.rows()), &adapter->modules[m]);
    }
    return adapter;
  }

  const std::byte* bytes() const { return block_.data(); }
  const float* floats() const { return block_.as<float>(); }
  SparseDelta sparse() const { return {sparse_begin_.data(), columns_.data(), floats()}; }
  const int32_t* ids() const { return columns_.data(); }  // 0, 1, ... hidden - 1

 private:
  const ModelSource& model_;
  const ModelConfig& config_;
  AlignedBuffer block_;
  std::vector<int32_t> sparse_begin_, columns_;
};

struct Variant {
  const char* name;
  std::shared_ptr<const Adapter> adapter;
};

std::vector<Variant> OfLinears(const Maker& maker) {
  const auto low_rank = [&](int32_t in, int32_t out) {
    return LowRank{kRank, DType::kBF16, 1.0f, maker.bytes(), maker.bytes(), in, out};
  };
  return {
      {"DoRA, rank 16", maker.Linears([&](Linear, int32_t in, int32_t out, ModuleDelta* d) {
         d->low_rank = low_rank(in, out);
         d->out_scale = maker.floats();
       })},
      {"IA3", maker.Linears([&](Linear linear, int32_t, int32_t, ModuleDelta* d) {
         if (linear == Linear::kK || linear == Linear::kV) d->output_rotation.scale = maker.floats();
         if (linear == Linear::kDown) d->input_rotation = {1, maker.floats()};
       })},
      {"OFT, blocks of 32", maker.Linears([&](Linear, int32_t, int32_t, ModuleDelta* d) {
         d->input_rotation = {32, maker.floats()};
       })},
      {"RoAd", maker.Linears([&](Linear, int32_t, int32_t out, ModuleDelta* d) {
         d->output_rotation = {maker.floats(), maker.floats(), out / 2};
       })},
      {"LoKr, 64 x 64", maker.Linears([&](Linear, int32_t in, int32_t out, ModuleDelta* d) {
         d->kronecker = {64, in / 64, 64, out / 64, maker.floats(), maker.floats()};
       })},
      {"C3A, blocks of 256", maker.Linears([&](Linear, int32_t, int32_t, ModuleDelta* d) {
         d->circulant = {256, maker.floats()};
       })},
      {"SHiRA, 64 a row", maker.Linears([&](Linear, int32_t, int32_t, ModuleDelta* d) {
         d->sparse = maker.sparse();
       })},
      {"dense, q and v", maker.Linears([&](Linear linear, int32_t, int32_t out, ModuleDelta* d) {
         if (linear == Linear::kQ || linear == Linear::kV) d->dense = {DType::kBF16, out, maker.bytes()};
       })},
  };
}

std::vector<Variant> OfTheModel(const Maker& maker, const ModelConfig& config) {
  const auto made = [&](const std::function<void(Adapter*)>& fill) {
    std::shared_ptr<Adapter> adapter = maker.Empty();
    fill(adapter.get());
    return adapter;
  };
  const Bottleneck bottleneck{256, Bottleneck::Input::kOutput, Activation::kRelu, 1,
                              maker.floats(), maker.floats(), maker.floats(), maker.floats()};
  return {
      {"head of its own", made([&](Adapter* a) {
         a->modules.back().rows.rows = {DType::kBF16, config.vocab, maker.bytes()};
       })},
      {"1000 embedding rows", made([&](Adapter* a) {
         a->embedding.rows = {{DType::kBF16, 1000, maker.bytes()}, maker.ids()};
       })},
      {"norms", made([&](Adapter* a) {
         a->norms.assign(FinalNorm(config.layers) + 1, maker.floats());
       })},
      {"prefix of 64", made([&](Adapter* a) { a->virtual_tokens = {64, nullptr, maker.floats()}; })},
      {"adaption prompt of 10", made([&](Adapter* a) {
         a->prompt_attention.assign(config.layers, {10, 0.5f, maker.floats(), maker.floats()});
       })},
      {"Houlsby, 256 wide", made([&](Adapter* a) {
         a->bottlenecks.assign(2 * config.layers, bottleneck);
       })},
  };
}

int Run() {
  const auto source = std::make_shared<SyntheticModel>(Llama8B());
  const ModelConfig& config = source->config();
  auto backend = MakeCudaBackend({.max_rows = 256});
  LK_CHECK_MSG(backend.ok(), backend.status().ToString());
  auto model = Model::Load(source, backend->get(), 256);
  LK_CHECK_MSG(model.ok(), model.status().ToString());
  const KvLayout layout =
      KvLayout::Make(config.layers, config.kv_heads, config.head_dim, (*backend)->kv_dtype());
  (*backend)->AllocatePages(layout, kKvBytes + kImageBytes);
  const int32_t first_image = static_cast<int32_t>(kKvBytes / layout.page_bytes());

  const Maker maker(*source);
  std::vector<Variant> variants = OfLinears(maker);
  for (Variant& variant : OfTheModel(maker, config)) variants.push_back(std::move(variant));

  ModelSteps steps(backend->get(), model->get(), layout, first_image);
  auto used = SyntheticAdapters(*source, kRows, {kRank});
  int32_t next = LoadImages((*backend)->images(), used, first_image);
  const double plain_ms = steps.Measure(kRows, kContext, 1, used) * 1e3;
  std::printf("%s: %d rows of rank %d %.3f ms\n", DeviceName().c_str(), kRows, kRank, plain_ms);
  std::printf("%-22s %9s %9s %9s %9s %9s\n", "adapter", "MB", "one, ms", "over", "all, ms", "over");
  for (const Variant& variant : variants) {
    const int32_t end = LoadImages((*backend)->images(), {&variant.adapter, 1}, next);
    const double mb = static_cast<double>((end - next) * layout.page_bytes()) * 1e-6;
    next = end;
    used[kRows / 2] = variant.adapter;
    const double one_ms = steps.Measure(kRows, kContext, 1, used) * 1e3;
    const double all_ms = steps.Measure(kRows, kContext, 1, {variant.adapter}) * 1e3;
    std::printf("%-22s %9.1f %9.3f %9.3f %9.3f %9.3f\n", variant.name, mb, one_ms, one_ms - plain_ms,
                all_ms, all_ms - plain_ms);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main() { return lorikeet::bench::Run(); }
