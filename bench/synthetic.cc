#include "bench/synthetic.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <utility>

#include "engine/base/check.h"

namespace lorikeet::bench {
namespace {

// Small random bfloat16 values: activations neither vanish nor overflow over many layers.
void FillRandom(AlignedBuffer* memory, float scale) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0, scale);
  constexpr size_t kPeriod = 1 << 20;
  uint16_t* out = memory->as<uint16_t>();
  const size_t count = memory->size() / 2;
  for (size_t i = 0; i < std::min(count, kPeriod); ++i) out[i] = FloatToBF16(normal(rng));
  for (size_t i = kPeriod; i < count; i += kPeriod) {
    std::copy_n(out, std::min(kPeriod, count - i), out + i);
  }
}

ModelConfig Llama(int32_t layers, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t ffn,
                  int32_t vocab) {
  ModelConfig config;
  config.family = "llama";
  config.layers = layers;
  config.heads = heads;
  config.hidden = heads * head_dim;
  config.ffn = ffn;
  config.kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.vocab = vocab;
  config.context = 8192;
  const int32_t pairs = head_dim / 2;
  for (int i = 0; i < pairs; ++i) {
    config.rope_inverse_frequencies.push_back(
        std::pow(500000.0f, -static_cast<float>(i) / static_cast<float>(pairs)));
  }
  config.layer_uses_rope.assign(config.layers, 1);
  config.layer_uses_window.assign(config.layers, 0);
  return config;
}

// Whether an adapter on a layer's linears up to `last` has one at `module`.
bool HasPair(ModuleId module, Linear last) {
  return module % kLinearsPerLayer <= static_cast<int>(last);
}

}  // namespace

ModelConfig Llama8B() { return Llama(32, 32, 8, 128, 14336, 128256); }
ModelConfig Llama7B() { return Llama(32, 32, 32, 128, 11008, 32000); }
ModelConfig SmolLM2() { return Llama(30, 9, 3, 64, 1536, 49152); }

SyntheticModel::SyntheticModel(const ModelConfig& config) {
  config_ = config;
  const int64_t hidden = config.hidden, ffn = config.ffn;
  block_ = AlignedBuffer(2 * hidden * std::max<int64_t>(ffn, config.vocab));
  FillRandom(&block_, 0.02f);
  const int64_t q = int64_t{config.heads} * config.head_dim;
  const int64_t kv = int64_t{config.kv_heads} * config.head_dim;
  const TensorView* norm = View({hidden});
  for (int layer = 0; layer < config.layers; ++layer) {
    for (const auto& [out, in] : std::initializer_list<std::pair<int64_t, int64_t>>{
             {q, hidden}, {kv, hidden}, {kv, hidden}, {hidden, q}, {ffn, hidden}, {ffn, hidden},
             {hidden, ffn}}) {
      weights_.push_back(View({out, in}));
    }
    norms_.push_back({norm, norm, nullptr, nullptr});
  }
  weights_.push_back(View({config.vocab, hidden}));
  biases_.resize(weights_.size());
  embedding_ = View({config.vocab, hidden});
  final_norm_ = norm;
}

const TensorView* SyntheticModel::View(std::vector<int64_t> shape) {
  auto view = std::make_unique<TensorView>();
  view->dtype = DType::kBF16;
  view->shape = std::move(shape);
  view->bytes = std::span(block_.data(), ByteSize(DType::kBF16, view->elements()));
  views_.push_back(std::move(view));
  return views_.back().get();
}

int64_t AdapterBytes(const ModelSource& model, int32_t rank, Linear last) {
  int64_t values = 0;
  for (ModuleId m = 0; m < HeadModule(model.config().layers); ++m) {
    if (!HasPair(m, last)) continue;
    values += model.weight(m).rows() + model.weight(m).row_elements();
  }
  return 2 * rank * values;
}

std::vector<std::shared_ptr<const Adapter>> SyntheticAdapters(const ModelSource& model,
                                                              int32_t count,
                                                              const std::vector<int32_t>& ranks,
                                                              Linear last) {
  static std::map<std::pair<int32_t, Linear>, AlignedBuffer> blocks;  // as long as the program
  std::vector<std::shared_ptr<const Adapter>> adapters;
  const int modules = ModuleCount(model.config().layers);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t rank = ranks[i % ranks.size()];
    AlignedBuffer& block = blocks[{rank, last}];
    if (block.size() == 0) {
      block = AlignedBuffer(AdapterBytes(model, rank, last));
      FillRandom(&block, 0.01f);
    }
    auto adapter = std::make_shared<Adapter>();
    adapter->max_rank = rank;
    adapter->bytes = static_cast<int64_t>(block.size());
    adapter->modules.resize(modules);
    const std::byte* at = block.data();
    for (ModuleId m = 0; m + 1 < modules; ++m) {
      if (!HasPair(m, last)) continue;
      LowRank& pair = adapter->modules[m].low_rank;
      pair.rank = rank;
      pair.a_stride = model.weight(m).row_elements();
      pair.b_stride = model.weight(m).rows();
      pair.a = at;
      at += 2 * rank * pair.a_stride;
      pair.b = at;
      at += 2 * rank * pair.b_stride;
    }
    adapters.push_back(std::move(adapter));
  }
  return adapters;
}

}  // namespace lorikeet::bench
