// safetensors files (huggingface/safetensors, format documented in its README), also sharded.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/tensor/mapped_file.h"
#include "engine/tensor/tensor_file.h"

namespace lorikeet {

// One file, mapped. DATA_LOSS: truncated, overlapping or out-of-range offsets, duplicate names, malformed
// header (with the offset); INVALID_ARGUMENT: a dtype this server does not read, named with its
// tensor.
absl::StatusOr<TensorFile> ReadSafetensors(const std::filesystem::path& path);

// `directory`/model.safetensors, or the shards of model.safetensors.index.json as one file.
// Tensors of a shard that the index leaves out are there too.
absl::StatusOr<TensorFile> ReadSafetensorsModel(const std::filesystem::path& directory);

// The same checks on bytes in memory, which the views point into. `name` is for errors.
absl::StatusOr<std::map<std::string, TensorView, std::less<>>> ParseSafetensors(
    std::span<const std::byte> bytes, std::string_view name);

}  // namespace lorikeet
