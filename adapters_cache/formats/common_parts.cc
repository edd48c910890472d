#include "adapters_cache/formats/common_parts.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

// Of every PEFT configuration, without effect on inference or read by CommonParts and PeftTargets.
constexpr std::string_view kCommonKeys =
    "auto_mapping base_model_name_or_path bias exclude_modules inference_mode init_weights "
    "layers_pattern layers_to_transform modules_to_save peft_type peft_version revision "
    "runtime_config target_modules task_type trainable_token_indices fan_in_fan_out module_dropout "
    "ensure_weight_tying monteclora_config megatron_core";

bool Lists(std::string_view words, std::string_view word) {
  for (size_t at = words.find(word); at != std::string_view::npos; at = words.find(word, at + 1)) {
    const size_t end = at + word.size();
    if ((at == 0 || words[at - 1] == ' ') && (end == words.size() || words[end] == ' ')) return true;
  }
  return false;
}

// PEFT's rule of modules_to_save: "norm" is every norm.
bool EndsWithAny(std::string_view path, const std::vector<std::string>& names) {
  return std::ranges::any_of(names, [path](const std::string& name) { return path.ends_with(name); });
}

}  // namespace

bool IsSet(const Json& value) {
  if (value.is_null() || (value.is_boolean() && !value.get<bool>())) return false;
  return !(value.is_structured() && value.empty()) && value != "";
}

std::string InitOf(const Json& config) {
  const auto init = config.find("init_lora_weights");
  return init == config.end() || !init->is_string() ? "" : absl::AsciiStrToLower(init->get<std::string>());
}

bool TrainsOnResidual(const Json& config) {
  const std::string init = InitOf(config);
  return init == "pissa" || init == "olora";
}

absl::StatusOr<int64_t> TaskOf(const Json& config, int64_t tasks) {
  const auto it = config.find("task_id");
  if (it == config.end() || it->is_null()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the adapter is of ", tasks, " tasks: add \"task_id\", 0 to ", tasks - 1,
        ", to its adapter_config.json, and load a directory with another for each task that is wanted"));
  }
  if (it->is_number_integer() && *it >= 0 && *it < tasks) return it->get<int64_t>();
  return absl::InvalidArgumentError(absl::StrCat("task_id is ", it->dump(), "; the adapter is of tasks 0 to ", tasks - 1));
}

bool StripSuffix(std::string_view* text, std::string_view suffix) {
  if (text->size() <= suffix.size() || !text->ends_with(suffix)) return false;
  text->remove_suffix(suffix.size());
  return true;
}

std::string CanonicalName(std::string_view name) {
  for (const std::string_view prefix : {"base_model.model.", "base_model."}) {
    if (!name.starts_with(prefix)) continue;
    name.remove_prefix(prefix.size());
    break;
  }
  constexpr std::string_view kInfix = ".default";
  std::string canonical(name);
  for (size_t at = canonical.find(kInfix); at != std::string::npos; at = canonical.find(kInfix, at)) {
    const size_t end = at + kInfix.size();
    if (end == canonical.size() || canonical[end] == '.') canonical.erase(at, kInfix.size());
    else at = end;
  }
  return canonical;
}

void WarnOfUnknownKeys(const Json& config, std::string_view keys, RawAdapter* raw) {
  for (const auto& [key, value] : config.items()) {
    if (!IsSet(value) || Lists(kCommonKeys, key) || Lists(keys, key)) continue;
    raw->warnings.push_back("adapter_config.json: unknown key '" + key + "' is ignored");
  }
}

CommonParts::CommonParts(const Json& config, const std::string& method, RawAdapter* raw,
                         Problems* problems)
    : raw_(raw) {
  const auto task = config.find("task_type");
  if (task != config.end() && !task->is_null() && *task != "CAUSAL_LM") {
    problems->Unserved(
        absl::StrCat("task_type ", task->dump(), ": only CAUSAL_LM generates text"));
  }
  const auto bias = config.find("bias");
  if (bias != config.end() && !bias->is_null() && *bias != "none") {
    base_bias_ = *bias == "all" || *bias == method + "_only";
    if (!base_bias_) {
      problems->Invalid("bias is " + bias->dump() + "; \"none\", \"all\" or \"" + method +
                        "_only\"");
    }
  }
  const auto saved = config.find("modules_to_save");
  if (saved != config.end() && IsSet(*saved)) {
    if (!saved->is_array()) problems->Invalid("modules_to_save is not a list");
    for (const Json& name : *saved) {
      if (name.is_string()) saved_.push_back(name.get<std::string>());
      else problems->Invalid("modules_to_save holds " + name.dump() + ", not a name");
    }
  }
  ReadTokenIndices(config, problems);
  if (!saved_.empty()) raw_->parts.saves = [names = saved_](std::string_view path) { return EndsWithAny(path, names); };
  // A tied head then follows the saved embedding, and PEFT stores it beside that without naming it.
  const auto tied = config.find("ensure_weight_tying");
  if (tied != config.end() && *tied == true && Saves(kEmbeddingPath)) saved_.emplace_back(kHeadPath);
  if (const auto it = config.find("layer_replication"); it != config.end() && IsSet(*it)) {
    absl::StatusOr<LayerReplication> replication = ParseLayerReplication(it->dump());
    if (replication.ok()) raw->layer_replication = *std::move(replication);
    else problems->Add(replication.status());
  }
}

void CommonParts::ReadTokenIndices(const Json& config, Problems* problems) {
  const auto it = config.find("trainable_token_indices");
  if (it == config.end() || !IsSet(*it)) return;
  const Json by_module = it->is_array() ? Json{{"embed_tokens", *it}} : *it;
  const auto whole = [](const Json& index) {
    return index.is_number_integer() && index >= 0 && index <= INT32_MAX;
  };
  for (const auto& [module, indices] : by_module.items()) {
    if (!indices.is_array() || !std::all_of(indices.begin(), indices.end(), whole)) {
      problems->Invalid("trainable_token_indices holds " + indices.dump() + ", no list of token ids");
      continue;
    }
    raw_->parts.token_indices[module] = indices.get<std::vector<int64_t>>();
  }
}

bool CommonParts::PlaceSaved(std::string_view canonical, const std::string& name,
                             const TensorView& view) {
  if (canonical.find(".original_module.") != std::string_view::npos) return true;
  std::string path(canonical);
  constexpr std::string_view kInfix = ".modules_to_save";
  if (const size_t at = path.find(kInfix); at != std::string::npos) path.erase(at, kInfix.size());
  const std::string module = path.substr(0, path.rfind('.'));
  if (!Saves(module)) return false;
  raw_->parts.saved.emplace(path, RawTensor{name, view});
  return true;
}

bool CommonParts::Saves(std::string_view module) const { return EndsWithAny(module, saved_); }

bool CommonParts::PlaceCopy(const std::string& name, const TensorView& view,
                            std::optional<RawTensor>* copy) {
  if (copy->has_value()) return false;
  *copy = RawTensor{name, view};
  return true;
}

bool CommonParts::Place(std::string_view canonical, const std::string& name,
                        const TensorView& view) {
  std::string_view path = canonical;
  if (StripSuffix(&path, ".token_adapter.trainable_tokens_delta") ||
      StripSuffix(&path, ".trainable_tokens_delta")) {
    raw_->parts.token_rows.emplace(std::string(path), RawTensor{name, view});
    return true;
  }
  if (PlaceSaved(canonical, name, view)) return true;
  // Stored where a table is targeted or has more tokens than the base's.
  for (const char* layer : {".base_layer.weight", ".token_adapter.base_layer.weight", ".weight"}) {
    std::string_view table = path;
    if (!StripSuffix(&table, layer)) continue;
    if (table == "model.embed_tokens") return PlaceCopy(name, view, &raw_->parts.embedding_copy);
    if (table == "lm_head") return PlaceCopy(name, view, &raw_->parts.head_copy);
  }
  if (base_bias_ && (StripSuffix(&path, ".base_layer.bias") || StripSuffix(&path, ".bias"))) {
    raw_->modules[std::string(path)].base_bias = RawTensor{name, view};
    return true;
  }
  return false;
}

}  // namespace lorikeet
