#include "adapters_cache/model_parts.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/matrix.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

absl::StatusOr<Matrix2> Read(const RawTensor& tensor, std::vector<int64_t> shape) {
  if (tensor.view.shape != shape || IsInteger(tensor.view.dtype)) {
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

class PartsPacker {
 public:
  PartsPacker(const RawAdapter& raw, const BaseModel& base, Packer* packer, Adapter* adapter)
      : raw_(raw), base_(base), packer_(packer), adapter_(adapter) {}

  absl::Status Run() {
    const auto embedding = raw_.modules.find(kEmbeddingPath);
    if (embedding != raw_.modules.end()) LK_RETURN_IF_ERROR(Embedding(embedding->second));
    for (const auto& [path, tensor] : raw_.parts.saved) LK_RETURN_IF_ERROR(Saved(path, tensor));
    for (const auto& [path, rows] : raw_.parts.token_rows) {
      LK_RETURN_IF_ERROR(TokenRows(path, rows));
    }
    if (raw_.parts.embedding_copy) LK_RETURN_IF_ERROR(EmbeddingCopy());
    adapter_->invocation_tokens = raw_.parts.invocation_tokens;
    return absl::OkStatus();
  }

 private:
  // LoRA on the embedding, and DoRA, whose norms go down the table's columns.
  absl::Status Embedding(const RawModule& module) {
    if (!module.a || !module.b) return absl::OkStatus();  // complained of by the reader
    const int64_t vocab = base_.vocab_size(), hidden = base_.hidden();
    const int64_t rank = module.a->view.shape.empty() ? 0 : module.a->view.shape[0];
    LK_ASSIGN_OR_RETURN(Matrix2 a, Read(*module.a, {rank, vocab}));
    LK_ASSIGN_OR_RETURN(Matrix2 b, Read(*module.b, {hidden, rank}));
    Scale(module.scale, &b);
    Lowered lowered;
    if (module.magnitude) {
      LK_ASSIGN_OR_RETURN(const Matrix2 magnitude, Read(*module.magnitude, {hidden}));
      LK_ASSIGN_OR_RETURN(lowered.out_scale, ColumnScale(a, b, magnitude.values));
    }
    lowered.pairs.push_back({std::move(a), std::move(b)});
    ModuleDelta delta;
    LK_RETURN_IF_ERROR(packer_->Module(kEmbeddingPath, std::move(lowered), &delta));
    adapter_->embedding.low_rank = delta.low_rank;
    adapter_->embedding.out_scale = delta.out_scale;
    return absl::OkStatus();
  }

  // m / ‖E + (B·A)ᵀ‖ of every column.
  absl::StatusOr<std::vector<float>> ColumnScale(const Matrix2& a, const Matrix2& b,
                                                 const std::vector<float>& magnitude) {
    constexpr int32_t kRows = 64;
    const int32_t vocab = base_.vocab_size(), hidden = base_.hidden();
    std::vector<double> squares(hidden);
    std::vector<float> rows(int64_t{kRows} * hidden);
    for (int32_t first = 0; first < vocab; first += kRows) {
      const int32_t count = std::min(kRows, vocab - first);
      base_.ReadEmbedding(first, count, rows.data());
      for (int32_t t = 0; t < count; ++t) {
        for (int32_t d = 0; d < hidden; ++d) {
          double value = rows[int64_t{t} * hidden + d];
          for (int64_t k = 0; k < a.rows; ++k) value += double{a.at(k, first + t)} * b.at(d, k);
          squares[d] += value * value;
        }
      }
    }
    std::vector<float> scale(hidden);
    for (int32_t d = 0; d < hidden; ++d) {
      scale[d] = static_cast<float>(magnitude[d] / std::sqrt(squares[d]));
      if (!std::isfinite(scale[d])) {
        return absl::InvalidArgumentError(
            absl::StrCat(kEmbeddingPath, ": DoRA's scale of column ", d, " is not finite"));
      }
    }
    return scale;
  }

  // A whole tensor that replaces the base's.
  absl::Status Saved(const std::string& path, const RawTensor& tensor) {
    const int64_t vocab = base_.vocab_size(), hidden = base_.hidden();
    if (path == std::string(kEmbeddingPath) + ".weight") {
      LK_RETURN_IF_ERROR(CheckVocabulary(tensor));
      LK_ASSIGN_OR_RETURN(const Matrix2 rows, Read(tensor, {vocab, hidden}));
      return packer_->Rows(tensor.name, rows, &adapter_->embedding.rows.rows);
    }
    if (path == "lm_head.weight") {
      LK_RETURN_IF_ERROR(CheckVocabulary(tensor));
      LK_ASSIGN_OR_RETURN(const Matrix2 rows, Read(tensor, {vocab, hidden}));
      return packer_->Rows(tensor.name, rows, &Head().rows.rows);
    }
    if (path.ends_with("norm.weight")) return Norm(path, tensor);
    for (const ModuleId id : base_.modules()) {
      if (path == base_.path(id) + ".weight") return Linear(id, tensor);
      if (path == base_.path(id) + ".bias") return Bias(id, tensor);
    }
    return absl::NotFoundError(absl::StrCat("the base model has no ", path, " that could be "
                                            "replaced, as ", tensor.name, " wants"));
  }

  absl::Status CheckVocabulary(const RawTensor& tensor) const {
    const auto& shape = tensor.view.shape;
    if (shape.size() != 2 || shape[0] == base_.vocab_size()) return absl::OkStatus();
    return absl::UnimplementedError(absl::StrCat(
        tensor.name, " has ", shape[0], " tokens and the base model ", base_.vocab_size(),
        ": adapters with a vocabulary of another size are not served"));
  }

  ModuleDelta& Head() { return adapter_->modules[HeadModule(base_.layers())]; }

  absl::Status Norm(const std::string& path, const RawTensor& tensor) {
    LK_ASSIGN_OR_RETURN(const Matrix2 weight, Read(tensor, {base_.hidden()}));
    int at = path == "model.norm.weight" ? FinalNorm(base_.layers()) : -1;
    for (int layer = 0; at < 0 && layer < base_.layers(); ++layer) {
      const std::string prefix = absl::StrCat("model.layers.", layer, ".");
      if (path == prefix + "input_layernorm.weight") at = NormIndex(layer, false);
      if (path == prefix + "post_attention_layernorm.weight") at = NormIndex(layer, true);
    }
    if (at < 0) {
      return absl::UnimplementedError(
          absl::StrCat(tensor.name, " replaces a norm that is not served per adapter"));
    }
    adapter_->norms.resize(FinalNorm(base_.layers()) + 1);
    adapter_->norms[at] = packer_->Floats(weight.values);
    return absl::OkStatus();
  }

  // Another weight is the base's and a dense delta.
  absl::Status Linear(ModuleId id, const RawTensor& tensor) {
    const auto [in, out] = base_.shape(id);
    Lowered lowered;
    LK_ASSIGN_OR_RETURN(lowered.dense, Read(tensor, {out, in}));
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
    LK_ASSIGN_OR_RETURN(Matrix2 bias, Read(tensor, {out}));
    std::vector<float> own(out);
    if (!base_.ReadBias(id, own.data())) {
      return absl::InvalidArgumentError(
          absl::StrCat(tensor.name, " replaces a bias that the base model does not have"));
    }
    for (int32_t o = 0; o < out; ++o) bias.values[o] -= own[o];
    adapter_->modules[id].bias = packer_->Floats(bias.values);
    return absl::OkStatus();
  }

  // Rows of the embedding, of the head, or of both when they are tied.
  absl::Status TokenRows(const std::string& path, const RawTensor& tensor) {
    const auto stated = std::find_if(
        raw_.parts.token_indices.begin(), raw_.parts.token_indices.end(), [&](const auto& entry) {
          return path == entry.first || path.ends_with("." + entry.first);
        });
    if (stated == raw_.parts.token_indices.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the configuration does not say which tokens ", tensor.name, " is of"));
    }
    const std::vector<int64_t>& tokens = stated->second;
    const int64_t n = static_cast<int64_t>(tokens.size());
    LK_ASSIGN_OR_RETURN(const Matrix2 rows, Read(tensor, {n, base_.hidden()}));
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return tokens[a] < tokens[b]; });
    std::vector<int32_t> index;
    Matrix2 sorted(n, rows.columns);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t token = tokens[order[k]];
      if (token < 0 || token >= base_.vocab_size() || (k > 0 && token == index.back())) {
        return absl::InvalidArgumentError(absl::StrCat(
            tensor.name, ": token ", token, " is given twice or outside the vocabulary of ",
            base_.vocab_size()));
      }
      index.push_back(static_cast<int32_t>(token));
      std::copy_n(rows.row(order[k]), rows.columns, sorted.row(k));
    }
    ReplacedRows replaced;
    replaced.index = packer_->Integers(index);
    LK_RETURN_IF_ERROR(packer_->Rows(tensor.name, sorted, &replaced.rows));
    const bool head = path == "lm_head";
    if (!head && path != kEmbeddingPath) {
      return absl::NotFoundError(absl::StrCat("the base model has no table ", path));
    }
    const bool head_has_own = raw_.parts.token_rows.contains("lm_head");
    if (!head) adapter_->embedding.rows = replaced;
    if (head || (base_.tied_head() && !head_has_own)) Head().rows = replaced;
    return absl::OkStatus();
  }

  absl::Status EmbeddingCopy() const {
    const RawTensor& copy = *raw_.parts.embedding_copy;
    LK_RETURN_IF_ERROR(CheckVocabulary(copy));
    LK_RETURN_IF_ERROR(Read(copy, {base_.vocab_size(), base_.hidden()}).status());
    return CheckBaseCopy(copy, kEmbeddingPath, [this](int32_t first, int32_t rows, float* out) {
      base_.ReadEmbedding(first, rows, out);
    });
  }

  const RawAdapter& raw_;
  const BaseModel& base_;
  Packer* const packer_;
  Adapter* const adapter_;
};

}  // namespace

absl::Status PackModelParts(const RawAdapter& raw, const BaseModel& base, Packer* packer,
                            Adapter* adapter) {
  return PartsPacker(raw, base, packer, adapter).Run();
}

// PEFT stores a copy of a targeted head or table. It is the base's own unless somebody changed it,
// which would be lost: refuse that, allowing for a quantised base.
absl::Status CheckBaseCopy(const RawTensor& copy, const std::string& path,
                           const std::function<void(int32_t, int32_t, float*)>& read) {
  constexpr double kMaxRelativeDifference = 0.2;
  constexpr int32_t kRows = 64;
  const int32_t out = static_cast<int32_t>(copy.view.rows());
  const int64_t in = copy.view.row_elements();
  std::vector<float> ours(kRows * in);
  std::vector<float> theirs(ours.size());
  double difference = 0;
  double norm = 0;
  for (int32_t first = 0; first < out; first += kRows) {
    const int32_t rows = std::min(kRows, out - first);
    read(first, rows, ours.data());
    Dequantize(copy.view.dtype, copy.view.row(first), rows * in, theirs.data());
    for (int64_t i = 0; i < rows * in; ++i) {
      const double d = double{theirs[i]} - ours[i];
      difference += d * d;
      norm += double{ours[i]} * ours[i];
    }
  }
  if (difference <= kMaxRelativeDifference * kMaxRelativeDifference * norm) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(copy.name, " differs from the base model's ", path, " by ",
                   100 * std::sqrt(difference / norm), " % (at most ",
                   100 * kMaxRelativeDifference, " %): the adapter belongs to another base"));
}

}  // namespace lorikeet
