// GGUF files (ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian): metadata and tensors.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tensor/tensor_file.h"

namespace lorikeet {

// Integers of all widths and bools become int64_t (or uint64_t values beyond it are refused),
// floats double. Arrays are homogeneous.
using GgufValue = std::variant<int64_t, double, std::string, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string>>;
using GgufMetadata = std::map<std::string, GgufValue, std::less<>>;

struct GgufFile {
  GgufMetadata metadata;
  TensorFile tensors;  // shapes outermost first: GGUF's dimensions reversed
};

// DATA_LOSS: truncated or inconsistent, with the offset; INVALID_ARGUMENT: not a GGUF file, an
// unsupported version, or a tensor type this server does not read, by name.
absl::StatusOr<GgufFile> ReadGguf(const std::filesystem::path& path);

}  // namespace lorikeet
