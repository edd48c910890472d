// A random adapter with any of the parts that there are, for a model of one layer.
#pragma once

#include <algorithm>
#include <list>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/base/dtype.h"
#include "tests/support/random_adapter.h"

namespace lorikeet {

struct PartsModel {
  int32_t hidden, heads, kv_heads, head_dim, vocab;

  int32_t q_width() const { return heads * head_dim; }
  int32_t kv_width() const { return kv_heads * head_dim; }
  std::vector<int32_t> outs() const { return {q_width(), kv_width(), kv_width()}; }
};

// Matrices hold values of `dtype`, so that a device that keeps them in it loses nothing.
class RandomParts {
 public:
  RandomParts(const PartsModel& model, DType dtype, std::mt19937& rng)
      : model_(model), dtype_(dtype), rng_(rng) {
    adapter = std::make_shared<Adapter>();
    adapter->modules.resize(ModuleCount(1));
    for (int m = 0; m < 3; ++m) FillModule(model.outs()[m], &adapter->modules[m]);
    if (Maybe()) FillEmbedding();
    if (Maybe()) {
      for (int i = 0; i <= FinalNorm(1); ++i) {
        adapter->norms.push_back(Maybe() ? Vector(model.hidden) : nullptr);
      }
    }
    if (Maybe()) {
      const int32_t count = 1 + rng() % 20;
      const bool rows = Maybe();
      adapter->virtual_tokens = {count, rows ? Matrix(count, model.hidden) : nullptr,
                                 rows ? nullptr : Matrix(2 * count, model.kv_width())};
    }
    if (Maybe()) {
      const int32_t count = 1 + rng() % 20;
      adapter->prompt_attention.push_back({count, 0.5f, Matrix(count, model.kv_width()),
                                           Matrix(count, model.kv_width())});
    }
    if (Maybe()) {
      adapter->bottlenecks.resize(2);
      FillBottleneck(&adapter->bottlenecks[0]);
      if (Maybe()) FillBottleneck(&adapter->bottlenecks[1]);
    }
  }

  std::shared_ptr<Adapter> adapter;

 private:
  bool Maybe() { return rng_() % 2 == 0; }

  // Sums of `terms` of them are about 1.
  const float* Matrix(int64_t rows, int64_t width, int64_t terms = 1) {
    std::vector<float>& values = floats_.emplace_back(RandomFloats(rows * width, rng_));
    for (float& v : values) {
      v /= std::sqrt(static_cast<float>(terms));
      if (dtype_ == DType::kBF16) v = BF16ToFloat(FloatToBF16(v));
      if (dtype_ == DType::kF16) v = F16ToFloat(FloatToF16(v));
    }
    return values.data();
  }
  const std::byte* Bytes(int64_t rows, int64_t width, int64_t terms = 1) {
    return reinterpret_cast<const std::byte*>(Matrix(rows, width, terms));
  }
  const float* Vector(int64_t width) { return floats_.emplace_back(RandomFloats(width, rng_)).data(); }

  // A divisor of n, at random, of at most `most`.
  int32_t Divisor(int32_t n, int32_t most = INT32_MAX) {
    int32_t divisor = 1 + rng_() % std::min(n, most);
    while (n % divisor != 0) --divisor;
    return divisor;
  }

  ReplacedRows Replaced(int32_t of, int32_t width) {
    ReplacedRows out;
    const int32_t count = 1 + rng_() % of;
    out.rows = {DType::kF32, count, Bytes(count, width, width)};
    if (Maybe()) return out;
    std::vector<int32_t>& ids = ints_.emplace_back(of);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), rng_);
    std::sort(ids.begin(), ids.begin() + count);
    out.index = ids.data();
    return out;
  }

  void FillSparse(int32_t out, SparseDelta* sparse) {
    std::vector<int32_t>& begin = ints_.emplace_back(1, 0);
    for (int32_t o = 0; o < out; ++o) begin.push_back(begin.back() + rng_() % 50);
    std::vector<int32_t>& columns = ints_.emplace_back(begin.back());
    for (int32_t& column : columns) column = rng_() % model_.hidden;
    *sparse = {begin.data(), columns.data(), Matrix(begin.back(), 1, 25)};
  }

  void FillModule(int32_t out, ModuleDelta* delta) {
    const int32_t in = model_.hidden;
    if (Maybe()) {
      const int32_t rank = 1 + rng_() % 20;
      delta->low_rank = {rank, DType::kF32, 1.0f, Bytes(rank, in, in), Bytes(rank, out, rank), in, out};
      PadFactors(in, out, &delta->low_rank);
    }
    if (Maybe()) delta->out_scale = Vector(out);
    if (Maybe()) delta->bias = Vector(out);
    if (Maybe()) {
      const int32_t block = Divisor(in, 512);  // of wide inputs no matrix as wide
      delta->input_rotation = {block, Matrix(in, block, block)};
    }
    if (Maybe()) {
      const int32_t half = Divisor(out / 2);
      delta->output_rotation = {Vector(out), Maybe() ? Vector(out) : nullptr, half};
    }
    if (Maybe()) {
      const int32_t in1 = Divisor(in), out1 = Divisor(out), in2 = in / in1, out2 = out / out1;
      delta->kronecker = {in1, in2, out1, out2, Matrix(out1, in1, in1), Matrix(out2, in2, in2)};
    }
    if (Maybe()) {
      const int32_t block = Divisor(std::gcd(in, out));
      delta->circulant = {block, Matrix(out / block * (in / block), block, in)};
    }
    if (Maybe()) FillSparse(out, &delta->sparse);
    if (Maybe()) delta->dense = {DType::kF32, out, Bytes(out, in, in)};
    if (Maybe()) delta->rows = Replaced(out, in);
  }

  // Rows of factors start 64-byte aligned and may be read to the end of a vector.
  void PadFactors(int32_t in, int32_t out, LowRank* pair) {
    const auto pad = [&](const std::byte* from, int32_t width, int64_t* stride) {
      *stride = RandomAdapter::Stride(width);
      AlignedBuffer& buffer = buffers_.emplace_back(pair->rank * *stride * sizeof(float));
      for (int32_t k = 0; k < pair->rank; ++k) {
        std::copy_n(reinterpret_cast<const float*>(from) + int64_t{k} * width, width,
                    buffer.as<float>() + k * *stride);
      }
      return buffer.data();
    };
    pair->a = pad(pair->a, in, &pair->a_stride);
    pair->b = pad(pair->b, out, &pair->b_stride);
  }

  void FillEmbedding() {
    EmbeddingDelta& delta = adapter->embedding;
    if (Maybe()) {
      const int32_t rank = 1 + rng_() % 9;
      delta.low_rank = {rank, DType::kF32, 0.5f, Bytes(rank, model_.vocab), Bytes(rank, model_.hidden),
                        model_.vocab, model_.hidden};
    }
    if (Maybe()) delta.out_scale = Vector(model_.hidden);
    if (Maybe()) delta.rows = Replaced(model_.vocab, model_.hidden);
  }

  void FillBottleneck(Bottleneck* b) {
    b->width = 1 + rng_() % model_.hidden;
    b->input = static_cast<Bottleneck::Input>(rng_() % 3);
    b->activation = static_cast<Activation>(rng_() % 7);
    b->scale = 0.5f;
    b->down = Matrix(b->width, model_.hidden, model_.hidden);
    b->down_bias = Vector(b->width);
    b->up = Matrix(model_.hidden, b->width, b->width);
    b->up_bias = Vector(model_.hidden);
  }

  const PartsModel model_;
  const DType dtype_;
  std::mt19937& rng_;
  std::list<std::vector<float>> floats_;
  std::list<std::vector<int32_t>> ints_;
  std::list<AlignedBuffer> buffers_;
};

}  // namespace lorikeet
