// GGUF files (ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian): metadata and tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tensor/tensor_file.h"

namespace lorikeet {

// Integers of all widths and bools are int64_t (a uint64 beyond its range is refused), floats
// double. Arrays are homogeneous and not nested. Strings are bytes, not necessarily UTF-8.
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

struct GgufContent {
  GgufMetadata metadata;
  std::map<std::string, TensorView, std::less<>> tensors;
};

// The same checks on bytes in memory, which the views point into. `name` is for errors.
absl::StatusOr<GgufContent> ParseGguf(std::span<const std::byte> bytes, std::string_view name);

}  // namespace lorikeet
