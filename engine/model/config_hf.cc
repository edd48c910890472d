#include "engine/model/config_hf.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/model/config_rope.h"
#include "engine/model/fp8.h"

namespace lorikeet {
namespace {

using nlohmann::json;

// What Transformers assumes where config.json is silent.
struct Family {
  const char* architecture;
  const char* name;  // also config.json's model_type
  int32_t kv_heads;  // 0: as many as query heads
  int32_t head_dim;  // 0: hidden_size / num_attention_heads
  double rope_theta;
  bool tied_head;
  int32_t eos_id;  // -1: none
};

constexpr Family kFamilies[] = {
    {"LlamaForCausalLM", "llama", 0, 0, 10000.0, false, 2},
    {"SmolLM3ForCausalLM", "smollm3", 4, 0, 2000000.0, true, 128001},
    {"MistralForCausalLM", "mistral", 8, 0, 10000.0, false, 2},
    {"Qwen2ForCausalLM", "qwen2", 32, 0, 10000.0, false, -1},
    {"Qwen3ForCausalLM", "qwen3", 32, 128, 10000.0, false, -1},
    {"MixtralForCausalLM", "mixtral", 8, 0, 1000000.0, false, 2},
    {"Qwen3MoeForCausalLM", "qwen3_moe", 4, 0, 10000.0, false, -1},
};

// Settings of related architectures that change the mathematics, with the value that does not.
// Some come with classes that call themselves by a supported name.
struct NeutralSetting {
  const char* key;
  double neutral;  // false is 0
};

constexpr NeutralSetting kNeutralSettings[] = {
    {"alibi", 0},
    {"attention_chunk_size", 0},
    {"attention_multiplier", 0},
    {"attn_logit_softcapping", 0},
    {"attn_temperature_tuning", 0},
    {"clip_qkv", 0},
    {"dim_model_base", 0},
    {"embedding_multiplier", 1},
    {"final_logit_softcapping", 0},
    {"logit_scale", 1},
    {"logit_softcapping", 0},
    {"logits_scaling", 1},
    {"n_routed_experts", 0},
    {"n_shared_experts", 0},
    {"num_nextn_predict_layers", 0},
    {"parallel_attn", 0},
    {"partial_rotary_factor", 1},
    {"qk_layernorm", 0},
    {"query_pre_attn_scalar", 0},
    {"residual_multiplier", 1},
    {"rope_interleaved", 0},
    {"rotary_pct", 1},
    {"scale_depth", 0},
    {"scale_emb", 1},
    {"use_bidirectional_attention", 0},
    {"use_mrope", 0},
    {"use_parallel_residual", 0},
    {"use_qk_norm", 0},
};

constexpr int32_t kMaxWidth = 1 << 20;
constexpr int32_t kMaxExperts = 1024;

class HfConfigReader {
 public:
  HfConfigReader(const json& config, const json& generation, std::string_view where)
      : json_(config), generation_(generation), where_(where) {}

  absl::StatusOr<ModelConfig> Read() {
    if (!json_.is_object()) return Invalid("not a JSON object");
    LK_RETURN_IF_ERROR(ReadFamily());
    LK_RETURN_IF_ERROR(RefuseUnknownMathematics());
    LK_RETURN_IF_ERROR(ReadSizes());
    LK_RETURN_IF_ERROR(ReadExperts());
    LK_RETURN_IF_ERROR(ReadFlags());
    LK_RETURN_IF_ERROR(ReadRope());
    LK_RETURN_IF_ERROR(ReadRopeLayers());
    LK_RETURN_IF_ERROR(ReadWindow());
    LK_RETURN_IF_ERROR(ReadEosIds());
    LK_RETURN_IF_ERROR(CheckConfig(config_, where_));
    return std::move(config_);
  }

 private:
  template <typename... Parts>
  absl::Status Invalid(const Parts&... parts) const {
    return absl::InvalidArgumentError(absl::StrCat(where_, ": ", parts...));
  }

  static std::string Text(const json& value) {
    return value.dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 200);
  }

  // nullptr when the key is absent or null, which Transformers takes for the same.
  static const json* Get(const json& object, const char* key) {
    const auto it = object.find(key);
    return it == object.end() || it->is_null() ? nullptr : &*it;
  }

  absl::StatusOr<int32_t> ToInt(const char* key, const json& value, int32_t min,
                                int32_t max) const {
    if (value.is_number_integer() && value >= min && value <= max) return value.get<int32_t>();
    return Invalid(key, " is ", Text(value), "; it must be an integer from ", min, " to ", max);
  }
  absl::StatusOr<int32_t> RequiredInt(const char* key, int32_t max) const {
    const json* value = Get(json_, key);
    if (value == nullptr) return Invalid(key, " is missing");
    return ToInt(key, *value, 1, max);
  }
  absl::StatusOr<int32_t> Int(const char* key, int32_t fallback, int32_t max) const {
    const json* value = Get(json_, key);
    return value == nullptr ? fallback : ToInt(key, *value, 1, max);
  }
  absl::StatusOr<float> Positive(const json& object, const char* key, double fallback) const {
    const json* value = Get(object, key);
    const double number = value == nullptr     ? fallback
                          : value->is_number() ? value->get<double>()
                                               : std::numeric_limits<double>::quiet_NaN();
    const float rounded = static_cast<float>(number);
    if (std::isfinite(rounded) && rounded > 0) return rounded;
    if (value == nullptr) return Invalid(key, " is missing");
    return Invalid(key, " is ", Text(*value), "; it must be a number above 0");
  }
  absl::StatusOr<bool> Flag(const char* key, bool fallback) const {
    const json* value = Get(json_, key);
    if (value == nullptr) return fallback;
    if (value->is_boolean()) return value->get<bool>();
    return Invalid(key, " is ", Text(*value), "; it must be true or false");
  }

  bool Is(const char* family) const { return config_.family == family; }
  bool IsQwen3() const { return Is("qwen3") || Is("qwen3_moe"); }

  absl::Status ReadFamily() {
    const json* architectures = Get(json_, "architectures");
    const json* model_type = Get(json_, "model_type");
    if (architectures == nullptr && model_type == nullptr) {
      return Invalid("names neither \"architectures\" nor \"model_type\"");
    }
    std::string supported;
    for (const Family& family : kFamilies) {
      absl::StrAppend(&supported, supported.empty() ? "" : ", ", family.architecture);
      const bool class_fits =
          architectures == nullptr || *architectures == json::array({family.architecture});
      if (class_fits && (model_type == nullptr || *model_type == family.name)) family_ = &family;
    }
    if (family_ != nullptr) {
      config_.family = family_->name;
      return absl::OkStatus();
    }
    return Invalid("architecture ", architectures == nullptr ? "null" : Text(*architectures),
                   " with model_type ", model_type == nullptr ? "null" : Text(*model_type),
                   " is not supported; supported are ", supported);
  }

  absl::Status RefuseUnknownMathematics() const {
    for (const NeutralSetting& setting : kNeutralSettings) {
      const json* value = Get(json_, setting.key);
      if (value == nullptr) continue;
      const bool neutral = value->is_boolean()
                               ? value->get<bool>() == (setting.neutral != 0)
                               : value->is_number() && value->get<double>() == setting.neutral;
      if (!neutral) return Invalid(setting.key, " = ", Text(*value), " is not supported");
    }
    LK_RETURN_IF_ERROR(CheckQuantization());
    for (const char* key : {"hidden_act", "hidden_activation"}) {
      const json* value = Get(json_, key);
      if (value != nullptr && *value != "silu" && *value != "swish") {
        return Invalid(key, " = ", Text(*value), " is not supported; silu is");
      }
    }
    return absl::OkStatus();
  }

  // bitsandbytes' NF4, and who writes FP8: the tensors say how they are stored, and those of other
  // schemes find no place in the model.
  absl::Status CheckQuantization() const {
    constexpr const char* kSupported = "; bitsandbytes' nf4, fp8, F32, F16 and BF16 are";
    if (const json* value = Get(json_, "compression_config")) {
      return Invalid("compression_config = ", Text(*value), " is not supported", kSupported);
    }
    const json* quantization = Get(json_, "quantization_config");
    if (quantization == nullptr) return absl::OkStatus();
    const auto is = [quantization](const char* key, const json& expected) {
      const auto it = quantization->find(key);
      return it != quantization->end() && *it == expected;
    };
    for (const char* method : {"compressed-tensors", "fp8", "fbgemm_fp8", "modelopt"}) {
      if (!is("quant_method", method)) continue;
      const json* block = Get(*quantization, "weight_block_size");
      if (block != nullptr && *block != json::array({kFp8Block, kFp8Block})) {
        return Invalid("weight_block_size = ", Text(*block), " is not supported; [", kFp8Block, ", ",
                       kFp8Block, "] is");
      }
      const json* transforms = Get(*quantization, "transform_config");
      if (transforms == nullptr || transforms->empty()) return absl::OkStatus();
      return Invalid("transform_config = ", Text(*transforms), " is not supported");
    }
    if (!is("quant_method", "bitsandbytes")) {
      return Invalid("quantization_config = ", Text(*quantization), " is not supported", kSupported);
    }
    if (!is("load_in_4bit", true)) {
      return Invalid("quantization_config of bitsandbytes without load_in_4bit, as for LLM.int8, is "
                     "not supported", kSupported);
    }
    if (is("bnb_4bit_quant_type", "nf4")) return absl::OkStatus();
    const json* type = Get(*quantization, "bnb_4bit_quant_type");
    return Invalid("bnb_4bit_quant_type is ", type == nullptr ? "\"fp4\" by default" : Text(*type),
                   ", which is not supported", kSupported);
  }

  absl::Status ReadSizes() {
    LK_ASSIGN_OR_RETURN(config_.layers, RequiredInt("num_hidden_layers", 4096));
    LK_ASSIGN_OR_RETURN(config_.hidden, RequiredInt("hidden_size", kMaxWidth));
    LK_ASSIGN_OR_RETURN(config_.ffn, RequiredInt("intermediate_size", kMaxWidth));
    LK_ASSIGN_OR_RETURN(config_.heads, RequiredInt("num_attention_heads", 4096));
    LK_ASSIGN_OR_RETURN(config_.vocab, RequiredInt("vocab_size", 1 << 24));
    LK_ASSIGN_OR_RETURN(config_.context, RequiredInt("max_position_embeddings", 1 << 30));
    // Null means "one for each query head" in every family; absent means the family's own number.
    const bool kv_default = !json_.contains("num_key_value_heads") && family_->kv_heads != 0;
    LK_ASSIGN_OR_RETURN(
        config_.kv_heads,
        Int("num_key_value_heads", kv_default ? family_->kv_heads : config_.heads, 4096));
    if (Get(json_, "head_dim") == nullptr && family_->head_dim == 0 &&
        config_.hidden % config_.heads != 0) {
      return Invalid("hidden_size ", config_.hidden, " is not a multiple of num_attention_heads ",
                     config_.heads, ", and head_dim is missing");
    }
    LK_ASSIGN_OR_RETURN(
        config_.head_dim,
        Int("head_dim", family_->head_dim != 0 ? family_->head_dim : config_.hidden / config_.heads,
            1 << 14));
    LK_ASSIGN_OR_RETURN(config_.norm_eps, Positive(json_, "rms_norm_eps", Is("mixtral") ? 1e-5 : 1e-6));
    return absl::OkStatus();
  }

  absl::Status ReadExperts() {
    if (!Is("mixtral") && !Is("qwen3_moe")) return RefuseExperts();
    const bool mixtral = Is("mixtral");
    // Transformers 5 writes the first name for both families, before it was Mixtral's.
    const char* key = Get(json_, "num_local_experts") != nullptr ? "num_local_experts" : "num_experts";
    LK_ASSIGN_OR_RETURN(config_.experts, Int(key, mixtral ? 8 : 128, kMaxExperts));
    LK_ASSIGN_OR_RETURN(config_.experts_per_token,
                        Int("num_experts_per_tok", mixtral ? 2 : 8, kMaxExperts));
    config_.layer_has_experts.assign(config_.layers, 1);
    if (mixtral) {
      config_.expert_ffn = config_.ffn;
      config_.normalise_experts = true;
      return absl::OkStatus();
    }
    LK_ASSIGN_OR_RETURN(config_.expert_ffn, Int("moe_intermediate_size", 768, kMaxWidth));
    LK_ASSIGN_OR_RETURN(config_.normalise_experts, Flag("norm_topk_prob", false));
    return ReadDenseLayers();
  }

  absl::Status RefuseExperts() const {
    for (const char* key : {"num_experts", "num_local_experts"}) {
      const json* value = Get(json_, key);
      if (value == nullptr || *value == 0) continue;
      return Invalid(key, " = ", Text(*value), " is not supported for ", config_.family);
    }
    return absl::OkStatus();
  }

  // Qwen's layers with experts: every decoder_sparse_step-th but those of mlp_only_layers.
  absl::Status ReadDenseLayers() {
    LK_ASSIGN_OR_RETURN(const int32_t step, Int("decoder_sparse_step", 1, 4096));
    for (int32_t i = 0; i < config_.layers; ++i) {
      config_.layer_has_experts[i] = (i + 1) % step == 0;
    }
    const json* dense = Get(json_, "mlp_only_layers");
    if (dense == nullptr) return absl::OkStatus();
    if (!dense->is_array()) {
      return Invalid("mlp_only_layers is ", Text(*dense), "; it must be a list of layers");
    }
    for (const json& layer : *dense) {
      LK_ASSIGN_OR_RETURN(const int32_t index, ToInt("mlp_only_layers", layer, 0, config_.layers - 1));
      config_.layer_has_experts[index] = 0;
    }
    return absl::OkStatus();
  }

  absl::Status ReadFlags() {
    LK_ASSIGN_OR_RETURN(config_.tied_head, Flag("tie_word_embeddings", family_->tied_head));
    if (Is("llama") || Is("smollm3") || IsQwen3()) {
      LK_ASSIGN_OR_RETURN(config_.qkv_bias, Flag("attention_bias", false));
      config_.o_bias = config_.qkv_bias;
    }
    if (Is("llama") || Is("smollm3")) {
      LK_ASSIGN_OR_RETURN(config_.mlp_bias, Flag("mlp_bias", false));
    }
    if (Is("qwen2")) config_.qkv_bias = true;
    config_.qk_norm = IsQwen3();
    return absl::OkStatus();
  }

  // Transformers 5 has one object "rope_parameters"; before, "rope_scaling" stood beside
  // "rope_theta", and its "rope_type" was called "type".
  absl::Status ReadRope() {
    static const json kNone = json::object();
    const char* name = Get(json_, "rope_scaling") != nullptr ? "rope_scaling" : "rope_parameters";
    const json* found = Get(json_, name);
    const json& rope = found == nullptr ? kNone : *found;
    if (!rope.is_object()) return Invalid(name, " is ", Text(rope), "; it must be an object");

    const json& theta_owner = Get(rope, "rope_theta") != nullptr ? rope : json_;
    LK_ASSIGN_OR_RETURN(const float theta,
                        Positive(theta_owner, "rope_theta", family_->rope_theta));
    config_.rope_inverse_frequencies = RopeInverseFrequencies(config_.head_dim, theta);

    const json* type = Get(rope, "rope_type");
    if (type == nullptr) type = Get(rope, "type");
    if (type == nullptr || *type == "default") return CheckRopeKeys(name, rope, {});
    if (*type == "linear") {
      LK_RETURN_IF_ERROR(CheckRopeKeys(name, rope, {"factor", "original_max_position_embeddings"}));
      LK_ASSIGN_OR_RETURN(const float factor, Positive(rope, "factor", 0));
      ScaleRopeLinear(factor, config_.rope_inverse_frequencies);
      return absl::OkStatus();
    }
    if (*type == "llama3") return ReadLlama3(name, rope);
    return Invalid(name, " has type ", Text(*type),
                   ", which is not supported; default, linear and llama3 are");
  }

  absl::Status ReadLlama3(const char* name, const json& rope) {
    LK_RETURN_IF_ERROR(CheckRopeKeys(
        name, rope,
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}));
    constexpr const char* kOriginal = "original_max_position_embeddings";
    const json& original_owner = Get(json_, kOriginal) != nullptr ? json_ : rope;
    Llama3Scaling scaling;
    LK_ASSIGN_OR_RETURN(scaling.factor, Positive(rope, "factor", 0));
    LK_ASSIGN_OR_RETURN(scaling.low_freq_factor, Positive(rope, "low_freq_factor", 0));
    LK_ASSIGN_OR_RETURN(scaling.high_freq_factor, Positive(rope, "high_freq_factor", 0));
    LK_ASSIGN_OR_RETURN(scaling.original_context,
                        Positive(original_owner, kOriginal, config_.context));
    if (scaling.high_freq_factor <= scaling.low_freq_factor) {
      return Invalid(name, ": high_freq_factor ", scaling.high_freq_factor,
                     " must be above low_freq_factor ", scaling.low_freq_factor);
    }
    ScaleRopeLlama3(scaling, config_.rope_inverse_frequencies);
    return absl::OkStatus();
  }

  // Every number of this object changes angles, so one that is not known is not skipped. Settings
  // nested by layer type end here too.
  absl::Status CheckRopeKeys(const char* name, const json& rope,
                             std::initializer_list<const char*> known) const {
    for (const auto& [key, value] : rope.items()) {
      if (value.is_null() || key == "rope_type" || key == "type" || key == "rope_theta") continue;
      if (key == "partial_rotary_factor" && value == 1.0) continue;
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      return Invalid(name, ".", key, " = ", Text(value), " is not supported");
    }
    return absl::OkStatus();
  }

  // SmolLM3's no_rope_layers has a 1 where a layer does use rotary embedding.
  absl::Status ReadRopeLayers() {
    config_.layer_uses_rope.assign(config_.layers, 1);
    const json* layers = Get(json_, "no_rope_layers");
    if (!Is("smollm3")) {
      if (layers == nullptr || layers->empty()) return absl::OkStatus();
      return Invalid("no_rope_layers is not supported for ", config_.family);
    }
    if (layers == nullptr) {
      LK_ASSIGN_OR_RETURN(const int32_t interval, Int("no_rope_layer_interval", 4, 4096));
      for (int32_t i = 0; i < config_.layers; ++i) {
        config_.layer_uses_rope[i] = (i + 1) % interval != 0;
      }
      return absl::OkStatus();
    }
    if (!layers->is_array() || layers->size() < config_.layer_uses_rope.size()) {
      return Invalid("no_rope_layers is ", Text(*layers), "; it must be a list of ", config_.layers,
                     " numbers");
    }
    for (int32_t i = 0; i < config_.layers; ++i) {
      LK_ASSIGN_OR_RETURN(const int32_t uses, ToInt("no_rope_layers", (*layers)[i], 0, 1));
      config_.layer_uses_rope[i] = static_cast<uint8_t>(uses);
    }
    return absl::OkStatus();
  }

  absl::Status ReadWindow() {
    config_.layer_uses_window.assign(config_.layers, 0);
    int32_t window = 0;
    if (Is("mistral") || Is("mixtral")) {
      const int32_t fallback = Is("mixtral") || json_.contains("sliding_window") ? 0 : 4096;
      LK_ASSIGN_OR_RETURN(window, Int("sliding_window", fallback, 1 << 30));
      config_.layer_uses_window.assign(config_.layers, window > 0);
    } else if (!Is("llama")) {
      LK_ASSIGN_OR_RETURN(const bool enabled, Flag("use_sliding_window", false));
      const bool absent = !json_.contains("sliding_window") && !Is("smollm3");
      if (enabled) {
        LK_ASSIGN_OR_RETURN(window, Int("sliding_window", absent ? 4096 : 0, 1 << 30));
      }
      LK_RETURN_IF_ERROR(ReadDefaultWindowLayers(window));
    }
    LK_RETURN_IF_ERROR(ReadLayerTypes(window));
    const auto& uses = config_.layer_uses_window;
    config_.sliding_window = std::find(uses.begin(), uses.end(), 1) == uses.end() ? 0 : window;
    return absl::OkStatus();
  }

  // The layers with a window where no layer_types say: SmolLM3's layers without rotary embedding,
  // Qwen's from max_window_layers on, all of Qwen's with experts.
  absl::Status ReadDefaultWindowLayers(int32_t window) {
    if (window == 0) return absl::OkStatus();
    int32_t first = 0;
    if (!Is("smollm3") && !Is("qwen3_moe")) {
      const json* value = Get(json_, "max_window_layers");
      first = 28;
      if (value != nullptr) {
        LK_ASSIGN_OR_RETURN(first, ToInt("max_window_layers", *value, 0, 1 << 30));
      }
    }
    for (int32_t i = first; i < config_.layers; ++i) {
      config_.layer_uses_window[i] = !Is("smollm3") || !config_.layer_uses_rope[i];
    }
    return absl::OkStatus();
  }

  absl::Status ReadLayerTypes(int32_t window) {
    const json* types = Get(json_, "layer_types");
    if (types == nullptr) return absl::OkStatus();
    if (!types->is_array() || types->size() != config_.layer_uses_window.size()) {
      return Invalid("layer_types is ", Text(*types), "; it must be a list of ", config_.layers,
                     " names");
    }
    // Transformers' classes for these do not look at layer_types.
    const bool fixed = Is("llama") || Is("mistral") || Is("mixtral") || Is("qwen3_moe");
    for (int32_t i = 0; i < config_.layers; ++i) {
      const json& type = (*types)[i];
      const bool sliding = type == "sliding_attention";
      if (!sliding && type != "full_attention") {
        return Invalid("layer_types[", i, "] = ", Text(type),
                       " is not supported; full_attention and sliding_attention are");
      }
      if (fixed && sliding != (config_.layer_uses_window[i] != 0)) {
        return Invalid("layer_types[", i, "] = ", Text(type), " contradicts sliding_window of ",
                       config_.family);
      }
      config_.layer_uses_window[i] = sliding && window > 0;
    }
    return absl::OkStatus();
  }

  absl::Status ReadEosIds() {
    const json* eos = generation_.is_object() ? Get(generation_, "eos_token_id") : nullptr;
    if (eos == nullptr) eos = Get(json_, "eos_token_id");
    const json fallback = json_.contains("eos_token_id") ? json::array() : json{family_->eos_id};
    if (eos == nullptr) eos = &fallback;
    const json ids = eos->is_array() ? *eos : json::array({*eos});
    for (const json& id : ids) {
      if (!id.is_number_integer()) {
        return Invalid("eos_token_id is ", Text(*eos), "; it must be an integer or a list of them");
      }
      // A default of the configuration class may lie outside a small vocabulary: never generated.
      if (id >= 0 && id < config_.vocab) config_.eos_ids.push_back(id.get<int32_t>());
    }
    std::sort(config_.eos_ids.begin(), config_.eos_ids.end());
    config_.eos_ids.erase(std::unique(config_.eos_ids.begin(), config_.eos_ids.end()),
                          config_.eos_ids.end());
    return absl::OkStatus();
  }

  const json& json_;
  const json& generation_;
  std::string where_;
  const Family* family_ = nullptr;
  ModelConfig config_;
};

}  // namespace

absl::StatusOr<ModelConfig> ParseHfConfig(const json& config, const json& generation,
                                          std::string_view where) {
  return HfConfigReader(config, generation, where).Read();
}

}  // namespace lorikeet
