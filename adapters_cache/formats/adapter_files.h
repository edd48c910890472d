// The files of an adapter directory, read and identified, not yet understood.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tensor/tensor_file.h"
#include "nlohmann/json.hpp"

namespace lorikeet {

// What a directory may bring of a tokenizer and a chat template, by the names of its files.
std::span<const char* const> AdapterTextNames();
inline constexpr int64_t kMaxAdapterTextBytes = 64 << 20;  // of one of them

struct AdapterFiles {
  std::filesystem::path directory;  // as opened
  // adapter_config.json, keys in file order: PEFT's patterns take the first that matches.
  nlohmann::ordered_json config;
  TensorFile tensors;  // adapter_model.safetensors
  // Contents of those of AdapterTextNames that are there.
  std::map<std::string, std::string, std::less<>> text;
  // X-LoRA's and Arrow's LoRAs, in the order of the configuration, which names their directories: below
  // this one, or beside it where it is called arrow_router, as PEFT saves it.
  std::vector<AdapterFiles> experts;
  // Lower-case hexadecimal SHA-256 of the configuration without its white space, of every
  // tensor (name, type, shape, bytes) by name, of the text's files, and of the experts' in turn.
  // Layout, order and metadata of the weights file do
  // not enter; the order of the configuration's keys does, since it can change the result.
  std::string version;
};

// Reads adapter_config.json and adapter_model.safetensors (adapter.safetensors without it) of `directory`. When `roots` is not
// empty, both must lie under one of them after symbolic links are resolved; roots are canonical.
//
// NOT_FOUND: no such directory or file; PERMISSION_DENIED: outside the roots; DATA_LOSS: truncated
// or malformed files; INVALID_ARGUMENT: not an adapter's files; UNIMPLEMENTED: pickled weights,
// with how to convert them; RESOURCE_EXHAUSTED: a file larger than its limit.
absl::StatusOr<AdapterFiles> ReadAdapterFiles(const std::filesystem::path& directory,
                                              std::span<const std::filesystem::path> roots);

// Whether `path` is one of `roots` or below one. Compares components; resolves nothing.
bool IsUnder(const std::filesystem::path& path, std::span<const std::filesystem::path> roots);

}  // namespace lorikeet
