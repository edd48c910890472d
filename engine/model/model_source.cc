#include "engine/model/model_source.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "engine/base/aligned_buffer.h"
#include "engine/base/status_macros.h"
#include "engine/model/config_gguf.h"
#include "engine/model/config_hf.h"
#include "engine/model/fp8.h"
#include "engine/model/nf4.h"
#include "engine/tensor/json.h"
#include "engine/tensor/safetensors.h"

namespace lorikeet {
namespace {

// What a checkpoint format calls its tensors. Names in a layer follow "<layer>N.".
struct TensorNames {
  const char* embedding;
  const char* final_norm;
  const char* head;
  const char* layer;
  std::array<const char*, kLinearsPerLayer> linears;  // plus ".weight" or ".bias"
  const char* input_norm;
  const char* post_attention_norm;
  const char* q_norm;
  const char* k_norm;
  const char* ignored_suffix;  // tensors that end so hold nothing the configuration does not say
};

constexpr TensorNames kHfNames = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.",
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "rotary_emb.inv_freq",
};

constexpr TensorNames kGgufNames = {
    "token_embd.weight",
    "output_norm.weight",
    "output.weight",
    "blk.",
    {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    "attn_norm.weight",
    "ffn_norm.weight",
    "attn_q_norm.weight",
    "attn_k_norm.weight",
    "rope_freqs.weight",  // already part of the configuration
};

// The same of a layer's router and experts, "*" standing for an expert's number. Without one a tensor
// holds that linear of all experts, [experts, out, in].
struct ExpertNames {
  const char* router;
  std::array<const char*, kLinearsPerExpert> linears;  // gate, up, down
};

constexpr ExpertNames kQwenExperts = {
    "mlp.gate", {"mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.experts.*.down_proj"}};
constexpr ExpertNames kMixtralExperts = {
    "block_sparse_moe.gate",
    {"block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3",
     "block_sparse_moe.experts.*.w2"}};
constexpr ExpertNames kGgufExperts = {"ffn_gate_inp",
                                      {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}};

// GGUF calls Mixtral llama.
const ExpertNames& HfExperts(const ModelConfig& config) {
  return config.family == "mixtral" || config.family == "llama" ? kMixtralExperts : kQwenExperts;
}

std::string WithNumber(std::string_view name, int expert) {
  return absl::StrReplaceAll(absl::string_view(name.data(), name.size()),
                             {{"*", absl::StrCat(expert)}});
}

std::vector<int64_t> LinearShape(const ModelConfig& config, Linear linear) {
  const int64_t q = int64_t{config.heads} * config.head_dim;
  const int64_t kv = int64_t{config.kv_heads} * config.head_dim;
  switch (linear) {
    case Linear::kQ:
      return {q, config.hidden};
    case Linear::kK:
    case Linear::kV:
      return {kv, config.hidden};
    case Linear::kO:
      return {config.hidden, q};
    case Linear::kGate:
    case Linear::kUp:
      return {config.ffn, config.hidden};
    case Linear::kDown:
      return {config.hidden, config.ffn};
  }
  return {};
}

bool HasBias(const ModelConfig& config, Linear linear) {
  if (linear <= Linear::kV) return config.qkv_bias;
  return linear == Linear::kO ? config.o_bias : config.mlp_bias;
}

// Finds the tensors a model needs and remembers everything that is wrong, to say it all at once.
class TensorFinder {
 public:
  explicit TensorFinder(const TensorFile& file) : file_(file) {}

  // nullptr when the tensor is missing or does not fit, which Finish() reports.
  const TensorView* Find(const std::string& name, const std::vector<int64_t>& shape) {
    used_.insert(name);
    const TensorView* tensor = file_.Find(name);
    if (tensor == nullptr) {
      missing_.push_back(name);
    } else if (tensor->shape != shape) {
      misfits_.push_back(
          absl::StrCat(name, " is ", ShapeString(tensor->shape), ", not ", ShapeString(shape)));
    } else if (IsCode(tensor->dtype)) {
      misfits_.push_back(absl::StrCat(name, " is ", Info(tensor->dtype).name,
                                      "; F32, F16, BF16, F8_E4M3 with scales and bitsandbytes' NF4 are "
                                      "supported"));
    } else if (shape.size() == 1 && IsQuantized(tensor->dtype)) {
      misfits_.push_back(absl::StrCat(name, " is ", Info(tensor->dtype).name,
                                      ", which is not supported for a vector"));
    } else {
      return tensor;
    }
    return nullptr;
  }

  absl::Status Finish(const std::string& where, std::string_view ignored_suffix) const {
    std::vector<std::string> unexpected;
    for (const auto& [name, tensor] : file_.tensors()) {
      const bool ignored =
          name.size() >= ignored_suffix.size() &&
          name.compare(name.size() - ignored_suffix.size(), std::string::npos, ignored_suffix) == 0;
      if (!ignored && used_.count(name) == 0) unexpected.push_back(name);
    }
    std::vector<std::string> problems;
    auto report = [&problems](const char* what, const std::vector<std::string>& list) {
      if (list.empty()) return;
      problems.push_back(absl::StrCat(list.size(), " ", what, ": ", absl::StrJoin(list, ", ")));
    };
    report("missing", missing_);
    report("of the wrong shape or type", misfits_);
    report("with no place in the model", unexpected);
    if (problems.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(
        where, ": tensors do not fit the configuration: ", absl::StrJoin(problems, "; ")));
  }

 private:
  const TensorFile& file_;
  std::set<std::string> used_;
  std::vector<std::string> missing_, misfits_;
};

class FileSource final : public ModelSource {
 public:
  absl::Status OpenDirectory(const std::filesystem::path& path) {
    const std::filesystem::path config_path = path / "config.json";
    LK_ASSIGN_OR_RETURN(const nlohmann::json config, ReadJsonFile(config_path));
    absl::StatusOr<nlohmann::json> generation = ReadJsonFile(path / "generation_config.json");
    if (absl::IsNotFound(generation.status())) generation = nlohmann::json();
    LK_RETURN_IF_ERROR(generation.status());
    LK_ASSIGN_OR_RETURN(config_, ParseHfConfig(config, *generation, config_path.string()));
    LK_ASSIGN_OR_RETURN(tensors_, ReadSafetensorsModel(path));
    LK_RETURN_IF_ERROR(RepackNf4(&tensors_, &buffers_));
    LK_RETURN_IF_ERROR(RepackFp8(&tensors_, &buffers_));
    // "models/llama/" has its name before the last slash, "." in the path it stands for.
    const std::filesystem::path full = std::filesystem::absolute(path / "").lexically_normal();
    config_.name = full.parent_path().filename().string();
    return Resolve(path.string(), kHfNames, HfExperts(config_));
  }

  absl::Status OpenGguf(const std::filesystem::path& path) {
    LK_ASSIGN_OR_RETURN(GgufFile file, ReadGguf(path));
    LK_ASSIGN_OR_RETURN(config_, ParseGgufConfig(file, path.string()));
    config_.name = path.stem().string();
    metadata_ = std::move(file.metadata);
    gguf_ = &metadata_;
    tensors_ = std::move(file.tensors);
    LK_RETURN_IF_ERROR(Resolve(path.string(), kGgufNames, kGgufExperts));
    if (GgufPermutesQk(config_)) RestoreRowOrder();
    return absl::OkStatus();
  }

 private:
  absl::Status Resolve(const std::string& where, const TensorNames& names,
                       const ExpertNames& experts) {
    TensorFinder finder(tensors_);
    embedding_ = finder.Find(names.embedding, {config_.vocab, config_.hidden});
    final_norm_ = finder.Find(names.final_norm, {config_.hidden});
    weights_.resize(ModuleCount(config_.layers, config_.experts));
    biases_.resize(weights_.size());
    norms_.resize(config_.layers);
    for (int layer = 0; layer < config_.layers; ++layer) {
      ResolveLayer(layer, names, finder);
      if (config_.has_experts(layer)) ResolveExperts(layer, names, experts, finder);
    }

    const bool own_head = !config_.tied_head || tensors_.Find(names.head) != nullptr;
    const TensorView* head =
        own_head ? finder.Find(names.head, {config_.vocab, config_.hidden}) : embedding_;
    LK_RETURN_IF_ERROR(finder.Finish(where, names.ignored_suffix));
    if (config_.tied_head && own_head) {
      if (head->dtype != embedding_->dtype ||
          !std::equal(head->bytes.begin(), head->bytes.end(), embedding_->bytes.begin())) {
        return absl::InvalidArgumentError(absl::StrCat(where, ": tie_word_embeddings is true, but ",
                                                       names.head, " differs from ",
                                                       names.embedding));
      }
      head = embedding_;
    }
    weights_[HeadModule(config_.layers)] = head;
    AlignAll();
    return absl::OkStatus();
  }

  void ResolveLayer(int layer, const TensorNames& names, TensorFinder& finder) {
    const std::string prefix = absl::StrCat(names.layer, layer, ".");
    for (int i = 0; i < kLinearsPerLayer; ++i) {
      const Linear linear = static_cast<Linear>(i);
      if (linear >= Linear::kGate && config_.has_experts(layer)) break;
      const ModuleId id = LayerModule(layer, linear);
      const std::vector<int64_t> shape = LinearShape(config_, linear);
      weights_[id] = finder.Find(absl::StrCat(prefix, names.linears[i], ".weight"), shape);
      if (HasBias(config_, linear)) {
        biases_[id] = finder.Find(absl::StrCat(prefix, names.linears[i], ".bias"), {shape[0]});
      }
    }
    LayerNorms& norms = norms_[layer];
    norms.input = finder.Find(absl::StrCat(prefix, names.input_norm), {config_.hidden});
    norms.post_attention =
        finder.Find(absl::StrCat(prefix, names.post_attention_norm), {config_.hidden});
    if (!config_.qk_norm) return;
    norms.q = finder.Find(absl::StrCat(prefix, names.q_norm), {config_.head_dim});
    norms.k = finder.Find(absl::StrCat(prefix, names.k_norm), {config_.head_dim});
  }

  void ResolveExperts(int layer, const TensorNames& names, const ExpertNames& experts,
                      TensorFinder& finder) {
    const std::string prefix = absl::StrCat(names.layer, layer, ".");
    const int64_t count = config_.experts, ffn = config_.expert_ffn, hidden = config_.hidden;
    weights_[RouterModule(config_.layers, config_.experts, layer)] =
        finder.Find(absl::StrCat(prefix, experts.router, ".weight"), {count, hidden});
    for (int i = 0; i < kLinearsPerExpert; ++i) {
      const auto linear = static_cast<Linear>(static_cast<int>(Linear::kGate) + i);
      const int64_t in = linear == Linear::kDown ? ffn : hidden;
      const int64_t out = linear == Linear::kDown ? hidden : ffn;
      const std::string_view name = experts.linears[i];
      const bool each = name.find('*') != std::string_view::npos;
      const TensorView* all =
          each ? nullptr : finder.Find(absl::StrCat(prefix, experts.linears[i], ".weight"), {count, out, in});
      for (int e = 0; e < config_.experts; ++e) {
        weights_[ExpertModule(config_.layers, config_.experts, layer, e, linear)] =
            each ? finder.Find(absl::StrCat(prefix, WithNumber(name, e), ".weight"), {out, in})
                 : Slice(all, e);
      }
    }
  }

  // Matrix `index` of a three-dimensional tensor.
  const TensorView* Slice(const TensorView* all, int64_t index) {
    if (all == nullptr) return nullptr;
    const size_t bytes = all->bytes.size() / all->shape[0];
    views_.push_back({all->dtype, {all->shape[1], all->shape[2]}, all->bytes.subspan(index * bytes, bytes)});
    return &views_.back();
  }

  // Copies what the file holds at an address the type cannot be read from.
  void AlignAll() {
    auto align = [this](const TensorView*& view) {
      if (view == nullptr) return;
      const uintptr_t alignment = view->dtype == DType::kF32 ? 4 : 2;
      if (reinterpret_cast<uintptr_t>(view->bytes.data()) % alignment == 0) return;
      AlignedBuffer copy(view->bytes.size());
      std::memcpy(copy.data(), view->bytes.data(), view->bytes.size());
      view = Keep(*view, std::move(copy));
    };
    const TensorView*& head = weights_[HeadModule(config_.layers)];
    const bool tied = head == embedding_;
    align(embedding_);
    if (tied) head = embedding_;
    align(final_norm_);
    for (const TensorView*& view : weights_) align(view);
    for (const TensorView*& view : biases_) align(view);
    for (LayerNorms& norms : norms_) {
      for (const TensorView** view : {&norms.input, &norms.post_attention, &norms.q, &norms.k}) {
        align(*view);
      }
    }
  }

  // Rows of q and k (and of their biases) from rotary pairs side by side to half a head apart. Rows
  // move as a whole, so quantisation blocks, which lie along them, stay what they are.
  void RestoreRowOrder() {
    for (int layer = 0; layer < config_.layers; ++layer) {
      for (const Linear linear : {Linear::kQ, Linear::kK}) {
        const ModuleId id = LayerModule(layer, linear);
        weights_[id] = WithPairsApart(*weights_[id]);
        if (biases_[id] != nullptr) biases_[id] = WithPairsApart(*biases_[id]);
      }
    }
  }

  const TensorView* WithPairsApart(const TensorView& view) {
    const int64_t rows = view.shape[0];
    const size_t row_bytes = view.bytes.size() / rows;
    const int64_t half = config_.head_dim / 2;
    AlignedBuffer ordered(view.bytes.size());
    for (int64_t to = 0; to < rows; ++to) {
      const int64_t head = to / config_.head_dim;
      const int64_t side = to % config_.head_dim / half;
      const int64_t from = head * config_.head_dim + to % half * 2 + side;
      std::memcpy(ordered.data() + to * row_bytes, view.bytes.data() + from * row_bytes, row_bytes);
    }
    return Keep(view, std::move(ordered));
  }

  // A view like `like` of bytes that this source now owns.
  const TensorView* Keep(const TensorView& like, AlignedBuffer bytes) {
    buffers_.push_back(std::move(bytes));
    views_.push_back(like);
    views_.back().bytes = {buffers_.back().data(), buffers_.back().size()};
    return &views_.back();
  }

  TensorFile tensors_;
  GgufMetadata metadata_;
  std::deque<AlignedBuffer> buffers_;
  std::deque<TensorView> views_;  // of buffers_; addresses stay
};

}  // namespace

std::string ModelSource::path(ModuleId id) const {
  const int first = ModuleCount(config_.layers);
  if (id < first) return ModulePath(id, config_.layers);
  const int in_layer = 1 + config_.experts * kLinearsPerExpert;
  const int at = (id - first) % in_layer - 1;
  const ExpertNames& names = HfExperts(config_);
  const std::string name = at < 0 ? names.router
                                  : WithNumber(names.linears[at % kLinearsPerExpert],
                                               at / kLinearsPerExpert);
  return absl::StrCat("model.layers.", (id - first) / in_layer, ".", name);
}

std::vector<ModuleId> ModelSource::modules() const {
  std::vector<ModuleId> all;
  const auto add = [&](ModuleId id) {
    if (weights_[id] != nullptr) all.push_back(id);
  };
  for (int layer = 0; layer < config_.layers; ++layer) {
    for (int i = 0; i < kLinearsPerLayer; ++i) add(LayerModule(layer, static_cast<Linear>(i)));
    if (!config_.has_experts(layer)) continue;
    const ModuleId router = RouterModule(config_.layers, config_.experts, layer);
    for (int i = 0; i <= config_.experts * kLinearsPerExpert; ++i) add(router + i);
  }
  add(HeadModule(config_.layers));
  return all;
}

// Stacks what stands there a layer each: entries of linears, norms and the configuration.
absl::Status ModelSource::Replicate(const LayerReplication& replication, const std::string& where) {
  if (replication.empty()) return absl::OkStatus();
  const ModelConfig from = config_;
  std::vector<int> origins;
  for (const auto& [begin, end] : replication) {
    if (end > from.layers) {
      return absl::InvalidArgumentError(absl::StrCat("layer_replication ", ToString(replication), ": ", where,
                                                     " has ", from.layers, " layers, numbered from 0"));
    }
    for (int layer = begin; layer < end; ++layer) origins.push_back(layer);
  }
  const auto stack = [&](auto* each) {
    if (each->empty()) return;
    auto stacked = std::exchange(*each, {});
    for (const int origin : origins) each->push_back(stacked[origin]);
  };
  stack(&norms_);
  stack(&config_.layer_uses_rope);
  stack(&config_.layer_uses_window);
  stack(&config_.layer_has_experts);
  config_.layers = static_cast<int32_t>(origins.size());
  const int in_experts = from.experts == 0 ? 0 : 1 + from.experts * kLinearsPerExpert;
  for (auto* linears : {&weights_, &biases_}) {
    const auto whole = std::exchange(*linears, std::vector<const TensorView*>(ModuleCount(config_.layers, from.experts)));
    (*linears)[HeadModule(config_.layers)] = whole[HeadModule(from.layers)];
    for (int layer = 0; layer < config_.layers; ++layer) {
      const auto copy = [&](ModuleId begin, int count, ModuleId to) {
        std::copy_n(whole.begin() + begin, count, linears->begin() + to);
      };
      copy(LayerModule(origins[layer], Linear::kQ), kLinearsPerLayer, LayerModule(layer, Linear::kQ));
      if (in_experts == 0) continue;
      copy(RouterModule(from.layers, from.experts, origins[layer]), in_experts,
           RouterModule(config_.layers, from.experts, layer));
    }
  }
  for (const int origin : origins) {
    first_like_.push_back(static_cast<int>(std::ranges::find(origins, origin) - origins.begin()));
  }
  replication_ = replication;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ModelSource>> ModelSource::Open(const std::filesystem::path& path,
                                                               const LayerReplication& replication) {
  auto source = std::make_unique<FileSource>();
  std::error_code ignored;
  LK_RETURN_IF_ERROR(std::filesystem::is_directory(path, ignored) ? source->OpenDirectory(path)
                                                                  : source->OpenGguf(path));
  LK_RETURN_IF_ERROR(static_cast<ModelSource&>(*source).Replicate(replication, path.string()));
  return std::unique_ptr<ModelSource>(std::move(source));
}

}  // namespace lorikeet
