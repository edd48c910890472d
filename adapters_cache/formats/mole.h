// MoLE (Wu et al. 2024): several LoRAs, and on every linear a gate that shares each token out among them.
//
// The LoRAs are PEFT directories below the adapter's own, called as `adapters` calls them, as X-LoRA's are.
// Tensors: "base_model.model.M.mole_gate.weight" [LoRAs, in] of every linear that a LoRA is on.
//     y = W x + Σ_e softmax(gate · x / temperature)_e · ΔW_e x
#pragma once

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

void ParseMole(const AdapterFiles& files, RawAdapter* raw, Problems* problems);

}  // namespace lorikeet
