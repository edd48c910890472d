#include "adapters_cache/formats/arrow.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/formats/peft_lora.h"
#include "adapters_cache/formats/peft_targets.h"
#include "adapters_cache/formats/settings.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

class ArrowReader {
 public:
  ArrowReader(const AdapterFiles& files, RawAdapter* raw, Problems* problems)
      : files_(files),
        raw_(raw),
        problems_(problems),
        arrow_(files.config.at("arrow_config")),
        settings_(arrow_, problems) {}

  void Read() {
    raw_->variant = "arrow";
    if (!arrow_.is_object()) return problems_->Invalid("arrow_config is no object");
    CheckLoraOptions(files_.config, &raw_->warnings, problems_);
    CheckKeys();
    ReadExperts();
    PrototypeGates& gates = raw_->prototype_gates;
    gates.experts = static_cast<int32_t>(raw_->experts.size()) - raw_->general_experts;
    if (gates.experts < 1) return problems_->Invalid("arrow_config names no task_adapter_names");
    gates.chosen = static_cast<int32_t>(settings_.Whole("top_k", 3, gates.experts));
    if (gates.chosen > gates.experts) problems_->Invalid("top_k is missing, and its 3 are more than its LoRAs");
    gates.temperature = static_cast<float>(settings_.Number("router_temperature", 1));
    if (!(gates.temperature > 0)) problems_->Invalid("router_temperature must be above 0");
    auto targets = PeftTargets::Parse(files_.config, problems_);
    if (!targets.stated()) problems_->Invalid("target_modules is not stated");
    raw_->targets = [targets = std::move(targets)](std::string_view path) { return targets.Match(path); };
    CheckTensors();
  }

 private:
  void CheckKeys() {
    constexpr std::string_view kRead[] = {"top_k", "router_temperature", "use_gks", "task_adapter_names",
                                          "gks_adapter_names"};
    for (const auto& [key, value] : arrow_.items()) {
      if (value.is_null() || std::ranges::find(kRead, key) != std::end(kRead)) continue;
      raw_->warnings.push_back(key == "rng_seed"
                                   ? "rng_seed is ignored: prototypes are what PEFT's iterations approach "
                                     "from any start"
                                   : "arrow_config: unknown key '" + key + "' is ignored");
    }
  }

  void ReadExperts() {
    for (const AdapterFiles& files : files_.experts) {
      const RawAdapter& expert = raw_->experts.emplace_back(ParseAdapter(files, problems_));
      if (expert.variant == "lora" || expert.variant == "rslora") continue;
      problems_->Unserved(absl::StrCat("expert ", raw_->experts.size() - 1, " is of variant '", expert.variant,
                                       "'; Arrow's are plain LoRAs"));
    }
    if (!settings_.Flag("use_gks", false)) return;
    const Json* general = settings_.Get("gks_adapter_names");
    if (general != nullptr && general->is_array()) raw_->general_experts = static_cast<int32_t>(general->size());
    if (raw_->general_experts == 0) problems_->Invalid("use_gks: gks_adapter_names names none");
  }

  // The router's own pair is there because PEFT's router is a LoRA by its class.
  void CheckTensors() {
    std::vector<std::string> unused;
    for (const auto& [name, view] : files_.tensors.tensors()) {
      const std::string canonical = CanonicalName(name);
      if (canonical.ends_with(".lora_A.weight") || canonical.ends_with(".lora_B.weight")) continue;
      unused.push_back(name);
    }
    if (unused.empty()) return;
    problems_->Invalid(absl::StrCat(unused.size(), " tensors have no place in this adapter: ",
                                    ListNames(unused)));
  }

  const AdapterFiles& files_;
  RawAdapter* const raw_;
  Problems* const problems_;
  const Json& arrow_;
  Settings settings_;
};

}  // namespace

bool IsArrow(const Json& config) {
  const auto arrow = config.find("arrow_config");
  return arrow != config.end() && IsSet(*arrow);
}

void ParseArrow(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  ArrowReader(files, raw, problems).Read();
}

}  // namespace lorikeet
