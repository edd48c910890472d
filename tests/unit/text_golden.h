// The tokenizer goldens of tests/golden/tokenizer, and the tokenizers they belong to.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/gguf.h"
#include "nlohmann/json.hpp"
#include "server/text/tokenizer.h"

namespace lorikeet::testing {

using Json = nlohmann::ordered_json;

inline const std::filesystem::path kTokenizerGoldens = "tests/golden/tokenizer";

inline Json ReadJson(const std::filesystem::path& path) {
  std::ifstream file(path);
  LK_CHECK_MSG(file.good(), path.string() + " cannot be read; run from the source tree's root");
  return Json::parse(file);
}

inline std::filesystem::path RealModelPath() {
  const char* xdg = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::filesystem::path cache =
      xdg && *xdg ? std::filesystem::path(xdg) : std::filesystem::path(home ? home : "") / ".cache";
  return cache / "lorikeet" / "SmolLM2-135M-Instruct.Q4_1.gguf";
}

inline absl::StatusOr<std::unique_ptr<Tokenizer>> GgufTokenizer(const std::filesystem::path& path) {
  LK_ASSIGN_OR_RETURN(const GgufFile file, ReadGguf(path));
  LK_ASSIGN_OR_RETURN(const GgufTokenizerSpec spec, ReadGgufTokenizerSpec(file.metadata));
  return Tokenizer::FromGguf(spec);
}

// `name`: of a golden; `source`: "directory" or "gguf".
inline absl::StatusOr<std::unique_ptr<Tokenizer>> GoldenTokenizer(const std::string& name,
                                                                  std::string_view source) {
  if (name == "smollm2") {
    if (!std::filesystem::exists(RealModelPath())) {
      return absl::NotFoundError(
          absl::StrCat(RealModelPath().string(), " is missing: run scripts/setup to bring it"));
    }
    return GgufTokenizer(RealModelPath());
  }
  if (source == "gguf") return GgufTokenizer(kTokenizerGoldens / (name + ".gguf"));
  return Tokenizer::FromDirectory(kTokenizerGoldens / name);
}

}  // namespace lorikeet::testing
