// MixLoRA (Li et al. 2024, the `mixlora` library's MIXLORA): LoRA on attention, and on each layer's MLP
// several of which a router chooses some for every token.
//
// Tensors, in safetensors (the library writes a pickle): "mixlora.layers.N.self_attn.q_proj.lora_A.weight",
// "mixlora.layers.N.mlp.up_proj.experts.E.lora_A.weight", "mixlora.layers.N.mlp.moe_gate.weight".
#pragma once

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

void ParseMixLora(const AdapterFiles& files, RawAdapter* raw, Problems* problems);

}  // namespace lorikeet
