#include "adapters_cache/convert.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/low_rank_rows.h"
#include "adapters_cache/mixer.h"
#include "adapters_cache/normalise.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"
#include "nlohmann/json.hpp"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kEmbedding[] = "model.embed_tokens";

struct Term {
  std::shared_ptr<const Adapter> adapter;
  std::string base_model;
  float weight = 1;
};

// Why the adapter is more than pairs; nullptr: it is not.
const char* BesidePairs(const Adapter& adapter) {
  if (const char* part = Unsummable(adapter); part != nullptr) return part;
  for (const ModuleDelta& module : adapter.modules) {
    if (module.bias) return "biases";
    if (module.output_rotation.scale || module.input_rotation.block) return "scaled activations";
  }
  return nullptr;
}

absl::StatusOr<Term> Load(const BaseModel& base, const ConvertTerm& term) {
  LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadAdapterFiles(term.directory, {}));
  Problems problems;
  const RawAdapter raw = ParseAdapter(std::move(files), &problems);
  LK_RETURN_IF_ERROR(problems.ToStatus());
  LK_ASSIGN_OR_RETURN(auto adapter, Normalise(raw, base, {}));
  if (const char* part = BesidePairs(*adapter); part != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "'", term.directory.string(), "' is no plain LoRA: it has ", part));
  }
  return Term{std::move(adapter), raw.base_model, term.weight};
}

struct NamedTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

class LoraWriter {
 public:
  LoraWriter(const BaseModel& base, std::span<const Term> terms) : base_(base), terms_(terms) {}

  absl::Status Write(const std::filesystem::path& out) {
    for (const ModuleId m : base_.modules()) {
      const auto [in, width] = base_.shape(m);
      LK_RETURN_IF_ERROR(Stack(base_.path(m), in, width,
                               [m](const Adapter& a) { return a.module(m).low_rank; }));
    }
    LK_RETURN_IF_ERROR(Stack(kEmbedding, base_.vocab_size(), base_.hidden(),
                             [](const Adapter& a) { return a.embedding.low_rank; }));
    std::error_code error;
    if (!std::filesystem::create_directories(out, error)) {
      if (!error) return absl::AlreadyExistsError(absl::StrCat("'", out.string(), "' exists"));
      return absl::UnavailableError(absl::StrCat("'", out.string(), "': ", error.message()));
    }
    LK_RETURN_IF_ERROR(WriteFile(out / "adapter_model.safetensors", Safetensors()));
    return WriteFile(out / "adapter_config.json", Config().dump(1) + "\n");
  }

 private:
  template <typename PairOf>
  absl::Status Stack(const std::string& path, int64_t in, int64_t out, const PairOf& pair_of) {
    int64_t rank = 0;
    for (const Term& term : terms_) rank += pair_of(*term.adapter).rank;
    if (rank == 0) return absl::OkStatus();
    if (rank > Limits::kMaxAdapterRank) {
      return absl::InvalidArgumentError(absl::StrCat("the sum has rank ", rank, " at ", path,
                                                     "; at most ", Limits::kMaxAdapterRank));
    }
    NamedTensor a{{rank, in}, {}}, b{{out, rank}, std::vector<float>(out * rank)};
    std::vector<float> column(out);
    int64_t k = 0;
    for (const Term& term : terms_) {
      const LowRank& pair = pair_of(*term.adapter);
      for (int32_t r = 0; r < pair.rank; ++r, ++k) {
        a.values.resize(a.values.size() + in);
        ReadA(pair, r, in, &a.values[k * in]);
        ReadB(pair, r, out, column.data());
        for (int64_t o = 0; o < out; ++o) b.values[o * rank + k] = term.weight * column[o];
      }
    }
    const bool embedding = path == kEmbedding;
    const std::string prefix = absl::StrCat("base_model.model.", path, ".");
    tensors_[prefix + (embedding ? "lora_embedding_A" : "lora_A.weight")] = std::move(a);
    tensors_[prefix + (embedding ? "lora_embedding_B" : "lora_B.weight")] = std::move(b);
    ranks_.emplace_back(path, rank);
    return absl::OkStatus();
  }

  Json Config() const {
    int64_t largest = 1;
    for (const auto& [path, rank] : ranks_) largest = std::max(largest, rank);
    Json targets = Json::array(), patterns = Json::object();
    for (const auto& [path, rank] : ranks_) {
      targets.push_back(path);
      if (rank != largest) patterns[Escaped(path)] = rank;
    }
    Json config = {{"peft_type", "LORA"},
                   {"task_type", "CAUSAL_LM"},
                   {"base_model_name_or_path", terms_[0].base_model},
                   {"r", largest},
                   {"lora_alpha", largest},
                   {"rank_pattern", patterns},
                   {"alpha_pattern", patterns},
                   {"target_modules", targets},
                   {"bias", "none"},
                   {"fan_in_fan_out", false},
                   {"init_lora_weights", true},
                   {"inference_mode", true},
                   {"lora_dropout", 0.0}};
    if (const LayerReplication stacked = base_.layer_replication(); !stacked.empty()) {
      config["layer_replication"] = stacked;
    }
    return config;
  }

  // The path as a regular expression that means nothing else.
  static std::string Escaped(const std::string& path) {
    std::string pattern;
    for (const char c : path) absl::StrAppend(&pattern, c == '.' ? "\\" : "", std::string(1, c));
    return pattern;
  }

  std::string Safetensors() const {
    Json header = {{"__metadata__", {{"format", "pt"}}}};
    size_t end = 0;
    for (const auto& [name, tensor] : tensors_) {
      const size_t begin = end;
      end += tensor.values.size() * sizeof(float);
      header[name] = {{"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const uint64_t length = text.size();
    std::string bytes(reinterpret_cast<const char*>(&length), sizeof(length));
    bytes += text;
    bytes.reserve(bytes.size() + end);
    for (const auto& [name, tensor] : tensors_) {
      bytes.append(reinterpret_cast<const char*>(tensor.values.data()),
                   tensor.values.size() * sizeof(float));
    }
    return bytes;
  }

  static absl::Status WriteFile(const std::filesystem::path& path, const std::string& bytes) {
    std::ofstream file(path, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    if (file) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("'", path.string(), "' cannot be written"));
  }

  const BaseModel& base_;
  const std::span<const Term> terms_;
  std::map<std::string, NamedTensor> tensors_;
  std::vector<std::pair<std::string, int64_t>> ranks_;  // by path
};

}  // namespace

absl::Status ConvertToLora(const BaseModel& base, std::span<const ConvertTerm> terms,
                           const std::filesystem::path& out) {
  std::vector<Term> loaded;
  for (const ConvertTerm& term : terms) {
    LK_ASSIGN_OR_RETURN(loaded.emplace_back(), Load(base, term));
  }
  return LoraWriter(base, loaded).Write(out);
}

}  // namespace lorikeet
