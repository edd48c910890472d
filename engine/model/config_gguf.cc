#include "engine/model/config_gguf.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/model/config_rope.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

struct Architecture {
  const char* name;
  bool permuted_qk;
};

// Mistral's and Mixtral's files call themselves llama.
constexpr Architecture kArchitectures[] = {
    {"llama", true}, {"smollm3", true}, {"qwen2", false}, {"qwen3", false}, {"qwen3moe", false}};

std::string ValueText(const GgufValue& value) {
  return std::visit(
      [](const auto& v) -> std::string {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, std::string>) {
          return absl::StrCat("\"", v.substr(0, 100), "\"");
        } else if constexpr (std::is_arithmetic_v<T>) {
          return absl::StrCat(v);
        } else {
          return absl::StrCat("a list of ", v.size());
        }
      },
      value);
}

// 0, false, "" or an empty list: the setting is off.
bool IsOff(const GgufValue& value) {
  return std::visit(
      [](const auto& v) {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_arithmetic_v<T>) {
          return v == 0;
        } else {
          return v.empty();
        }
      },
      value);
}

class GgufConfigReader {
 public:
  GgufConfigReader(const GgufFile& file, std::string_view where) : file_(file), where_(where) {}

  absl::StatusOr<ModelConfig> Read() {
    LK_RETURN_IF_ERROR(ReadArchitecture());
    LK_RETURN_IF_ERROR(ReadSizes());
    LK_RETURN_IF_ERROR(ReadExperts());
    LK_RETURN_IF_ERROR(ReadRope());
    LK_RETURN_IF_ERROR(ReadWindow());
    LK_RETURN_IF_ERROR(RefuseUnknownKeys());
    ReadBiases();
    LK_RETURN_IF_ERROR(ReadEosIds());
    LK_RETURN_IF_ERROR(CheckConfig(config_, where_));
    return std::move(config_);
  }

 private:
  template <typename... Parts>
  absl::Status Invalid(const Parts&... parts) const {
    return absl::InvalidArgumentError(absl::StrCat(where_, ": ", parts...));
  }

  const GgufValue* Find(const std::string& key) const {
    const auto it = file_.metadata.find(key);
    return it == file_.metadata.end() ? nullptr : &it->second;
  }
  // A key of the architecture, which from here on counts as known.
  const GgufValue* Take(const std::string& key) {
    taken_.insert(key);
    return Find(key);
  }
  std::string Key(const char* suffix) const { return absl::StrCat(config_.family, ".", suffix); }

  // Some files give a list with one number a layer: legal where all are equal.
  absl::StatusOr<int32_t> Int(const char* suffix, int32_t fallback, int64_t min, int64_t max) {
    const std::string key = Key(suffix);
    const GgufValue* value = Take(key);
    if (value == nullptr) {
      if (fallback != 0) return fallback;
      return Invalid(key, " is missing");
    }
    const int64_t* number = std::get_if<int64_t>(value);
    if (const auto* list = std::get_if<std::vector<int64_t>>(value); list && !list->empty()) {
      if (std::adjacent_find(list->begin(), list->end(), std::not_equal_to<>()) != list->end()) {
        return Invalid(key, " differs between layers, which is not supported");
      }
      number = &list->front();
    }
    if (number != nullptr && *number >= min && *number <= max) {
      return static_cast<int32_t>(*number);
    }
    return Invalid(key, " is ", ValueText(*value), "; it must be an integer from ", min, " to ",
                   max);
  }
  absl::StatusOr<float> Positive(const char* suffix, double fallback) {
    const std::string key = Key(suffix);
    const GgufValue* value = Take(key);
    if (value == nullptr && fallback == 0) return Invalid(key, " is missing");
    const double* number = value == nullptr ? &fallback : std::get_if<double>(value);
    if (number != nullptr) {
      const float rounded = static_cast<float>(*number);
      if (std::isfinite(rounded) && rounded > 0) return rounded;
    }
    return Invalid(key, " is ", ValueText(*value), "; it must be a number above 0");
  }

  absl::Status ReadArchitecture() {
    if (const GgufValue* type = Find("general.type");
        type != nullptr && *type != GgufValue(std::string("model"))) {
      return Invalid("general.type is ", ValueText(*type), ", not a model");
    }
    if (const GgufValue* parts = Find("split.count");
        parts != nullptr && *parts != GgufValue(int64_t{1}) && !IsOff(*parts)) {
      return Invalid("is one of ", ValueText(*parts),
                     " parts (split.count); merge them into one file");
    }
    const GgufValue* name = Find("general.architecture");
    if (name == nullptr) return Invalid("general.architecture is missing");
    std::string supported;
    for (const Architecture& architecture : kArchitectures) {
      if (*name == GgufValue(std::string(architecture.name))) {
        config_.family = architecture.name;
        return absl::OkStatus();
      }
      absl::StrAppend(&supported, supported.empty() ? "" : ", ", architecture.name);
    }
    return Invalid("general.architecture ", ValueText(*name), " is not supported; supported are ",
                   supported);
  }

  absl::Status ReadSizes() {
    constexpr int64_t kMaxWidth = 1 << 20;
    LK_ASSIGN_OR_RETURN(config_.layers, Int("block_count", 0, 1, 4096));
    LK_ASSIGN_OR_RETURN(config_.hidden, Int("embedding_length", 0, 1, kMaxWidth));
    LK_ASSIGN_OR_RETURN(config_.ffn, Int("feed_forward_length", 0, 1, kMaxWidth));
    LK_ASSIGN_OR_RETURN(config_.heads, Int("attention.head_count", 0, 1, 4096));
    LK_ASSIGN_OR_RETURN(config_.kv_heads, Int("attention.head_count_kv", config_.heads, 1, 4096));
    LK_ASSIGN_OR_RETURN(config_.context, Int("context_length", 0, 1, 1 << 30));
    LK_ASSIGN_OR_RETURN(config_.norm_eps, Positive("attention.layer_norm_rms_epsilon", 0));
    if (Find(Key("attention.key_length")) == nullptr && config_.hidden % config_.heads != 0) {
      return Invalid(Key("embedding_length"), " ", config_.hidden, " is not a multiple of ",
                     config_.heads, " heads, and ", Key("attention.key_length"), " is missing");
    }
    LK_ASSIGN_OR_RETURN(config_.head_dim,
                        Int("attention.key_length", config_.hidden / config_.heads, 1, 1 << 14));
    LK_ASSIGN_OR_RETURN(const int32_t value_dim,
                        Int("attention.value_length", config_.head_dim, 1, 1 << 14));
    if (value_dim != config_.head_dim) {
      return Invalid(Key("attention.value_length"), " ", value_dim, " differs from the key length ",
                     config_.head_dim, ", which is not supported");
    }
    const TensorView* embedding = file_.tensors.Find("token_embd.weight");
    const int64_t rows = embedding == nullptr || embedding->shape.size() != 2
                             ? 0
                             : std::min<int64_t>(embedding->shape[0], 1 << 24);
    LK_ASSIGN_OR_RETURN(config_.vocab, Int("vocab_size", static_cast<int32_t>(rows), 1, 1 << 24));
    return absl::OkStatus();
  }

  // In all layers; both architectures divide the chosen experts' weights by their sum.
  absl::Status ReadExperts() {
    const GgufValue* count = Find(Key("expert_count"));
    const bool required = config_.family == "qwen3moe";
    if (!required && (config_.family != "llama" || count == nullptr || IsOff(*count))) {
      Take(Key("expert_used_count"));  // means nothing without experts
      return absl::OkStatus();
    }
    constexpr int64_t kMaxExperts = 1024;
    LK_ASSIGN_OR_RETURN(config_.experts, Int("expert_count", 0, 1, kMaxExperts));
    LK_ASSIGN_OR_RETURN(config_.experts_per_token, Int("expert_used_count", 0, 1, kMaxExperts));
    LK_ASSIGN_OR_RETURN(config_.expert_ffn,
                        Int("expert_feed_forward_length", required ? 0 : config_.ffn, 1, 1 << 20));
    config_.normalise_experts = true;
    config_.layer_has_experts.assign(config_.layers, 1);
    return absl::OkStatus();
  }

  absl::Status ReadRope() {
    config_.layer_uses_rope.assign(config_.layers, 1);
    if (config_.family == "smollm3") {  // every fourth layer has none; the file does not say it
      for (int32_t i = 3; i < config_.layers; i += 4) config_.layer_uses_rope[i] = 0;
    }
    LK_ASSIGN_OR_RETURN(const int32_t rotated,
                        Int("rope.dimension_count", config_.head_dim, 1, 1 << 14));
    if (rotated != config_.head_dim) {
      return Invalid(Key("rope.dimension_count"), " ", rotated, " of ", config_.head_dim,
                     " values a head: partial rotary embedding is not supported");
    }
    LK_ASSIGN_OR_RETURN(const float theta, Positive("rope.freq_base", 10000.0));
    config_.rope_inverse_frequencies = RopeInverseFrequencies(config_.head_dim, theta);

    const GgufValue* type = Take(Key("rope.scaling.type"));
    Take(Key("rope.scaling.original_context_length"));  // linear scaling does not depend on it
    Take(Key("rope.scaling.finetuned"));
    if (type != nullptr && *type != GgufValue(std::string("none")) &&
        *type != GgufValue(std::string("linear"))) {
      return Invalid(Key("rope.scaling.type"), " ", ValueText(*type),
                     " is not supported; none and linear are");
    }
    // As llama.cpp has it: a factor without a type means linear; scale_linear is its old name.
    if (type == nullptr || *type == GgufValue(std::string("linear"))) {
      LK_ASSIGN_OR_RETURN(const float old_factor, Positive("rope.scale_linear", 1.0));
      LK_ASSIGN_OR_RETURN(const float factor, Positive("rope.scaling.factor", old_factor));
      ScaleRopeLinear(factor, config_.rope_inverse_frequencies);
    } else {
      Take(Key("rope.scaling.factor"));
    }
    return ApplyRopeFactors();
  }

  absl::Status ApplyRopeFactors() {
    const TensorView* tensor = file_.tensors.Find(kGgufRopeFactors);
    if (tensor == nullptr) return absl::OkStatus();
    std::vector<float>& frequencies = config_.rope_inverse_frequencies;
    if (tensor->dtype != DType::kF32 ||
        tensor->shape != std::vector<int64_t>{static_cast<int64_t>(frequencies.size())}) {
      return Invalid("rope_freqs.weight is ", Info(tensor->dtype).name, " ",
                     ShapeString(tensor->shape), "; it must be F32 [", frequencies.size(), "]");
    }
    std::vector<float> factors(frequencies.size());
    Dequantize(tensor->dtype, tensor->bytes.data(), tensor->elements(), factors.data());
    for (size_t i = 0; i < factors.size(); ++i) {
      if (!std::isfinite(factors[i]) || factors[i] <= 0) {
        return Invalid("rope_freqs.weight[", i, "] is ", factors[i],
                       "; it must be a number above 0");
      }
      frequencies[i] /= factors[i];
    }
    return absl::OkStatus();
  }

  // Only llama files (Mistral's) have a window, on every layer.
  absl::Status ReadWindow() {
    config_.layer_uses_window.assign(config_.layers, 0);
    if (config_.family != "llama") return absl::OkStatus();
    const GgufValue* value = Find(Key("attention.sliding_window"));
    if (value == nullptr || IsOff(*value)) return absl::OkStatus();
    LK_ASSIGN_OR_RETURN(config_.sliding_window, Int("attention.sliding_window", 0, 1, 1 << 30));
    config_.layer_uses_window.assign(config_.layers, 1);
    return absl::OkStatus();
  }

  absl::Status RefuseUnknownKeys() {
    Take(Key("tensor_data_layout"));  // describes the q and k rows of the first converters
    const std::string causal = Key("attention.causal");
    if (const GgufValue* value = Take(causal); value != nullptr && IsOff(*value)) {
      return Invalid(causal, " is false, which is not supported");
    }
    const std::string prefix = Key("");
    for (auto it = file_.metadata.lower_bound(prefix);
         it != file_.metadata.end() && it->first.compare(0, prefix.size(), prefix) == 0; ++it) {
      if (taken_.count(it->first) == 0 && !IsOff(it->second)) {
        return Invalid(it->first, " = ", ValueText(it->second), " is not supported");
      }
    }
    return absl::OkStatus();
  }

  // The metadata does not mention biases: the first layer's tensors do, and every layer must then
  // have them.
  void ReadBiases() {
    auto has = [this](const char* name) { return file_.tensors.Find(name) != nullptr; };
    config_.qkv_bias = config_.family == "qwen2" || has("blk.0.attn_q.bias");
    config_.o_bias = has("blk.0.attn_output.bias");
    config_.mlp_bias = has("blk.0.ffn_up.bias");
    config_.qk_norm = config_.family == "qwen3" || config_.family == "qwen3moe";
    config_.tied_head = !has("output.weight");
  }

  // End of text, of turn and of message: a model may use any of them to stop.
  absl::Status ReadEosIds() {
    std::set<int32_t> ids;
    for (const char* name : {"eos", "eot", "eom"}) {
      const std::string key = absl::StrCat("tokenizer.ggml.", name, "_token_id");
      const GgufValue* value = Find(key);
      if (value == nullptr) continue;
      const int64_t* id = std::get_if<int64_t>(value);
      if (id == nullptr || *id < 0 || *id >= config_.vocab) {
        return Invalid(key, " is ", ValueText(*value), "; it must be an integer from 0 to ",
                       config_.vocab - 1);
      }
      ids.insert(static_cast<int32_t>(*id));
    }
    config_.eos_ids.assign(ids.begin(), ids.end());
    return absl::OkStatus();
  }

  const GgufFile& file_;
  std::string where_;
  std::set<std::string> taken_;
  ModelConfig config_;
};

}  // namespace

absl::StatusOr<ModelConfig> ParseGgufConfig(const GgufFile& file, std::string_view where) {
  return GgufConfigReader(file, where).Read();
}

bool GgufPermutesQk(const ModelConfig& config) {
  return std::any_of(std::begin(kArchitectures), std::end(kArchitectures),
                     [&config](const Architecture& architecture) {
                       return config.family == architecture.name && architecture.permuted_qk;
                     });
}

}  // namespace lorikeet
