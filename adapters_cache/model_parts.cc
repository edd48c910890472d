#include "adapters_cache/model_parts.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/token_tables.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

// By NormIndex, and FinalNorm's.
std::vector<std::string> NormPaths(int layers) {
  std::vector<std::string> paths;
  for (int layer = 0; layer < layers; ++layer) {
    for (const char* name : {"input_layernorm", "post_attention_layernorm"}) {
      paths.push_back(absl::StrCat("model.layers.", layer, ".", name));
    }
  }
  paths.emplace_back("model.norm");
  return paths;
}

class PartsPacker {
 public:
  PartsPacker(const RawAdapter& raw, const BaseModel& base, Packer* packer, Adapter* adapter)
      : raw_(raw), base_(base), packer_(packer), adapter_(adapter), norm_paths_(NormPaths(base.layers())) {}

  absl::Status Run() {
    LK_RETURN_IF_ERROR(CheckAllThere());
    for (const auto& [path, tensor] : raw_.parts.saved) LK_RETURN_IF_ERROR(Saved(path, tensor));
    adapter_->invocation_tokens = raw_.parts.invocation_tokens;
    return absl::OkStatus();
  }

 private:
  // What the configuration asks for as a whole, or rows of, is in the file.
  absl::Status CheckAllThere() const {
    std::vector<std::string> missing;
    const auto ask = [&](const std::string& path) {
      if (raw_.parts.saves(path) && !raw_.parts.saved.contains(path + ".weight")) missing.push_back(path);
    };
    if (raw_.parts.saves) {
      ask(kEmbeddingPath);
      for (const ModuleId id : base_.modules()) ask(base_.path(id));
      for (const std::string& path : norm_paths_) ask(path);
    }
    for (const auto& [table, indices] : raw_.parts.token_indices) {
      const bool there = std::ranges::any_of(raw_.parts.token_rows, [&](const auto& rows) { return IsNamed(rows.first, table); });
      // Of tied tables one has the rows of both.
      if (!there && !(base_.tied_head() && !raw_.parts.token_rows.empty())) missing.push_back(table);
    }
    if (missing.empty()) return absl::OkStatus();
    return absl::NotFoundError("modules_to_save, trainable_token_indices or an LN tuning's target_modules ask for modules that the "
                               "file has no tensors for: " + ListNames(missing));
  }

  // A whole tensor that replaces the base's.
  absl::Status Saved(const std::string& path, const RawTensor& tensor) {
    if (path == absl::StrCat(kEmbeddingPath, ".weight") ||
        path == absl::StrCat(kHeadPath, ".weight")) {
      return absl::OkStatus();  // PackTokenTables'
    }
    if (path.ends_with("norm.weight")) return Norm(path, tensor);
    for (const ModuleId id : base_.modules()) {
      if (path == base_.path(id) + ".weight") return Linear(id, tensor);
      if (path == base_.path(id) + ".bias") return Bias(id, tensor);
    }
    return absl::NotFoundError(absl::StrCat("the base model has no ", path, " that could be "
                                            "replaced, as ", tensor.name, " wants"));
  }

  absl::Status Norm(const std::string& path, const RawTensor& tensor) {
    const auto at = std::ranges::find_if(norm_paths_, [&](const std::string& norm) { return path == norm + ".weight"; });
    if (at == norm_paths_.end()) {
      return absl::UnimplementedError(
          absl::StrCat(tensor.name, " replaces a norm that is not served per adapter"));
    }
    LK_ASSIGN_OR_RETURN(const Matrix2 weight, ReadTensor(tensor, {base_.hidden()}));
    adapter_->norms.resize(norm_paths_.size());
    adapter_->norms[at - norm_paths_.begin()] = packer_->Floats(weight.values);
    return absl::OkStatus();
  }

  // Another weight is the base's and a dense delta.
  absl::Status Linear(ModuleId id, const RawTensor& tensor) {
    const auto [in, out] = base_.shape(id);
    Lowered lowered;
    LK_ASSIGN_OR_RETURN(lowered.dense, ReadTensor(tensor, {out, in}));
    Matrix2 weight(out, in);
    base_.ReadRows(id, 0, out, weight.values.data());
    for (size_t i = 0; i < weight.values.size(); ++i) lowered.dense.values[i] -= weight.values[i];
    ModuleDelta delta;
    LK_RETURN_IF_ERROR(
        packer_->Module(base_.path(id), std::move(lowered), &delta));
    adapter_->modules[id].dense = delta.dense;
    return absl::OkStatus();
  }

  absl::Status Bias(ModuleId id, const RawTensor& tensor) {
    const int32_t out = base_.shape(id).out;
    LK_ASSIGN_OR_RETURN(Matrix2 bias, ReadTensor(tensor, {out}));
    std::vector<float> own(out);
    if (!base_.ReadBias(id, own.data())) {
      return absl::InvalidArgumentError(
          absl::StrCat(tensor.name, " replaces a bias that the base model does not have"));
    }
    for (int32_t o = 0; o < out; ++o) bias.values[o] -= own[o];
    adapter_->modules[id].bias = packer_->Floats(bias.values);
    return absl::OkStatus();
  }

  const RawAdapter& raw_;
  const BaseModel& base_;
  Packer* const packer_;
  Adapter* const adapter_;
  const std::vector<std::string> norm_paths_;
};

}  // namespace

absl::StatusOr<Matrix2> ReadTensor(const RawTensor& tensor, std::vector<int64_t> shape) {
  if (tensor.view.shape != shape || IsCode(tensor.view.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor.name, " is ", Info(tensor.view.dtype).name, " ",
                     ShapeString(tensor.view.shape), "; the base model needs ", ShapeString(shape)));
  }
  LK_RETURN_IF_ERROR(CheckFinite(tensor.name, tensor.view));
  std::vector<float> values(tensor.view.elements());
  Dequantize(tensor.view.dtype, tensor.view.bytes.data(), tensor.view.elements(), values.data());
  if (shape.size() == 1) shape.insert(shape.begin(), 1);
  return Matrix2(shape[0], shape[1], std::move(values));
}

absl::Status PackModelParts(const RawAdapter& raw, const BaseModel& base, Packer* packer,
                            Adapter* adapter) {
  return PartsPacker(raw, base, packer, adapter).Run();
}

}  // namespace lorikeet
