// safetensors files (huggingface/safetensors, format documented in its README), also sharded.
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "engine/tensor/tensor_file.h"

namespace lorikeet {

// One file. DATA_LOSS: truncated, overlapping or out-of-range offsets, duplicate names, malformed
// header (with the offset); INVALID_ARGUMENT: a dtype this server does not read, named with its
// tensor.
absl::StatusOr<TensorFile> ReadSafetensors(const std::filesystem::path& path);

// `directory`/model.safetensors, or the shards of model.safetensors.index.json as one file.
absl::StatusOr<TensorFile> ReadSafetensorsModel(const std::filesystem::path& directory);

}  // namespace lorikeet
