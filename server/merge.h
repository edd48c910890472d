// Writes a base model with adapters in its weights, as Transformers and any server without adapters
// reads it.
#pragma once

#include <filesystem>
#include <span>

#include "absl/status/status.h"
#include "adapters_cache/convert.h"

namespace lorikeet {

// `model`: a Hugging Face directory; `out`: a new directory, which gets config.json,
// model.safetensors and the tokenizer's files, the adapter's own where it has them. Weights are in
// float32, float16 or bfloat16 as the base's are, in bfloat16 where those are quantised, rounded
// once. Several terms, or one with a weight, are summed as ConvertToLora sums them.
// INVALID_ARGUMENT: an adapter that no weights can express, with the part of it, or a bias where the
// architecture has none; a GGUF file as `model`. ALREADY_EXISTS: `out`. Else as loading and as the
// file system.
absl::Status MergeAdapters(const std::filesystem::path& model, std::span<const ConvertTerm> terms,
                           const std::filesystem::path& out);

}  // namespace lorikeet
