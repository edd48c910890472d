#include "engine/kernels/cpu/structured.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "engine/api/limits.h"
#include "engine/base/dot.h"
#include "engine/kernels/cpu/widen.h"

namespace lorikeet {
namespace {

void AddKronecker(const KroneckerDelta& delta, const float* x, float* s) {
  // t = X w2ᵀ: [in1, out2], then s = w1 t.
  std::vector<float> t(int64_t{delta.in1} * delta.out2);
  for (int32_t p = 0; p < delta.in1; ++p) {
    for (int32_t q = 0; q < delta.out2; ++q) {
      t[int64_t{p} * delta.out2 + q] = Dot(x + int64_t{p} * delta.in2,
                                           delta.w2 + int64_t{q} * delta.in2, delta.in2);
    }
  }
  for (int32_t o = 0; o < delta.out1; ++o) {
    float* row = s + int64_t{o} * delta.out2;
    for (int32_t p = 0; p < delta.in1; ++p) {
      const float w = delta.w1[int64_t{o} * delta.in1 + p];
      for (int32_t q = 0; q < delta.out2; ++q) row[q] += w * t[int64_t{p} * delta.out2 + q];
    }
  }
}

void AddCirculant(const CirculantDelta& delta, const float* x, int32_t in, int32_t out, float* s) {
  const int32_t b = delta.block;
  const int32_t blocks = in / b;
  std::vector<float> twice(2 * int64_t{in});  // every block followed by itself
  for (int32_t n = 0; n < blocks; ++n) {
    std::copy_n(x + n * b, b, &twice[2 * int64_t{n} * b]);
    std::copy_n(x + n * b, b, &twice[2 * int64_t{n} * b + b]);
  }
  for (int32_t o = 0; o < out; ++o) {
    const float* kernel = delta.kernel + int64_t{o / b} * blocks * b;
    for (int32_t n = 0; n < blocks; ++n) {
      s[o] += Dot(kernel + int64_t{n} * b, &twice[2 * int64_t{n} * b + o % b], b);
    }
  }
}

void AddSparse(const SparseDelta& delta, const float* x, int32_t out, float* s) {
  for (int32_t o = 0; o < out; ++o) {
    for (int32_t e = delta.row_begin[o]; e < delta.row_begin[o + 1]; ++e) {
      s[o] += delta.value[e] * x[delta.column[e]];
    }
  }
}

float Activate(Activation activation, float z) {
  switch (activation) {
    case Activation::kSilu: return z / (1 + std::exp(-z));
    case Activation::kRelu: return std::max(z, 0.0f);
    case Activation::kGelu: return 0.5f * z * (1 + std::erf(z * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * z * (1 + std::tanh(0.79788456f * (z + 0.044715f * z * z * z)));
    case Activation::kTanh: return std::tanh(z);
    case Activation::kSigmoid: return 1 / (1 + std::exp(-z));
    case Activation::kIdentity: return z;
  }
  return z;
}

}  // namespace

void RotateInput(const InputRotation& rotation, const float* x, int32_t in, float* out) {
  const int32_t b = rotation.block;
  std::fill_n(out, in, 0.0f);
  for (int32_t first = 0; first < in; first += b) {
    const float* r = rotation.r + int64_t{first} * b;
    for (int32_t i = 0; i < b; ++i) {
      for (int32_t j = 0; j < b; ++j) out[first + j] += x[first + i] * r[int64_t{i} * b + j];
    }
  }
}

void AddStructured(const ModuleDelta& delta, const float* x, int32_t in, int32_t out, float* y) {
  std::vector<float> s(out);
  if (delta.kronecker.w1) AddKronecker(delta.kronecker, x, s.data());
  if (delta.circulant.block) AddCirculant(delta.circulant, x, in, out, s.data());
  if (delta.sparse.row_begin) AddSparse(delta.sparse, x, out, s.data());
  if (delta.dense.data) {
    std::vector<float> row(in);
    for (int32_t o = 0; o < out; ++o) {
      ReadDenseRow(delta.dense, o, in, row.data());
      s[o] += Dot(row.data(), x, in);
    }
  }
  for (int32_t o = 0; o < out; ++o) y[o] += (delta.out_scale ? delta.out_scale[o] : 1) * s[o];
}

void RotateOutput(const OutputRotation& rotation, int32_t out, float* y) {
  if (!rotation.cross) {
    for (int32_t o = 0; o < out; ++o) y[o] *= rotation.scale[o];
    return;
  }
  const int32_t half = rotation.half;
  for (int32_t group = 0; group < out; group += 2 * half) {
    for (int32_t a = group, b = group + half; a < group + half; ++a, ++b) {
      const float first = y[a];
      y[a] = rotation.scale[a] * first - rotation.cross[a] * y[b];
      y[b] = rotation.scale[b] * y[b] + rotation.cross[b] * first;
    }
  }
}

void ReplaceOutputs(const ReplacedRows& rows, const float* x, int32_t in, float* y) {
  std::vector<float> row(in);
  for (int32_t k = 0; k < rows.rows.rows; ++k) {
    ReadDenseRow(rows.rows, k, in, row.data());
    y[rows.index ? rows.index[k] : k] = Dot(row.data(), x, in);
  }
}

void ReadDenseRow(const DenseRows& rows, int32_t k, int32_t width, float* out) {
  Widen(rows.dtype, rows.data + ByteSize(rows.dtype, int64_t{k} * width), width, out);
}

int32_t FindReplaced(const ReplacedRows& rows, int32_t id) {
  if (!rows.rows.data) return -1;
  if (!rows.index) return id < rows.rows.rows ? id : -1;
  const int32_t* end = rows.index + rows.rows.rows;
  const int32_t* at = std::lower_bound(rows.index, end, id);
  return at != end && *at == id ? static_cast<int32_t>(at - rows.index) : -1;
}

void AddBottleneck(const Bottleneck& bottleneck, const float* r, int32_t width, float* h) {
  std::vector<float> z(h, h + width);
  if (bottleneck.input == Bottleneck::Input::kResidual) std::copy_n(r, width, z.begin());
  if (bottleneck.input == Bottleneck::Input::kSum) {
    for (int32_t i = 0; i < width; ++i) z[i] += r[i];
  }
  std::vector<float> inner(bottleneck.width);
  for (int32_t m = 0; m < bottleneck.width; ++m) {
    const float sum = Dot(bottleneck.down + int64_t{m} * width, z.data(), width);
    inner[m] = Activate(bottleneck.activation, sum + bottleneck.down_bias[m]);
  }
  for (int32_t i = 0; i < width; ++i) {
    const float* up = bottleneck.up + int64_t{i} * bottleneck.width;
    h[i] += bottleneck.scale * (Dot(up, inner.data(), bottleneck.width) + bottleneck.up_bias[i]);
  }
}

void AddPromptAttention(const PromptAttention& prompt, const float* q, int32_t heads,
                        int32_t kv_heads, int32_t head_dim, float scale, float* out) {
  std::vector<float> scores(prompt.count);
  for (int32_t h = 0; h < heads; ++h) {
    const int64_t at = int64_t{h / (heads / kv_heads)} * head_dim;
    float top = -INFINITY;
    for (int32_t t = 0; t < prompt.count; ++t) {
      const float* k = prompt.k + int64_t{t} * kv_heads * head_dim + at;
      scores[t] = scale * Dot(q + int64_t{h} * head_dim, k, head_dim);
      top = std::max(top, scores[t]);
    }
    float total = 0;
    for (float& score : scores) total += score = std::exp(score - top);
    for (int32_t t = 0; t < prompt.count; ++t) {
      const float* v = prompt.v + int64_t{t} * kv_heads * head_dim + at;
      const float weight = prompt.gate * scores[t] / total;
      for (int32_t d = 0; d < head_dim; ++d) out[int64_t{h} * head_dim + d] += weight * v[d];
    }
  }
}

void ShareByPrototypes(const PrototypeGates& gates, const float* prototypes, const float* x, int32_t in,
                       float* shares) {
  std::array<float, Limits::kMaxExperts> scores;
  std::array<int32_t, Limits::kMaxExperts> order;
  for (int32_t e = 0; e < gates.experts; ++e) {
    scores[e] = Dot(prototypes + int64_t{e} * in, x, in);
    if (gates.magnitudes) scores[e] = std::abs(scores[e]);
    shares[e] = 0;
  }
  const auto end = order.begin() + gates.experts;
  std::iota(order.begin(), end, 0);
  std::partial_sort(order.begin(), order.begin() + gates.chosen, end, [&scores](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  float sum = 0;
  for (int32_t i = 0; i < gates.chosen; ++i) {
    sum += shares[order[i]] = std::exp((scores[order[i]] - scores[order[0]]) / gates.temperature);
  }
  for (int32_t e = 0; e < gates.experts; ++e) shares[e] /= sum;
}

}  // namespace lorikeet
