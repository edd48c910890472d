#include "engine/model/model.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/api/limits.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

constexpr int32_t kWidthUnit = 8;  // vector kernels take whole groups of values

absl::Status CheckWidth(const char* what, int32_t width) {
  if (width % kWidthUnit == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, " is ", width, "; it must be a multiple of ", kWidthUnit));
}

const float* Floats(const DeviceMemory& memory) {
  return reinterpret_cast<const float*>(memory.get());
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> Model::Load(std::shared_ptr<const ModelSource> source,
                                                   Backend* backend, int32_t max_rows) {
  std::unique_ptr<Model> model(new Model(std::move(source), backend, max_rows));
  LK_RETURN_IF_ERROR(model->LoadWeights());
  model->AllocateRows();
  LK_RETURN_IF_ERROR(backend->status());
  return model;
}

Model::Model(std::shared_ptr<const ModelSource> source, Backend* backend, int32_t max_rows)
    : source_(std::move(source)),
      config_(source_->config()),
      backend_(backend),
      max_rows_(max_rows) {}

void Model::AllocateRows() {
  const auto allocate = [&](int32_t rows, int32_t width, DType dtype, int32_t room = 0) {
    Rows buffer;
    buffer.memory = backend_->Allocate(ByteSize(dtype, int64_t{rows} * (width + room)));
    buffer.all = Matrix(buffer.memory.get(), rows, width, dtype);
    buffer.all.stride += room;
    return buffer;
  };
  const auto activations = [&](int32_t width) {
    return allocate(max_rows_, width, backend_->activation_dtype());
  };
  const auto inputs = [&](int32_t width) {
    return allocate(max_rows_, width, backend_->activation_dtype(), backend_->x_room(width));
  };
  const int32_t attention = config_.heads * config_.head_dim;
  hidden_ = allocate(max_rows_, config_.hidden, DType::kF32);
  normed_ = inputs(config_.hidden);
  qkv_ = activations(attention + 2 * config_.kv_heads * config_.head_dim);
  attended_ = inputs(attention);
  projected_ = activations(config_.hidden);
  gate_up_ = activations(2 * config_.ffn);
  gated_ = inputs(config_.ffn);
  scores_ = allocate(max_rows_, config_.experts, DType::kF32);  // rounding would change who is chosen
  final_ = activations(config_.hidden);
  // Adapters' own tokens lie behind the base's, in the same row.
  const Rows logits = allocate(backend_->max_logit_rows(), config_.vocab + Limits::kMaxAddedTokens,
                               DType::kF32);
  logits_ = {logits.memory, logits.all.Columns(0, config_.vocab)};
}

DeviceMemory Model::LoadVector(const TensorView* view) {
  if (!view) return nullptr;
  std::vector<float> values(view->elements());
  Dequantize(view->dtype, view->bytes.data(), view->elements(), values.data());
  return backend_->Upload(values);
}

// `parts` linears from `first` on as one product; `how` says all but where they lie.
std::unique_ptr<LinearWeight> Model::LoadLinear(ModuleId first, int32_t parts, LinearSource how) {
  std::vector<LinearSource> sources(parts, how);
  for (int32_t i = 0; i < parts; ++i) {
    sources[i].weight = &source_->weight(first + i);
    sources[i].bias = source_->bias(first + i);
  }
  return backend_->LoadLinear(first, sources);
}

void Model::LoadLayer(int32_t index) {
  Layer& layer = layers_[index];
  layer.qkv = LoadLinear(LayerModule(index, Linear::kQ), 3, {.feeds_softmax = true});
  layer.o = LoadLinear(LayerModule(index, Linear::kO), 1);
  if (config_.has_experts(index)) return LoadExperts(index, &layer);
  layer.gate_up = LoadLinear(LayerModule(index, Linear::kGate), 2);
  layer.down = LoadLinear(LayerModule(index, Linear::kDown), 1);
}

// A layer with the weights of one before it.
void Model::ShareLayer(const Layer& from, int32_t index) {
  const int32_t layers = config_.layers, experts = config_.experts;
  const auto share = [&](const std::unique_ptr<LinearWeight>& linear, ModuleId first) {
    return backend_->ShareLinear(*linear, first);
  };
  Layer& layer = layers_[index];
  layer.qkv = share(from.qkv, LayerModule(index, Linear::kQ));
  layer.o = share(from.o, LayerModule(index, Linear::kO));
  if (!from.router) {
    layer.gate_up = share(from.gate_up, LayerModule(index, Linear::kGate));
    layer.down = share(from.down, LayerModule(index, Linear::kDown));
    return;
  }
  layer.router = share(from.router, RouterModule(layers, experts, index));
  for (int32_t e = 0; e < experts; ++e) {
    const auto linear = [&](int32_t which, Linear first) {
      layer.expert_linears.push_back(
          share(from.expert_linears[2 * e + which], ExpertModule(layers, experts, index, e, first)));
      return layer.expert_linears.back().get();
    };
    const LinearWeight* gate_up = linear(0, Linear::kGate);
    layer.experts.push_back({gate_up, linear(1, Linear::kDown)});
  }
}

void Model::LoadExperts(int32_t index, Layer* layer) {
  const int32_t layers = config_.layers, experts = config_.experts;
  layer->router = LoadLinear(RouterModule(layers, experts, index), 1,
                             {.quantize = false, .feeds_softmax = true});
  for (int32_t e = 0; e < experts; ++e) {
    const auto linear = [&](Linear first, int32_t parts) {
      layer->expert_linears.push_back(
          LoadLinear(ExpertModule(layers, experts, index, e, first), parts, {.quantize = false, .expert = true}));
      return layer->expert_linears.back().get();
    };
    const LinearWeight* gate_up = linear(Linear::kGate, 2);
    layer->experts.push_back({gate_up, linear(Linear::kDown, 1)});
  }
}

absl::Status Model::LoadWeights() {
  LK_RETURN_IF_ERROR(CheckWidth("hidden size", config_.hidden));
  LK_RETURN_IF_ERROR(CheckWidth("feed-forward width", config_.ffn));
  LK_RETURN_IF_ERROR(CheckWidth("experts' width", config_.expert_ffn));
  LK_RETURN_IF_ERROR(CheckWidth("head dimension", config_.head_dim));
  layers_.resize(config_.layers);
  // Layers pack independently: the widest part of start-up, spread over the threads.
  backend_->ParallelFor(config_.layers, [&](int32_t i, int32_t) {
    if (source_->first_like(i) == i) LoadLayer(i);
  });
  for (int32_t i = 0; i < config_.layers; ++i) {
    if (const int first = source_->first_like(i); first != i) ShareLayer(layers_[first], i);
    const LayerNorms& norms = source_->norms(i);
    layers_[i].input_norm = LoadVector(norms.input);
    layers_[i].attention_norm = LoadVector(norms.post_attention);
    layers_[i].q_norm = LoadVector(norms.q);
    layers_[i].k_norm = LoadVector(norms.k);
  }
  // What all logits pass through is kept whole.
  head_ = LoadLinear(HeadModule(config_.layers), 1, {.quantize = false, .feeds_softmax = true});
  final_norm_ = LoadVector(&source_->final_norm());
  inverse_frequencies_ = backend_->Upload(config_.rope_inverse_frequencies);
  backend_->LoadEmbedding(source_->embedding());
  return absl::OkStatus();
}

void Model::Attend(const Layer& layer, int32_t index, int32_t rows) {
  const int32_t q_width = config_.heads * config_.head_dim;
  const int32_t kv_width = config_.kv_heads * config_.head_dim;
  const Matrix qkv = qkv_.First(rows);
  RopeStoreArgs rope{.q = qkv.Columns(0, q_width),
                     .k = qkv.Columns(q_width, kv_width),
                     .v = qkv.Columns(q_width + kv_width, kv_width)};
  rope.q_norm = Floats(layer.q_norm);
  rope.k_norm = Floats(layer.k_norm);
  rope.norm_eps = config_.norm_eps;
  rope.inverse_frequencies =
      config_.layer_uses_rope[index] ? Floats(inverse_frequencies_) : nullptr;
  rope.head_dim = config_.head_dim;
  rope.layer = index;
  backend_->RopeStore(rope);

  AttentionArgs attention{.q = rope.q, .out = attended_.First(rows)};
  attention.heads = config_.heads;
  attention.layer = index;
  attention.window = config_.layer_uses_window[index] ? config_.sliding_window : 0;
  attention.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  backend_->Attention(attention);
}

void Model::RunLayer(int32_t index, int32_t rows) {
  const Layer& layer = layers_[index];
  const Matrix normed = normed_.First(rows);
  const Matrix projected = projected_.First(rows);
  const auto norm = [&](Matrix delta, const DeviceMemory& weight, bool attention) {
    backend_->AddRmsNorm({.x = hidden_.First(rows), .delta = delta, .weight = Floats(weight),
                          .norm = NormIndex(index, attention), .eps = config_.norm_eps,
                          .out = normed});
  };
  const auto adapt = [&](bool attention) {
    backend_->Bottlenecks({.x = hidden_.First(rows), .delta = projected,
                           .block = NormIndex(index, attention)});
  };
  const auto multiply = [&](const std::unique_ptr<LinearWeight>& weight, Matrix x, Matrix y, Reader reader) {
    backend_->LinearProducts({.weight = weight.get(), .x = x, .y = y, .x_room = backend_->x_room(x.width),
                              .reader = reader});
  };
  norm(index == 0 ? Matrix() : projected, layer.input_norm, false);
  multiply(layer.qkv, normed, qkv_.First(rows), Reader::kRopeStore);
  Attend(layer, index, rows);
  multiply(layer.o, attended_.First(rows), projected, Reader::kAddRmsNorm);
  adapt(false);
  norm(projected, layer.attention_norm, true);
  if (layer.router) {
    multiply(layer.router, normed, scores_.First(rows), Reader::kAny);
    backend_->Experts({.experts = layer.experts, .scores = scores_.First(rows),
                       .chosen = config_.experts_per_token,
                       .normalise = config_.normalise_experts, .x = normed, .out = projected});
  } else {
    multiply(layer.gate_up, normed, gate_up_.First(rows), Reader::kSwiGlu);
    backend_->SwiGlu(gate_up_.First(rows), gated_.First(rows));
    // The final norm, which reads the last layer's, is not among the operations given to Run.
    multiply(layer.down, gated_.First(rows), projected,
             index + 1 < config_.layers ? Reader::kAddRmsNorm : Reader::kAny);
    backend_->MlpMixtures({.mlp = {layer.gate_up.get(), layer.down.get()}, .x = normed,
                           .out = projected, .layer = index});
  }
  adapt(true);
}

int64_t Model::weight_bytes() const {
  int64_t bytes = head_->bytes;
  for (const Layer& layer : layers_) {
    bytes += layer.qkv->bytes + layer.o->bytes;
    bytes += layer.router ? layer.router->bytes : layer.gate_up->bytes + layer.down->bytes;
    int64_t experts = 0;  // all of one size
    for (const auto& linear : layer.expert_linears) experts += linear->bytes;
    if (experts > 0) bytes += experts / config_.experts * config_.experts_per_token;
  }
  return bytes;
}

void Model::Forward(const StepInput& step) {
  LK_CHECK(!step.tokens.empty() && static_cast<int32_t>(step.tokens.size()) <= max_rows_);
  const int32_t rows = backend_->BeginStep(step);
  LK_CHECK(rows <= max_rows_);
  const int32_t logit_rows = static_cast<int32_t>(step.logit_rows.size());
  backend_->Run([&] {
    backend_->Embed(hidden_.First(rows));
    for (int32_t i = 0; i < config_.layers; ++i) RunLayer(i, rows);
  });
  if (logit_rows == 0) return;
  backend_->AddRmsNorm({.x = hidden_.First(rows), .delta = projected_.First(rows),
                        .weight = Floats(final_norm_), .norm = FinalNorm(config_.layers),
                        .eps = config_.norm_eps,
                        .out = final_.First(logit_rows), .rows = RowSet::kLogits});
}

Matrix Model::Logits(int32_t begin, int32_t rows) {
  LK_CHECK(rows > 0 && rows <= backend_->max_logit_rows());
  LinearArgs args{.weight = head_.get()};
  args.x = final_.all.Rows(begin, rows);
  args.y = logits_.First(rows);
  args.rows = RowSet::kLogits;
  args.first_row = begin;
  backend_->LinearProducts(args);
  return args.y;
}

// Rows are whole float32 words in any type, since widths are multiples of kWidthUnit.
absl::Status Model::Hidden(int32_t begin, int32_t rows, std::vector<float>* out) {
  const Matrix hidden = final_.all.Rows(begin, rows);
  const int64_t values = int64_t{rows} * config_.hidden;
  std::vector<float> words(ByteSize(hidden.dtype, values) / sizeof(float));
  LK_RETURN_IF_ERROR(backend_->Download(hidden.row<const float>(0), words));
  out->resize(values);
  Dequantize(hidden.dtype, reinterpret_cast<const std::byte*>(words.data()), values, out->data());
  return absl::OkStatus();
}

}  // namespace lorikeet
