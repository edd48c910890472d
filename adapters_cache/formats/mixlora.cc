#include "adapters_cache/formats/mixlora.h"

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/peft_lora.h"
#include "adapters_cache/formats/settings.h"
#include "engine/api/limits.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxRouted = 8;  // each is a row more in the MLP's products
constexpr std::string_view kKeys =
    "r lora_alpha lora_dropout lora_init use_rslora use_dora target_modules routing_strategy num_experts "
    "top_k act_fn expert_lora router_aux_loss_coef router_init_range router_loss jitter_noise bias";
constexpr std::string_view kAttention[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
constexpr std::string_view kMlp[] = {"gate_proj", "up_proj", "down_proj"};

// The file becomes PEFT LoRAs, one of attention and one of each expert, whose views are of its bytes.
class MixLoraReader {
 public:
  MixLoraReader(const AdapterFiles& files, RawAdapter* raw, Problems* problems)
      : files_(files), raw_(raw), problems_(problems), settings_(files.config, problems) {}

  void Read() {
    WarnOfUnknownKeys(files_.config, kKeys, raw_);
    const int64_t count = settings_.Whole("num_experts", 0, Limits::kMaxExperts);
    if (count == 0) return problems_->Invalid("num_experts is missing");
    raw_->routed = static_cast<int32_t>(settings_.Whole("top_k", 2, std::min<int64_t>(count, kMaxRouted)));
    if (raw_->routed > count) problems_->Invalid("top_k is missing, and its 2 are more than num_experts");
    CheckSettings();
    const Json attention = Targets(kAttention), mlp = Targets(kMlp);
    if (mlp.empty()) problems_->Invalid("target_modules names no linear of the MLP");
    attention_ = Lora(attention);
    experts_.assign(count, Lora(mlp));
    Deal();
    if (!problems_->empty()) return;
    if (!attention.empty() || !attention_.tensors.tensors().empty()) ParsePeftLora(attention_, raw_, problems_);
    raw_->variant = "mixlora";
    for (size_t e = 0; e < experts_.size(); ++e) ReadExpert(e);
  }

 private:
  void CheckSettings() {
    const Json* strategy = settings_.Get("routing_strategy");
    if (strategy == nullptr || *strategy != "mixlora") {
      problems_->Unserved(absl::StrCat("routing_strategy is ", strategy ? strategy->dump() : "missing",
                                       "; 'mixlora' is served"));
    }
    const Json* activation = settings_.Get("act_fn");
    if (activation != nullptr && *activation != "silu") {
      problems_->Unserved(absl::StrCat("act_fn is ", activation->dump(), "; the base's 'silu' is served"));
    }
    if (settings_.Flag("use_dora", false)) problems_->Unserved("use_dora: its files have no magnitudes");
    if (settings_.Get("expert_lora") != nullptr) {
      problems_->Unserved("expert_lora: experts with settings of their own are not served");
    }
    if (settings_.Number("jitter_noise", 0) != 0) {
      raw_->warnings.push_back("jitter_noise is ignored: it is random");
    }
  }

  // Of the linears in `names`, those that target_modules, a list or true and false by name, asks for.
  Json Targets(std::span<const std::string_view> names) {
    Json found = Json::array();
    const Json* targets = settings_.Get("target_modules");
    if (targets == nullptr || (!targets->is_array() && !targets->is_object())) {
      problems_->Invalid("target_modules is neither a list nor an object");
      return found;
    }
    for (const std::string_view name : names) {
      const std::string key(name);
      const bool asked = targets->is_object() ? targets->value(key, Json()) == true
                                              : std::ranges::find(*targets, Json(key)) != targets->end();
      if (asked) found.push_back(key);
    }
    return found;
  }

  // With the file's bytes and none of its tensors.
  AdapterFiles Lora(const Json& targets) const {
    AdapterFiles lora{.directory = files_.directory, .tensors = files_.tensors};
    for (const auto& [name, view] : files_.tensors.tensors()) lora.tensors.Erase(name);
    lora.config = {{"peft_type", "LORA"}, {"target_modules", targets}};
    for (const char* key : {"base_model_name_or_path", "r", "lora_alpha", "use_rslora"}) {
      if (const Json* value = settings_.Get(key); value != nullptr) lora.config[key] = *value;
    }
    return lora;
  }

  void Deal() {
    std::vector<std::string> unused;
    for (const auto& [name, view] : files_.tensors.tensors()) {
      if (!Place(name, view)) unused.push_back(name);
    }
    if (unused.empty()) return;
    problems_->Invalid(absl::StrCat(unused.size(), " tensors have no place in this adapter: ",
                                    ListNames(unused)));
  }

  // False: the name is not one of MixLoRA's.
  bool Place(const std::string& name, const TensorView& view) {
    const std::vector<std::string> parts = absl::StrSplit(name, '.');
    int32_t layer = 0;
    if (parts.size() < 6 || parts[0] != "mixlora" || !absl::SimpleAtoi(parts[2], &layer)) return false;
    const std::string prefix = absl::StrCat("mixlora.layers.", layer, ".");
    const std::string path = absl::StrCat("base_model.model.model.layers.", layer, ".");
    if (name == prefix + "mlp.moe_gate.weight") {
      raw_->routers[layer] = {name, view};
      return true;
    }
    const std::string& linear = parts[4];
    if (parts.size() == 7 && Names(kAttention, linear)) {
      return Put(absl::StrCat(prefix, "self_attn.", linear), absl::StrCat(path, "self_attn.", linear), name,
                 view, &attention_);
    }
    int32_t expert = 0;
    if (parts.size() != 9 || !Names(kMlp, linear) || !absl::SimpleAtoi(parts[6], &expert) || expert < 0 ||
        expert >= static_cast<int32_t>(experts_.size())) {
      return false;
    }
    return Put(absl::StrCat(prefix, "mlp.", linear, ".experts.", expert), absl::StrCat(path, "mlp.", linear),
               name, view, &experts_[expert]);
  }

  // A factor of the linear that the file calls `from` and PEFT `to`.
  static bool Put(const std::string& from, const std::string& to, const std::string& name,
                  const TensorView& view, AdapterFiles* lora) {
    for (const char* factor : {".lora_A.weight", ".lora_B.weight"}) {
      if (name != from + factor) continue;
      lora->tensors.Put(to + factor, view);
      return true;
    }
    return false;
  }

  static bool Names(std::span<const std::string_view> names, std::string_view name) {
    return std::ranges::find(names, name) != names.end();
  }

  void ReadExpert(size_t expert) {
    Problems problems;
    RawAdapter& raw = raw_->experts.emplace_back();
    ParsePeftLora(experts_[expert], &raw, &problems);
    for (const absl::Status& problem : problems.list()) {
      problems_->Add(absl::Status(problem.code(), absl::StrCat("expert ", expert, ": ", problem.message())));
    }
  }

  const AdapterFiles& files_;
  RawAdapter* const raw_;
  Problems* const problems_;
  Settings settings_;
  AdapterFiles attention_;
  std::vector<AdapterFiles> experts_;
};

}  // namespace

void ParseMixLora(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  MixLoraReader(files, raw, problems).Read();
}

}  // namespace lorikeet
