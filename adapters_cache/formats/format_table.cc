#include "adapters_cache/formats/format_table.h"

#include <string>
#include <string_view>
#include <utility>

#include "adapters_cache/formats/adapterhub.h"
#include "adapters_cache/formats/mixlora.h"
#include "adapters_cache/formats/mole.h"
#include "adapters_cache/formats/peft_lora.h"
#include "adapters_cache/formats/peft_modules.h"
#include "adapters_cache/formats/peft_prompts.h"
#include "adapters_cache/formats/xlora.h"

namespace lorikeet {
namespace {

using Parser = void (*)(const AdapterFiles& files, RawAdapter* raw, Problems* problems);

struct Format {
  std::string_view peft_type;
  Parser parse;        // nullptr: known, not served
  const char* reason;  // why not
};

constexpr const char* kNotInFile =
    "what it computes is not fully stored in its file; merge it or "
    "convert it to LoRA with PEFT";

// PEFT 0.21's names, BONE, which became MISS, and those of formats that are not PEFT's.
constexpr Format kFormats[] = {
    {"LORA", ParsePeftLora, nullptr},
    {"ADAMSS", nullptr, kNotInFile},
    {"ADAPTION_PROMPT", ParseAdaptionPrompt, nullptr},
    {"CARTRIDGE", ParsePrefixTuning, nullptr},
    {"CPT", ParsePromptTuning, nullptr},
    {"LILY", nullptr,
     "its gate averages over the whole batch, so a request's answer would depend "
     "on its neighbours"},
    {"LN_TUNING", ParseLnTuning, nullptr},
    {"MIXLORA", ParseMixLora, nullptr},
    {"MOLE", ParseMole, nullptr},
    {"MULTITASK_PROMPT_TUNING", ParseMultitaskPrompt, nullptr},
    {"P_TUNING", ParsePromptTuning, nullptr},
    {"PREFIX_TUNING", ParsePrefixTuning, nullptr},
    {"PROMPT_TUNING", ParsePromptTuning, nullptr},
    {"PSOFT", nullptr, kNotInFile},
    {"SHADOW", nullptr, "it runs a second transformer beside the base model"},
    {"TRAINABLE_TOKENS", ParseTrainableTokens, nullptr},
    {"XLORA", ParseXLora, nullptr},
};

}  // namespace

RawAdapter ParseAdapter(AdapterFiles files, Problems* problems) {
  RawAdapter raw;
  raw.version = files.version;
  const auto base = files.config.find("base_model_name_or_path");
  if (base != files.config.end() && base->is_string()) raw.base_model = base->get<std::string>();

  raw.config = files.config;
  if (IsAdapterHub(files.config)) {
    ParseAdapterHub(files, &raw, problems);
    raw.tensors = std::move(files.tensors);
    return raw;
  }
  const auto type = files.config.find("peft_type");
  if (type == files.config.end() || !type->is_string()) {
    problems->Invalid("adapter_config.json has no peft_type");
    return raw;
  }
  raw.variant = type->get<std::string>();
  if (const ModuleMethod* method = FindModuleMethod(raw.variant); method != nullptr) {
    ParsePeftModules(*method, files, &raw, problems);
    raw.tensors = std::move(files.tensors);
    return raw;
  }
  for (const Format& format : kFormats) {
    if (format.peft_type != raw.variant) continue;
    if (format.parse == nullptr) {
      problems->Unserved("peft_type " + raw.variant + " is not served: " + format.reason);
      return raw;
    }
    format.parse(files, &raw, problems);
    raw.tensors = std::move(files.tensors);
    return raw;
  }
  problems->Unserved("peft_type '" + raw.variant + "' is unknown");
  return raw;
}

}  // namespace lorikeet
