// X-LoRA (Buehler & Buehler 2024; PEFT's XLORA): several LoRAs, and a classifier that gives each its
// weight in every token from the base model's final hidden state.
//
// The LoRAs are PEFT directories below the adapter's own (AdapterFiles::experts). PEFT 0.21 leaves
// parts of the classifier out of what it saves, since it takes ".0." in a name for an adapter's: the
// file must have all of it, "base_model.internal_xlora_classifier.layers.N.weight" and ".bias".
#pragma once

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

void ParseXLora(const AdapterFiles& files, RawAdapter* raw, Problems* problems);

}  // namespace lorikeet
