// Adapters as a plain LoRA that PEFT and other servers load too: `lorikeet adapters convert`.
#pragma once

#include <filesystem>
#include <span>

#include "absl/status/status.h"
#include "engine/api/base_model.h"

namespace lorikeet {

struct ConvertTerm {
  std::filesystem::path directory;
  float weight = 1;
};

// Writes Σ weight · ΔW of `terms` over `base` to the new directory `out`: one pair a linear, in float32,
// the pairs of all terms one below the other, every scale in lora_B (alpha = r). The same function
// of the real numbers as the adapters, or nothing is written.
// INVALID_ARGUMENT: an adapter that is more than products of low rank, named with what it has beside
// them; a sum of ranks over Limits::kMaxAdapterRank. ALREADY_EXISTS: `out`. Else as loading an
// adapter (dense deltas are refused) and as the file system.
absl::Status ConvertToLora(const BaseModel& base, std::span<const ConvertTerm> terms,
                           const std::filesystem::path& out);

}  // namespace lorikeet
