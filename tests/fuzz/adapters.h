// The property adapters hold for any configuration and weights: a Status, or an adapter that fits the
// base. A broken property aborts. Run by libFuzzer (adapter_fuzz) and, on mutations of the goldens,
// by adapter_mutation_test.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "engine/api/base_model.h"

namespace lorikeet::testing {

void FuzzAdapter(const BaseModel& base, std::string_view config,
                 std::span<const std::byte> safetensors);

// adapter_config.json, a zero byte, adapter_model.safetensors; the base is the goldens' llama.
// Runs from the source's root.
void FuzzAdapterFiles(std::span<const std::byte> bytes);

}  // namespace lorikeet::testing
