#include "server/merge.h"

#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/merged_weights.h"
#include "adapters_cache/normalise.h"
#include "adapters_cache/token_tables.h"
#include "engine/base/status_macros.h"
#include "engine/model/base_model_view.h"
#include "engine/model/model_source.h"
#include "engine/tensor/dequantize.h"
#include "nlohmann/json.hpp"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// What a directory has beside weights.
constexpr const char* kModelFiles[] = {"generation_config.json", "tokenizer.json",
                                       "tokenizer_config.json", "special_tokens_map.json",
                                       "chat_template.jinja", "chat_template.json"};

// A tensor that is written row by row.
struct Output {
  std::string name;
  std::vector<int64_t> shape;
  std::function<void(int64_t row, float* out)> row;

  int64_t rows() const { return shape.size() == 2 ? shape[0] : 1; }
  int64_t width() const { return shape.back(); }
};

absl::StatusOr<std::shared_ptr<const Adapter>> LoadAdapter(const BaseModel& base,
                                                           const fs::path& directory) {
  LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadAdapterFiles(directory, {}));
  Problems problems;
  const RawAdapter raw = ParseAdapter(std::move(files), &problems);
  LK_RETURN_IF_ERROR(problems.ToStatus());
  LK_ASSIGN_OR_RETURN(auto adapter, Normalise(raw, base, {.allow_dense = true}));
  if (const char* part = Unmergeable(*adapter)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", directory.string(), "' cannot be merged: it has ", part));
  }
  return adapter;
}

class Merger {
 public:
  Merger(std::shared_ptr<const ModelSource> source, std::shared_ptr<const Adapter> adapter)
      : source_(source), base_(std::move(source)), adapter_(std::move(adapter)) {
    const DType stored = source_->weight(LayerModule(0, Linear::kQ)).dtype;
    dtype_ = stored == DType::kF32 || stored == DType::kF16 ? stored : DType::kBF16;
    const int32_t own = adapter_->vocab;
    vocab_ = own > 0 ? own : base_.vocab_size();
    tied_ = base_.tied_head() && adapter_->embedding.empty() &&
            adapter_->modules[HeadModule(base_.layers())].empty() && own == 0;
  }

  absl::Status Write(const fs::path& model, const fs::path& adapter_folder, const fs::path& out) {
    LK_RETURN_IF_ERROR(ListOutputs());
    LK_ASSIGN_OR_RETURN(const Json config, Config(model / "config.json"));
    std::error_code error;
    if (!fs::create_directories(out, error)) {
      if (!error) return absl::AlreadyExistsError(absl::StrCat("'", out.string(), "' exists"));
      return absl::UnavailableError(absl::StrCat("'", out.string(), "': ", error.message()));
    }
    std::ofstream(out / "config.json") << config.dump(2) << "\n";
    for (const char* name : kModelFiles) {
      const fs::path own = adapter_folder / name;
      const fs::path from = fs::exists(own, error) ? own : model / name;
      if (fs::exists(from, error)) fs::copy_file(from, out / name, error);
    }
    return WriteWeights(out / "model.safetensors");
  }

 private:
  absl::Status ListOutputs() {
    const int64_t hidden = base_.hidden();
    outputs_.push_back({absl::StrCat(kEmbeddingPath, ".weight"), {vocab_, hidden},
                        [this](int64_t t, float* row) {
                          MergedEmbedding(base_, *adapter_, static_cast<int32_t>(t), row);
                        }});
    for (int layer = 0; layer < base_.layers(); ++layer) ListNorms(layer);
    Norm("model.norm.weight", &source_->final_norm(), FinalNorm(base_.layers()));
    for (const ModuleId id : base_.modules()) {
      if (id == HeadModule(base_.layers()) && tied_) continue;
      LK_RETURN_IF_ERROR(ListLinear(id));
    }
    return absl::OkStatus();
  }

  void ListNorms(int layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const LayerNorms& norms = source_->norms(layer);
    Norm(prefix + "input_layernorm.weight", norms.input, NormIndex(layer, false));
    Norm(prefix + "post_attention_layernorm.weight", norms.post_attention, NormIndex(layer, true));
    Norm(prefix + "self_attn.q_norm.weight", norms.q, -1);
    Norm(prefix + "self_attn.k_norm.weight", norms.k, -1);
  }

  // `at`: in Adapter::norms; -1: never an adapter's.
  void Norm(std::string name, const TensorView* view, int at) {
    if (view == nullptr) return;
    const float* own = at >= 0 && !adapter_->norms.empty() ? adapter_->norms[at] : nullptr;
    const int64_t width = view->elements();
    outputs_.push_back({std::move(name), {width}, [own, view, width](int64_t, float* out) {
                          if (own) std::memcpy(out, own, width * sizeof(float));
                          else Dequantize(view->dtype, view->bytes.data(), width, out);
                        }});
  }

  absl::Status ListLinear(ModuleId id) {
    const auto linear = std::make_shared<MergedLinear>(base_, id, *adapter_);
    const std::string path = base_.path(id);
    const int64_t rows = linear->rows(), in = base_.shape(id).in;
    outputs_.push_back({path + ".weight", {rows, in}, [linear](int64_t o, float* out) {
                          float bias;
                          linear->Row(static_cast<int32_t>(o), out, &bias);
                        }});
    if (!base_.ReadBias(id, nullptr)) {
      if (!linear->changes_bias()) return absl::OkStatus();
      std::vector<float> row(in);
      for (int64_t o = 0; o < rows; ++o) {
        float bias;
        linear->Row(static_cast<int32_t>(o), row.data(), &bias);
        if (bias != 0) return absl::InvalidArgumentError(path + " has no bias in the base model");
      }
      return absl::OkStatus();
    }
    outputs_.push_back({path + ".bias", {rows}, [linear, rows, in](int64_t, float* out) {
                          std::vector<float> row(in);
                          for (int64_t o = 0; o < rows; ++o) {
                            linear->Row(static_cast<int32_t>(o), row.data(), &out[o]);
                          }
                        }});
    return absl::OkStatus();
  }

  absl::StatusOr<Json> Config(const fs::path& path) const {
    Json config = Json::parse(std::ifstream(path), nullptr, /*allow_exceptions=*/false);
    if (!config.is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(path.string(), " is not a JSON object"));
    }
    const char* name = dtype_ == DType::kF32 ? "float32" : dtype_ == DType::kF16 ? "float16" : "bfloat16";
    for (const char* key : {"dtype", "torch_dtype"}) {
      if (config.contains(key)) config[key] = name;
    }
    config.erase("quantization_config");
    config["vocab_size"] = vocab_;
    config["tie_word_embeddings"] = tied_;
    return config;
  }

  absl::Status WriteWeights(const fs::path& path) const {
    Json header = {{"__metadata__", {{"format", "pt"}}}};
    int64_t end = 0;
    for (const Output& output : outputs_) {
      const int64_t begin = end;
      end += ByteSize(dtype_, output.rows() * output.width());
      header[output.name] = {{"dtype", Info(dtype_).name}, {"shape", output.shape},
                             {"data_offsets", {begin, end}}};
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const uint64_t length = text.size();
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof(length));
    file << text;
    std::vector<float> row;
    std::vector<uint16_t> half;
    for (const Output& output : outputs_) {
      row.resize(output.width());
      half.resize(output.width());
      for (int64_t r = 0; r < output.rows(); ++r) {
        output.row(r, row.data());
        const char* bytes = reinterpret_cast<const char*>(row.data());
        if (dtype_ != DType::kF32) {
          for (size_t i = 0; i < row.size(); ++i) {
            half[i] = dtype_ == DType::kF16 ? FloatToF16(row[i]) : FloatToBF16(row[i]);
          }
          bytes = reinterpret_cast<const char*>(half.data());
        }
        file.write(bytes, ByteSize(dtype_, output.width()));
      }
    }
    file.close();
    if (file) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("'", path.string(), "' cannot be written"));
  }

  const std::shared_ptr<const ModelSource> source_;
  const BaseModelView base_;
  const std::shared_ptr<const Adapter> adapter_;
  DType dtype_;
  int32_t vocab_;
  bool tied_;  // the head is still the embedding
  std::vector<Output> outputs_;
};

}  // namespace

absl::Status MergeAdapters(const fs::path& model, std::span<const ConvertTerm> terms,
                           const fs::path& out) {
  std::error_code error;
  if (!fs::exists(model / "config.json", error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", model.string(), "' is no Hugging Face directory, which merging needs"));
  }
  LK_ASSIGN_OR_RETURN(std::shared_ptr<const ModelSource> source, ModelSource::Open(model));
  const BaseModelView base(source);
  if (terms.size() == 1 && terms[0].weight == 1) {
    LK_ASSIGN_OR_RETURN(auto adapter, LoadAdapter(base, terms[0].directory));
    return Merger(std::move(source), std::move(adapter)).Write(model, terms[0].directory, out);
  }
  const fs::path sum = out.string() + ".sum";  // as one adapter, for as long as this takes
  LK_RETURN_IF_ERROR(ConvertToLora(base, terms, sum));
  auto adapter = LoadAdapter(base, sum);
  fs::remove_all(sum, error);
  LK_RETURN_IF_ERROR(adapter.status());
  return Merger(std::move(source), *std::move(adapter)).Write(model, sum, out);
}

}  // namespace lorikeet
