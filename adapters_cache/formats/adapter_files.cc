#include "adapters_cache/formats/adapter_files.h"

#include <algorithm>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "adapters_cache/sha256.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/json.h"
#include "engine/tensor/mapped_file.h"
#include "engine/tensor/safetensors.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr char kConfigName[] = "adapter_config.json";
constexpr char kWeightsName[] = "adapter_model.safetensors";
constexpr char kHubWeightsName[] = "adapter.safetensors";  // AdapterHub's
constexpr const char* kTextNames[] = {
    "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "chat_template.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"};
constexpr int64_t kMaxConfigBytes = 1 << 20;

// With its length first, so that no two sequences of parts run together alike.
void AddPart(Sha256* hash, const void* data, size_t bytes) {
  const uint64_t length = bytes;
  hash->Add(&length, sizeof(length));
  hash->Add(data, bytes);
}
void AddPart(Sha256* hash, std::string_view text) { AddPart(hash, text.data(), text.size()); }

std::string Identity(const AdapterFiles& files) {
  Sha256 hash;
  AddPart(&hash, "lorikeet adapter 1");
  AddPart(&hash, files.config.dump());
  for (const auto& [name, content] : files.text) {
    AddPart(&hash, name);
    AddPart(&hash, content);
  }
  for (const auto& [name, view] : files.tensors.tensors()) {
    AddPart(&hash, name);
    AddPart(&hash, Info(view.dtype).name);
    AddPart(&hash, view.shape.data(), view.shape.size() * sizeof(view.shape[0]));
    AddPart(&hash, view.bytes.data(), view.bytes.size());
  }
  for (const AdapterFiles& expert : files.experts) AddPart(&hash, Identity(expert));
  return hash.Hex();
}

std::string JoinPaths(std::span<const fs::path> paths) {
  std::string all;
  for (const fs::path& path : paths) absl::StrAppend(&all, all.empty() ? "" : ", ", path.string());
  return all;
}

// `real`: what `path` leads to.
absl::Status CheckUnder(const fs::path& path, const fs::path& real,
                        std::span<const fs::path> roots) {
  if (roots.empty() || IsUnder(real, roots)) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat(path.string(), " leads to ", real.string(),
                                                  ", outside the allowed roots: ",
                                                  JoinPaths(roots)));
}

// An existing regular file under `roots`, within `max_bytes`. Links may be changed at any time, so what
// was opened is asked for its place once more.
absl::StatusOr<std::shared_ptr<const MappedFile>> ReadFile(const fs::path& path,
                                                           std::span<const fs::path> roots,
                                                           int64_t max_bytes) {
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error) return absl::NotFoundError(absl::StrCat(path.string(), ": ", error.message()));
  LK_RETURN_IF_ERROR(CheckUnder(path, real, roots));
  if (!fs::is_regular_file(real, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " is not a regular file"));
  }
  const auto bytes = fs::file_size(real, error);
  if (!error && bytes > static_cast<uintmax_t>(max_bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path.string(), " has ", bytes, " bytes; at most ", max_bytes));
  }
  LK_ASSIGN_OR_RETURN(auto file, MappedFile::Open(real, FileAccess::kCopy));
  LK_RETURN_IF_ERROR(CheckUnder(path, file->real_path(), roots));
  return file;
}

absl::StatusOr<Json> ParseConfig(const MappedFile& file, const fs::path& path) {
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()),
                              file.bytes().size());
  // Bounds the depth and refuses repeated keys; what passes parses again without surprises.
  LK_RETURN_IF_ERROR(ParseJson(text, path.string()).status());
  Json config = Json::parse(text.begin(), text.end());
  if (!config.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " is not a JSON object"));
  }
  return config;
}

// Why there are no weights to read.
absl::Status NoWeights(const fs::path& directory) {
  std::error_code error;
  for (const char* pickle : {"adapter_model.bin", "pytorch_adapter.bin"}) {
    if (!fs::exists(directory / pickle, error)) continue;
    return absl::UnimplementedError(absl::StrCat(
        (directory / pickle).string(),
        " is a Python pickle, which can run code when it is read, so it is refused. Convert it "
        "where you trust it: python -c \"import torch, safetensors.torch as s; "
        "s.save_file({k: v.contiguous() for k, v in torch.load('",
        pickle, "', weights_only=True).items()}, '", kWeightsName, "')\""));
  }
  return absl::NotFoundError(absl::StrCat("no ", kWeightsName, " in ", directory.string()));
}

// Configuration and weights of one directory.
absl::StatusOr<AdapterFiles> ReadOwnFiles(const fs::path& directory, std::span<const fs::path> roots) {
  std::error_code error;
  if (!fs::is_directory(directory, error)) {
    return absl::NotFoundError(absl::StrCat(directory.string(), " is not a directory"));
  }
  AdapterFiles files;
  files.directory = directory;
  if (!fs::exists(directory / kConfigName, error)) {
    return absl::NotFoundError(absl::StrCat("no ", kConfigName, " in ", directory.string()));
  }
  LK_ASSIGN_OR_RETURN(const auto config,
                      ReadFile(directory / kConfigName, roots, kMaxConfigBytes));
  LK_ASSIGN_OR_RETURN(files.config, ParseConfig(*config, directory / kConfigName));

  fs::path weights_path = directory / kWeightsName;
  if (!fs::exists(weights_path, error)) weights_path = directory / kHubWeightsName;
  if (!fs::exists(weights_path, error)) return NoWeights(directory);
  LK_ASSIGN_OR_RETURN(auto weights, ReadFile(weights_path, roots, Limits::kMaxAdapterFileBytes));
  LK_ASSIGN_OR_RETURN(auto tensors, ParseSafetensors(weights->bytes(), weights_path.string()));
  files.tensors = TensorFile({std::move(weights)}, std::move(tensors));
  return files;
}

absl::Status ReadText(std::span<const fs::path> roots, AdapterFiles* files) {
  for (const char* name : kTextNames) {
    const fs::path path = files->directory / name;
    std::error_code error;
    if (!fs::exists(path, error)) continue;
    LK_ASSIGN_OR_RETURN(const auto file, ReadFile(path, roots, kMaxAdapterTextBytes));
    files->text[name] = {reinterpret_cast<const char*>(file->bytes().data()), file->bytes().size()};
  }
  return absl::OkStatus();
}

// How the configuration calls its experts; none where it is of another kind. X-LoRA's and MoLE's paths are
// where they were trained; what counts are the names.
std::vector<Json> ExpertNames(const Json& config) {
  std::vector<Json> names;
  const auto adapters = config.find("adapters");
  const Json type = config.value("peft_type", Json());
  if ((type == "XLORA" || type == "MOLE") && adapters != config.end() && adapters->is_object()) {
    for (const auto& [name, unused] : adapters->items()) names.emplace_back(name);
  }
  const auto arrow = config.find("arrow_config");
  if (arrow == config.end() || !arrow->is_object()) return names;
  const auto add = [&](const char* key) {
    const Json list = arrow->value(key, Json());
    if (list.is_array()) names.insert(names.end(), list.begin(), list.end());
  };
  add("task_adapter_names");
  if (arrow->value("use_gks", Json()) == true) add("gks_adapter_names");
  return names;
}

// Below the adapter's directory; PEFT saves an Arrow model's router and experts side by side.
fs::path ExpertsDirectory(const fs::path& directory) {
  const fs::path own = (directory / "").parent_path();
  return own.filename() == "arrow_router" ? own.parent_path() : own;
}

// An expert has no experts of its own.
absl::StatusOr<std::vector<AdapterFiles>> ReadExperts(const Json& config, const fs::path& directory,
                                                      std::span<const fs::path> roots) {
  std::vector<AdapterFiles> experts;
  const std::vector<Json> names = ExpertNames(config);
  if (names.size() > Limits::kMaxExperts) {
    return absl::InvalidArgumentError(
        absl::StrCat("adapter_config.json names ", names.size(), " experts; at most ", Limits::kMaxExperts));
  }
  for (const Json& json : names) {
    const std::string name = json.is_string() ? json.get<std::string>() : "";
    if (name.empty() || name.find_first_of("/.") != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat("an expert is called ", json.dump().substr(0, 200), ", which is no directory's name"));
    }
    const fs::path path = ExpertsDirectory(directory) / name;
    std::error_code error;
    if (!fs::is_directory(path, error)) {
      return absl::NotFoundError(absl::StrCat("the expert '", name, "' is not there: put its PEFT directory at ",
                                              path.string()));
    }
    LK_ASSIGN_OR_RETURN(experts.emplace_back(), ReadOwnFiles(path, roots));
  }
  return experts;
}

}  // namespace

std::span<const char* const> AdapterTextNames() { return kTextNames; }

bool IsUnder(const fs::path& path, std::span<const fs::path> roots) {
  return std::any_of(roots.begin(), roots.end(), [&path](const fs::path& root) {
    return std::mismatch(root.begin(), root.end(), path.begin(), path.end()).first == root.end();
  });
}

absl::StatusOr<AdapterFiles> ReadAdapterFiles(const fs::path& directory,
                                              std::span<const fs::path> roots) {
  LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadOwnFiles(directory, roots));
  LK_RETURN_IF_ERROR(ReadText(roots, &files));
  LK_ASSIGN_OR_RETURN(files.experts, ReadExperts(files.config, directory, roots));
  files.version = Identity(files);
  return files;
}

}  // namespace lorikeet
