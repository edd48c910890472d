#include "adapters_cache/merged_weights.h"

#include <algorithm>

#include "adapters_cache/low_rank_rows.h"
#include "engine/base/check.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

float Value(DType dtype, const std::byte* data, int64_t index) {
  float value;
  Dequantize(dtype, data + ByteSize(dtype, index), 1, &value);
  return value;
}

void ReadRow(const DenseRows& rows, int64_t k, int64_t width, float* out) {
  Dequantize(rows.dtype, rows.data + ByteSize(rows.dtype, k * width), width, out);
}

// Where `id` stands among replaced rows; -1: it is the base's.
int32_t FindRow(const ReplacedRows& rows, int32_t id) {
  if (rows.rows.data == nullptr) return -1;
  if (rows.index == nullptr) return id < rows.rows.rows ? id : -1;
  const int32_t* end = rows.index + rows.rows.rows;
  const int32_t* at = std::lower_bound(rows.index, end, id);
  return at != end && *at == id ? static_cast<int32_t>(at - rows.index) : -1;
}

// w becomes what x' w is of x, x'_k being x_k R_k.
void Rotate(const InputRotation& rotation, int32_t in, float* w) {
  const int64_t block = rotation.block;
  std::vector<float> turned(block);
  for (int64_t k = 0; k < in / block; ++k) {
    const float* r = rotation.r + k * block * block;
    float* part = w + k * block;
    for (int64_t i = 0; i < block; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < block; ++j) sum += double{r[i * block + j]} * part[j];
      turned[i] = static_cast<float>(sum);
    }
    std::ranges::copy(turned, part);
  }
}

}  // namespace

const char* Unmergeable(const Adapter& adapter) {
  if (adapter.gated()) return "gates per token";
  if (adapter.mlp_mixture.chosen > 0) return "routers over its LoRAs";
  if (adapter.virtual_tokens.count > 0) return "virtual tokens";
  if (!adapter.prompt_attention.empty()) return "attention to a prompt of its own";
  if (!adapter.bottlenecks.empty()) return "bottlenecks";
  if (!adapter.invocation_tokens.empty()) return "an invocation that switches it on";
  return nullptr;
}

MergedLinear::MergedLinear(const BaseModel& base, ModuleId id, const Adapter& adapter)
    : base_(base),
      id_(id),
      shape_(base.shape(id)),
      delta_(adapter.module(id)),
      rows_(id == HeadModule(base.layers()) && adapter.vocab > 0 ? adapter.vocab : shape_.out),
      bias_(shape_.out) {
  base.ReadBias(id, bias_.data());
  const LowRank& pair = delta_.low_rank;
  a_.resize(int64_t{pair.rank} * shape_.in);
  b_.resize(int64_t{pair.rank} * shape_.out);
  for (int32_t k = 0; k < pair.rank; ++k) {
    ReadA(pair, k, shape_.in, a_.data() + k * shape_.in);
    ReadB(pair, k, shape_.out, b_.data() + k * shape_.out);
  }
}

void MergedLinear::AddLowRank(int32_t o, float* weight) const {
  for (int64_t k = 0; k < delta_.low_rank.rank; ++k) {
    const float factor = b_[k * shape_.out + o];
    const float* a = a_.data() + k * shape_.in;
    for (int32_t i = 0; i < shape_.in; ++i) weight[i] += factor * a[i];
  }
}

void MergedLinear::AddStructured(int32_t o, float* weight) const {
  const KroneckerDelta& k = delta_.kronecker;
  for (int32_t i = 0; k.w1 && i < shape_.in; ++i) {
    weight[i] += k.w1[int64_t{o / k.out2} * k.in1 + i / k.in2] *
                 k.w2[int64_t{o % k.out2} * k.in2 + i % k.in2];
  }
  if (const int32_t b = delta_.circulant.block; b > 0) {
    const float* kernel = delta_.circulant.kernel + int64_t{o / b} * shape_.in;
    for (int32_t i = 0; i < shape_.in; ++i) {
      const int32_t j = (i % b - o % b + b) % b;
      weight[i] += kernel[i / b * b + j];
    }
  }
  const SparseDelta& sparse = delta_.sparse;
  for (int32_t e = sparse.row_begin ? sparse.row_begin[o] : 0;
       sparse.row_begin && e < sparse.row_begin[o + 1]; ++e) {
    weight[sparse.column[e]] += sparse.value[e];
  }
  if (delta_.dense.data == nullptr) return;
  std::vector<float> row(shape_.in);
  ReadRow(delta_.dense, o, shape_.in, row.data());
  for (int32_t i = 0; i < shape_.in; ++i) weight[i] += row[i];
}

// Before the output's rotation.
void MergedLinear::Unrotated(int32_t o, float* weight, float* bias) const {
  base_.ReadRows(id_, o, 1, weight);
  if (delta_.input_rotation.block) Rotate(delta_.input_rotation, shape_.in, weight);
  AddLowRank(o, weight);
  AddStructured(o, weight);
  for (int32_t i = 0; delta_.out_scale && i < shape_.in; ++i) weight[i] *= delta_.out_scale[o];
  *bias = bias_[o] + (delta_.bias ? delta_.bias[o] : 0);
}

void MergedLinear::Row(int32_t o, float* weight, float* bias) const {
  *bias = 0;
  if (const int32_t k = FindRow(delta_.rows, o); k >= 0) {
    return ReadRow(delta_.rows.rows, k, shape_.in, weight);
  }
  LK_CHECK(o < shape_.out);
  Unrotated(o, weight, bias);
  const OutputRotation& rotation = delta_.output_rotation;
  if (rotation.scale == nullptr) return;
  for (int32_t i = 0; i < shape_.in; ++i) weight[i] *= rotation.scale[o];
  *bias *= rotation.scale[o];
  if (rotation.cross == nullptr) return;
  // rot(y): the second half negated, then the first.
  const bool first = o % (2 * rotation.half) < rotation.half;
  std::vector<float> other(shape_.in);
  float other_bias;
  Unrotated(first ? o + rotation.half : o - rotation.half, other.data(), &other_bias);
  const float factor = first ? -rotation.cross[o] : rotation.cross[o];
  for (int32_t i = 0; i < shape_.in; ++i) weight[i] += factor * other[i];
  *bias += factor * other_bias;
}

void MergedEmbedding(const BaseModel& base, const Adapter& adapter, int32_t t, float* row) {
  const EmbeddingDelta& delta = adapter.embedding;
  const int32_t width = base.hidden();
  const int32_t own = FindRow(delta.rows, t);
  if (own >= 0) ReadRow(delta.rows.rows, own, width, row);
  else base.ReadEmbedding(t, 1, row);
  const LowRank& pair = delta.low_rank;
  std::vector<float> b(width);
  for (int64_t k = 0; k < pair.rank; ++k) {
    const float factor = pair.scale * Value(pair.dtype, pair.a, k * pair.a_stride + t);
    Dequantize(pair.dtype, pair.b + ByteSize(pair.dtype, k * pair.b_stride), width, b.data());
    for (int32_t i = 0; i < width; ++i) row[i] += factor * b[i];
  }
  for (int32_t i = 0; delta.out_scale && i < width; ++i) row[i] *= delta.out_scale[i];
}

}  // namespace lorikeet
