// PEFT's methods that are no change of linears: virtual tokens and prefixes, prompts attended to
// beside the text, trained norms and trained tokens.
#pragma once

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

// Each fills variant, parts, lower_model and warnings; what cannot be served goes to `problems`.
void ParsePromptTuning(const AdapterFiles& files, RawAdapter* raw, Problems* problems);
void ParseMultitaskPrompt(const AdapterFiles& files, RawAdapter* raw, Problems* problems);
void ParsePrefixTuning(const AdapterFiles& files, RawAdapter* raw, Problems* problems);
void ParseAdaptionPrompt(const AdapterFiles& files, RawAdapter* raw, Problems* problems);
void ParseLnTuning(const AdapterFiles& files, RawAdapter* raw, Problems* problems);
void ParseTrainableTokens(const AdapterFiles& files, RawAdapter* raw, Problems* problems);

}  // namespace lorikeet
