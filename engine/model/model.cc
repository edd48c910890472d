#include "engine/model/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

constexpr int32_t kWidthUnit = 8;  // vector kernels take whole groups of values

std::vector<float> LoadVector(const TensorView* view) {
  if (!view) return {};
  std::vector<float> out(view->elements());
  Dequantize(view->dtype, view->bytes.data(), view->elements(), out.data());
  return out;
}

absl::Status CheckWidth(const char* what, int32_t width) {
  if (width % kWidthUnit == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, " is ", width, "; it must be a multiple of ", kWidthUnit));
}

int32_t Width(const ModelConfig& config, Linear linear) {
  switch (linear) {
    case Linear::kQ: return config.heads * config.head_dim;
    case Linear::kK:
    case Linear::kV: return config.kv_heads * config.head_dim;
    case Linear::kGate:
    case Linear::kUp: return config.ffn;
    case Linear::kO:
    case Linear::kDown: return config.hidden;
  }
  return 0;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> Model::Load(std::shared_ptr<const ModelSource> source,
                                                   Backend* backend, int32_t max_rows) {
  std::unique_ptr<Model> model(new Model(std::move(source), backend, max_rows));
  LK_RETURN_IF_ERROR(model->LoadWeights());
  return model;
}

Model::Model(std::shared_ptr<const ModelSource> source, Backend* backend, int32_t max_rows)
    : source_(std::move(source)),
      config_(source_->config()),
      backend_(backend),
      max_rows_(max_rows) {
  const auto rows = [&](int64_t width) { return AlignedBuffer(max_rows * width * sizeof(float)); };
  const int32_t q_width = Width(config_, Linear::kQ);
  const int32_t kv_width = Width(config_, Linear::kK);
  for (AlignedBuffer* b : {&hidden_, &normed_, &projected_, &final_}) *b = rows(config_.hidden);
  for (AlignedBuffer* b : {&q_, &attended_}) *b = rows(q_width);
  for (AlignedBuffer* b : {&k_, &v_}) *b = rows(kv_width);
  for (AlignedBuffer* b : {&gate_, &up_}) *b = rows(config_.ffn);
  for (AlignedBuffer* b : {&cos_, &sin_}) *b = rows(config_.head_dim / 2);
  logits_ = AlignedBuffer(int64_t{kHeadRows} * config_.vocab * sizeof(float));
}

absl::Status Model::LoadWeights() {
  LK_RETURN_IF_ERROR(CheckWidth("hidden size", config_.hidden));
  LK_RETURN_IF_ERROR(CheckWidth("feed-forward width", config_.ffn));
  LK_RETURN_IF_ERROR(CheckWidth("head dimension", config_.head_dim));
  const auto linear = [&](ModuleId id) {
    return backend_->LoadLinear(source_->weight(id), source_->bias(id));
  };
  layers_.resize(config_.layers);
  // Layers pack independently: the widest part of start-up, spread over the threads.
  backend_->ParallelFor(config_.layers, [&](int32_t i, int32_t) {
    Layer& layer = layers_[i];
    for (int l = 0; l < kLinearsPerLayer; ++l) {
      layer.linear[l] = linear(LayerModule(i, static_cast<Linear>(l)));
    }
    const LayerNorms& norms = source_->norms(i);
    layer.input_norm = LoadVector(norms.input);
    layer.attention_norm = LoadVector(norms.post_attention);
    layer.q_norm = LoadVector(norms.q);
    layer.k_norm = LoadVector(norms.k);
  });
  head_ = linear(HeadModule(config_.layers));
  final_norm_ = LoadVector(&source_->final_norm());
  return absl::OkStatus();
}

Matrix Model::Rows(const AlignedBuffer& buffer, int32_t rows, int32_t width) const {
  return {const_cast<float*>(buffer.as<float>()), rows, width};
}

void Model::Multiply(Matrix x, std::span<const AdapterSegment> segments,
                     std::span<const LinearOutput> outputs) {
  backend_->LinearProducts({x, outputs, segments});
}

// cos and sin of position · frequency for every row, in double so that far positions stay exact.
void Model::Rotate(std::span<const int32_t> positions) {
  const std::vector<float>& frequencies = config_.rope_inverse_frequencies;
  const size_t half = frequencies.size();
  for (size_t t = 0; t < positions.size(); ++t) {
    for (size_t i = 0; i < half; ++i) {
      // Hugging Face multiplies in float32; so does this, then takes the exact cosine of that.
      const float angle = static_cast<float>(positions[t]) * frequencies[i];
      cos_.as<float>()[t * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sin_.as<float>()[t * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

// `pending` is the previous block's output, not yet added to the residual stream.
void Model::RunLayer(const StepInput& input, int32_t index, Matrix pending) {
  const Layer& layer = layers_[index];
  const int32_t rows = static_cast<int32_t>(input.tokens.size());
  const Matrix hidden = Rows(hidden_, rows, config_.hidden);
  const Matrix normed = Rows(normed_, rows, config_.hidden);
  const Matrix projected = Rows(projected_, rows, config_.hidden);
  const Matrix q = Rows(q_, rows, Width(config_, Linear::kQ));
  const Matrix k = Rows(k_, rows, Width(config_, Linear::kK));
  const Matrix v = Rows(v_, rows, Width(config_, Linear::kV));
  const Matrix attended = Rows(attended_, rows, q.width);
  const Matrix gate = Rows(gate_, rows, config_.ffn);
  const Matrix up = Rows(up_, rows, config_.ffn);
  const auto output = [&](Linear linear, Matrix y) {
    return LinearOutput{layer.linear[static_cast<int>(linear)].get(), LayerModule(index, linear), y};
  };

  backend_->AddRmsNorm(hidden, pending, layer.input_norm.data(), config_.norm_eps, normed);
  const LinearOutput qkv[] = {output(Linear::kQ, q), output(Linear::kK, k), output(Linear::kV, v)};
  Multiply(normed, input.segments, qkv);

  RopeStoreArgs rope{.q = q, .k = k, .v = v};
  rope.q_norm = layer.q_norm.empty() ? nullptr : layer.q_norm.data();
  rope.k_norm = layer.k_norm.empty() ? nullptr : layer.k_norm.data();
  rope.norm_eps = config_.norm_eps;
  rope.cos = config_.layer_uses_rope[index] ? cos_.as<float>() : nullptr;
  rope.sin = config_.layer_uses_rope[index] ? sin_.as<float>() : nullptr;
  rope.head_dim = config_.head_dim;
  rope.layer = index;
  backend_->RopeStore(rope, input.kv);

  AttentionArgs attention{.q = q, .out = attended, .heads = config_.heads, .layer = index};
  attention.window = config_.layer_uses_window[index] ? config_.sliding_window : 0;
  attention.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  backend_->Attention(attention, input.kv);

  const LinearOutput o = output(Linear::kO, projected);
  Multiply(attended, input.segments, {&o, 1});
  backend_->AddRmsNorm(hidden, projected, layer.attention_norm.data(), config_.norm_eps, normed);
  const LinearOutput gate_up[] = {output(Linear::kGate, gate), output(Linear::kUp, up)};
  Multiply(normed, input.segments, gate_up);
  backend_->SwiGlu(gate, up);
  const LinearOutput down = output(Linear::kDown, projected);
  Multiply(gate, input.segments, {&down, 1});
}

void Model::KeepLogitRows(const StepInput& input, Matrix pending) {
  const int32_t rows = static_cast<int32_t>(input.logit_rows.size());
  const Matrix kept = Rows(final_, rows, config_.hidden);
  const Matrix kept_pending = Rows(normed_, rows, config_.hidden);
  const Matrix hidden = Rows(hidden_, pending.rows, config_.hidden);
  const size_t bytes = config_.hidden * sizeof(float);
  for (int32_t i = 0; i < rows; ++i) {
    std::memcpy(kept.row(i), hidden.row(input.logit_rows[i]), bytes);
    std::memcpy(kept_pending.row(i), pending.row(input.logit_rows[i]), bytes);
  }
  backend_->AddRmsNorm(kept, kept_pending, final_norm_.data(), config_.norm_eps, kept);

  head_segments_.clear();
  for (const AdapterSegment& segment : input.segments) {
    const auto index_of = [&](int32_t row) {
      const auto it = std::lower_bound(input.logit_rows.begin(), input.logit_rows.end(), row);
      return static_cast<int32_t>(it - input.logit_rows.begin());
    };
    const int32_t begin = index_of(segment.row_begin);
    const int32_t end = index_of(segment.row_end);
    if (begin < end) head_segments_.push_back({begin, end, segment.adapter});
  }
}

void Model::Forward(const StepInput& input) {
  const int32_t rows = static_cast<int32_t>(input.tokens.size());
  LK_CHECK(rows > 0 && rows <= max_rows_);
  backend_->Embed(source_->embedding(), input.tokens, Rows(hidden_, rows, config_.hidden));
  Rotate(input.positions);
  const Matrix pending = Rows(projected_, rows, config_.hidden);
  for (int32_t i = 0; i < config_.layers; ++i) RunLayer(input, i, i == 0 ? Matrix() : pending);
  KeepLogitRows(input, pending);
}

Matrix Model::Logits(int32_t begin, int32_t rows) {
  LK_CHECK(rows > 0 && rows <= kHeadRows);
  const Matrix kept = {final_.as<float>() + int64_t{begin} * config_.hidden, rows, config_.hidden};
  const Matrix logits = Rows(logits_, rows, config_.vocab);
  std::vector<AdapterSegment> segments;
  for (AdapterSegment segment : head_segments_) {
    segment.row_begin = std::max(segment.row_begin - begin, 0);
    segment.row_end = std::min(segment.row_end - begin, rows);
    if (segment.row_begin < segment.row_end) segments.push_back(segment);
  }
  const LinearOutput head{head_.get(), HeadModule(config_.layers), logits};
  Multiply(kept, segments, {&head, 1});
  return logits;
}

}  // namespace lorikeet
