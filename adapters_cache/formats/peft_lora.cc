#include "adapters_cache/formats/peft_lora.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/arrow.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/methods.h"
#include "adapters_cache/formats/peft_targets.h"
#include "engine/api/limits.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

// Options that change the result and are not served. "Set" is anything but null, false and empty.
struct RefusedOption {
  std::string_view key;
  const char* reason;
};
constexpr RefusedOption kRefusedOptions[] = {
    {"megatron_config", "it is laid out for Megatron"},
};

// Options without effect on inference, or read elsewhere in this file or by PeftTargets.
constexpr std::array kKnownOptions = std::to_array<std::string_view>({
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "kasa_config",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "layer_replication",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "monteclora_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
});

struct LoraOptions {
  int64_t rank = 8;
  double alpha = 8;
  PeftPatternValues rank_pattern;
  PeftPatternValues alpha_pattern;
  bool rslora = false;
  bool dora = false;
  bool lora_bias = false;
};

// What `key` holds, or `fallback` when it is absent or null, reporting any other type.
double ReadNumber(const Json& config, const char* key, double fallback, Problems* problems) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return fallback;
  if (it->is_number()) return it->get<double>();
  problems->Invalid(absl::StrCat(key, " is ", it->dump(), ", not a number"));
  return fallback;
}

bool ReadBool(const Json& config, const char* key, Problems* problems) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return false;
  if (it->is_boolean()) return it->get<bool>();
  problems->Invalid(absl::StrCat(key, " is ", it->dump(), ", neither true nor false"));
  return false;
}

void CheckInit(const Json& config, Problems* problems) {
  const auto it = config.find("init_lora_weights");
  if (it == config.end() || it->is_null() || it->is_boolean()) return;
  std::string init = it->is_string() ? it->get<std::string>() : it->dump();
  for (char& c : init) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  for (const char* plain : {"gaussian", "eva", "orthogonal", "mica", "pissa", "olora"}) {
    if (init == plain) return;
  }
  for (const char* residual : {"pissa", "corda", "loftq", "lora_ga"}) {
    if (!std::string_view(init).starts_with(residual)) continue;
    problems->Unserved(
        absl::StrCat("init_lora_weights '", init,
                     "' trained against a changed base. Convert it to plain LoRA: "
                     "save_pretrained(..., path_initial_model_for_weight_conversion=...) in PEFT"));
    return;
  }
  problems->Unserved(absl::StrCat("init_lora_weights '", init, "' is unknown"));
}

}  // namespace

void CheckLoraOptions(const Json& config, std::vector<std::string>* warnings, Problems* problems) {
  for (const auto& [key, value] : config.items()) {
    if (!IsSet(value)) continue;
    const auto refused =
        std::find_if(std::begin(kRefusedOptions), std::end(kRefusedOptions),
                     [&key = key](const RefusedOption& option) { return option.key == key; });
    if (refused != std::end(kRefusedOptions)) {
      problems->Unserved(absl::StrCat(key, " is not served: ", refused->reason));
    } else if (std::find(kKnownOptions.begin(), kKnownOptions.end(), key) == kKnownOptions.end()) {
      warnings->push_back("adapter_config.json: unknown key '" + key + "' is ignored");
    }
  }
  CheckInit(config, problems);
  if (ReadBool(config, "fan_in_fan_out", problems)) {
    warnings->push_back("fan_in_fan_out is ignored: the base's linears are stored [out, in]");
  }
}

namespace {

LoraOptions ReadOptions(const Json& config, Problems* problems) {
  LoraOptions options;
  const double rank = ReadNumber(config, "r", 8, problems);
  if (rank >= 1 && rank <= Limits::kMaxAdapterRank && rank == std::floor(rank)) {
    options.rank = static_cast<int64_t>(rank);
  } else {
    problems->Invalid(absl::StrCat("r is ", config.at("r").dump(),
                                   "; a rank is a whole number of 1 to ", Limits::kMaxAdapterRank));
  }
  options.alpha = ReadNumber(config, "lora_alpha", 8, problems);
  options.rank_pattern = PeftPatternValues::Parse(config, "rank_pattern", problems);
  options.alpha_pattern = PeftPatternValues::Parse(config, "alpha_pattern", problems);
  options.rslora = ReadBool(config, "use_rslora", problems);
  options.dora = ReadBool(config, "use_dora", problems);
  options.lora_bias = ReadBool(config, "lora_bias", problems);
  if (options.lora_bias && options.dora) {
    problems->Invalid("lora_bias and use_dora exclude each other");
  }
  return options;
}

// As Transformers 5 calls them, in the order of its modules.
constexpr const char* kExpertParameters[] = {"gate_up_proj", "down_proj"};

class LoraReader {
 public:
  LoraReader(const AdapterFiles& files, RawAdapter* raw, Problems* problems)
      : files_(files),
        raw_(raw),
        problems_(problems),
        common_(files.config, "lora", raw, problems) {}

  void Read() {
    ReadInvocation();
    ReadTargetParameters();
    CheckLoraOptions(files_.config, &raw_->warnings, problems_);
    options_ = ReadOptions(files_.config, problems_);
    raw_->variant = !raw_->parts.invocation_tokens.empty() ? "alora"
                    : options_.dora                        ? "dora"
                    : options_.rslora                      ? "rslora"
                                                           : "lora";
    auto targets = PeftTargets::Parse(files_.config, problems_);
    for (const auto& [name, view] : files_.tensors.tensors()) Place(name, view);
    if (!unused_.empty()) {
      problems_->Invalid(absl::StrCat(
          unused_.size(), " tensors have no place in this adapter: ", ListNames(unused_)));
    }
    if (raw_->modules.empty() && raw_->parameters.pairs.empty() && problems_->empty()) {
      problems_->Invalid("the file holds no LoRA tensors");
    }
    for (auto& [path, module] : raw_->modules) Complete(path, &module, false);
    for (auto& [path, pair] : raw_->parameters.pairs) Complete(path, &pair, true);
    FindRelative();
    NoteTargets(std::move(targets));
  }

 private:
  void Place(const std::string& name, const TensorView& view) {
    const std::string canonical = CanonicalName(name);
    std::string_view path = canonical;
    if (StripSuffix(&path, ".lora_A.weight")) return Put(path, &RawModule::a, name, view);
    if (StripSuffix(&path, ".lora_B.weight")) return Put(path, &RawModule::b, name, view);
    if (StripSuffix(&path, ".lora_diag")) return PutRelative(path, "lora_diag", name, view);
    if (StripSuffix(&path, ".default_lora_latent_mapping.weight") ||
        StripSuffix(&path, "_lora_latent_mapping.weight")) {
      return PutRelative(path, "lora_latent_mapping", name, view);
    }
    if (options_.lora_bias && StripSuffix(&path, ".lora_B.bias")) {
      return Put(path, &RawModule::lora_bias, name, view);
    }
    if (options_.dora && (StripSuffix(&path, ".lora_magnitude_vector") ||
                          StripSuffix(&path, ".lora_magnitude_vector.weight"))) {
      return Put(path, &RawModule::magnitude, name, view);
    }
    if (StripSuffix(&path, ".lora_embedding_A")) return Put(path, &RawModule::a, name, view);
    if (StripSuffix(&path, ".lora_embedding_B")) return Put(path, &RawModule::b, name, view);
    // Of the training only: VeLoRA's compressed activations, MonteCLoRA's noise.
    if (path.ends_with(".lora_velora_embed")) return;
    if (path.find(".lora_monteclora_sampler.") != std::string_view::npos) return;
    if (path.find(".lora_") == std::string_view::npos && common_.Place(canonical, name, view)) return;
    unused_.push_back(name);
  }

  void Put(std::string_view path, std::optional<RawTensor> RawModule::*field,
           const std::string& name, const TensorView& view) {
    const std::string parameter = ExpertParameter(path);
    RawModule& module = parameter.empty() ? raw_->modules[std::string(path)]
                                          : raw_->parameters.pairs[parameter];
    std::optional<RawTensor>& tensor = module.*field;
    if (tensor.has_value()) {
      problems_->Invalid(absl::StrCat("two tensors for one place: ", tensor->name, " and ", name));
      return;
    }
    tensor = RawTensor{name, view};
  }

  // The parameter of a layer's experts whose pair PEFT stores at `path`; empty: it is none. PEFT wraps
  // one after the other round the module, in the module's order: each further one puts a base_layer
  // into the names of those before it.
  std::string ExpertParameter(std::string_view path) const {
    int wrappers_outside = 0;
    while (StripSuffix(&path, ".base_layer")) ++wrappers_outside;
    if (!path.ends_with(".experts")) return "";
    std::vector<std::string> wrapped;
    for (const char* name : kExpertParameters) {
      const std::string parameter = absl::StrCat(std::string(path), ".", name);
      if (raw_->parameters.Target(parameter)) wrapped.push_back(parameter);
    }
    const int index = static_cast<int>(wrapped.size()) - 1 - wrappers_outside;
    return index < 0 ? "" : wrapped[index];
  }

  void ReadTargetParameters() {
    const auto names = files_.config.find("target_parameters");
    if (names == files_.config.end() || !IsSet(*names)) return;
    const auto is_name = [](const Json& name) { return name.is_string(); };
    if (!names->is_array() || !std::all_of(names->begin(), names->end(), is_name)) {
      problems_->Invalid("target_parameters is " + names->dump() + ", no list of names");
      return;
    }
    raw_->parameters.targets = names->get<std::vector<std::string>>();
  }

  void PutRelative(std::string_view path, const char* parameter, const std::string& name,
                   const TensorView& view) {
    raw_->modules[std::string(path)].tensors.emplace(parameter, RawTensor{name, view});
    relative_ = true;
  }

  // PiSSA and the like: what the pairs come to depends on more than themselves.
  void FindRelative() {
    const Json& config = files_.config;
    const auto set = [&config](const char* key) {
      return config.contains(key) && IsSet(config[key]);
    };
    const bool shaped = relative_ || set("use_qalora") || set("use_bdlora") || set("kasa_config");
    if (!shaped && !TrainsOnResidual(config)) return;
    if (options_.lora_bias || (options_.dora && shaped)) {
      problems_->Unserved(
          "use_dora or lora_bias together with use_qalora, use_bdlora, kasa_config or LoRA-XS, and lora_bias "
          "together with PiSSA or OLoRA, are not served");
    }
    raw_->lower = LowerLoraRelative;
    for (auto& [path, module] : raw_->modules) {
      if (!module.a || !module.b || path == kEmbeddingPath) continue;
      if (set("kasa_config") && !module.tensors.contains("lora_diag")) {
        problems_->Invalid("kasa_config asks for " + path + ".lora_diag, which the file does not have");
      }
      module.tensors.emplace("lora_A.weight", *std::exchange(module.a, std::nullopt));
      module.tensors.emplace("lora_B.weight", *std::exchange(module.b, std::nullopt));
      if (!module.magnitude) continue;
      module.tensors.emplace("lora_magnitude_vector", *std::exchange(module.magnitude, std::nullopt));
    }
  }

  void ReadInvocation() {
    const auto tokens = files_.config.find("alora_invocation_tokens");
    if (tokens == files_.config.end() || !IsSet(*tokens)) return;
    const auto is_token = [](const Json& token) {
      return token.is_number_integer() && token >= 0 && token <= INT32_MAX;
    };
    if (!tokens->is_array() || !std::all_of(tokens->begin(), tokens->end(), is_token)) {
      problems_->Invalid("alora_invocation_tokens is " + tokens->dump() + ", no list of token ids");
      return;
    }
    raw_->parts.invocation_tokens = tokens->get<std::vector<int32_t>>();
  }

  // The rank of a module or a parameter as the configuration states it; 0 after reporting.
  int64_t StatedRank(const std::string& path) {
    const std::optional<double> rank = options_.rank_pattern.Find(path);
    if (!rank.has_value()) return options_.rank;
    if (*rank >= 1 && *rank <= Limits::kMaxAdapterRank && *rank == std::floor(*rank)) {
      return static_cast<int64_t>(*rank);
    }
    problems_->Invalid(absl::StrCat(path, ": rank_pattern gives ", *rank,
                                    "; a rank is a whole number of 1 to ",
                                    Limits::kMaxAdapterRank));
    return 0;
  }

  // `of_experts`: the pair has the ranks of all experts.
  void Complete(const std::string& stored, RawModule* module, bool of_experts) {
    const std::string weight = stored + ".weight";
    const std::string& path = raw_->parameters.Target(weight) ? weight : stored;
    if (!module->a && !module->b && !module->lora_bias && !module->magnitude) {
      return;  // a bias alone (bias: all)
    }
    CheckPresent(path, module->a, "lora_A.weight");
    CheckPresent(path, module->b, "lora_B.weight");
    if (options_.lora_bias) CheckPresent(path, module->lora_bias, "lora_B.bias");
    if (options_.dora) CheckPresent(path, module->magnitude, "lora_magnitude_vector");
    const int64_t rank = StatedRank(path);
    if (rank == 0) return;
    module->rank = rank;
    if (module->a) CheckRank(*module->a, 0, rank, of_experts);
    const bool blocks = files_.config.contains("use_bdlora") && IsSet(files_.config["use_bdlora"]);
    if (module->b && !blocks) CheckRank(*module->b, 1, rank, of_experts);

    const double alpha = options_.alpha_pattern.Find(path).value_or(options_.alpha);
    const double divisor = options_.rslora ? std::sqrt(static_cast<double>(rank)) : rank;
    module->scale = static_cast<float>(alpha / divisor);
    if (!std::isfinite(module->scale)) {
      problems_->Invalid(absl::StrCat(path, ": lora_alpha ", alpha, " is out of range"));
    }
  }

  void CheckPresent(const std::string& path, const std::optional<RawTensor>& tensor,
                    std::string_view parameter) {
    if (tensor.has_value()) return;
    problems_->Invalid(
        absl::StrCat(path, " has no ", absl::string_view(parameter.data(), parameter.size())));
  }

  void CheckRank(const RawTensor& tensor, int dimension, int64_t rank, bool of_experts) {
    const TensorView& view = tensor.view;
    const int64_t found = view.shape.size() == 2 ? view.shape[dimension] : 0;
    if (found == rank || (of_experts && found > 0 && found % rank == 0)) return;
    problems_->Invalid(absl::StrCat(
        tensor.name, " is ", ShapeString(view.shape),
        ", but the configuration's rank (r, rank_pattern) asks for ",
        dimension == 0 ? absl::StrCat("[", rank, ", in]") : absl::StrCat("[out, ", rank, "]"),
        of_experts ? " for each expert" : ""));
  }

  void NoteTargets(PeftTargets targets) {
    if (!targets.stated()) {
      if (!raw_->parameters.targets.empty()) return;
      raw_->warnings.push_back("target_modules is not stated: whatever the file holds is applied");
      return;
    }
    std::vector<std::string> extra;
    for (const auto& [path, module] : raw_->modules) {
      const bool asked = targets.Match(path) || raw_->parameters.Target(path + ".weight");
      if (module.has_delta() && !asked) extra.push_back(path);
    }
    if (!extra.empty()) {
      raw_->warnings.push_back(
          "the file holds weights of modules that its target_modules leave out; they are "
          "applied: " +
          ListNames(extra));
    }
    raw_->targets = [targets = std::move(targets)](std::string_view path) {
      return targets.Match(path);
    };
  }

  const AdapterFiles& files_;
  RawAdapter* raw_;
  Problems* problems_;
  LoraOptions options_;
  std::vector<std::string> unused_;
  CommonParts common_;
  bool relative_ = false;  // a tensor said so; see FindRelative
};

}  // namespace

void ParsePeftLora(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  if (IsArrow(files.config)) return ParseArrow(files, raw, problems);
  LoraReader(files, raw, problems).Read();
}

}  // namespace lorikeet
