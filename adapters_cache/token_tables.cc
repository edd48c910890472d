#include "adapters_cache/token_tables.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/model_parts.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

constexpr int32_t kRowsAtATime = 64;

const RawTensor* FindSaved(const RawAdapter& raw, std::string_view table) {
  const auto it = raw.parts.saved.find(std::string(table) + ".weight");
  return it == raw.parts.saved.end() ? nullptr : &it->second;
}

// Rows of a table by token, where they are not the base's.
class Rows {
 public:
  void Keep(const std::vector<int32_t>& tokens, Matrix2 rows) {
    const Matrix2& kept = kept_.emplace_back(std::move(rows));
    for (size_t k = 0; k < tokens.size(); ++k) rows_[tokens[k]] = kept.row(k);
  }
  // nullptr: the base's row.
  const float* Find(int32_t token) const {
    const auto it = rows_.find(token);
    return it == rows_.end() ? nullptr : it->second;
  }
  void TakeAll(const Rows& other) { rows_ = other.rows_; }  // `other` outlives this
  bool empty() const { return rows_.empty(); }
  bool has_all(int32_t vocab) const { return static_cast<int32_t>(rows_.size()) == vocab; }

  absl::Status Pack(const std::string& name, int64_t width, int32_t vocab, Packer* packer,
                    ReplacedRows* out) const {
    if (rows_.empty()) return absl::OkStatus();
    std::vector<int32_t> index;
    Matrix2 all(static_cast<int64_t>(rows_.size()), width);
    for (const auto& [token, row] : rows_) {
      std::copy_n(row, width, all.row(static_cast<int64_t>(index.size())));
      index.push_back(token);
    }
    if (!has_all(vocab)) out->index = packer->Integers(index);
    return packer->Rows(name, all, &out->rows);
  }

 private:
  std::deque<Matrix2> kept_;
  std::map<int32_t, const float*> rows_;
};

class Tables {
 public:
  Tables(const RawAdapter& raw, const BaseModel& base, int32_t vocab, Packer* packer,
         Adapter* adapter)
      : raw_(raw), base_(base), vocab_(vocab), packer_(packer), adapter_(adapter) {}

  absl::Status Run() {
    LK_RETURN_IF_ERROR(Whole(kEmbeddingPath, raw_.parts.embedding_copy, &embedding_));
    LK_RETURN_IF_ERROR(Whole(kHeadPath, raw_.parts.head_copy, &head_));
    const bool own_head = raw_.parts.head_copy || FindSaved(raw_, kHeadPath) != nullptr;
    // A tied head follows its embedding, but for one that was saved as a module of its own.
    if (base_.tied_head() && !own_head && FindSaved(raw_, kEmbeddingPath) == nullptr) {
      head_.TakeAll(embedding_);
    }
    for (const auto& [path, rows] : raw_.parts.token_rows) {
      LK_RETURN_IF_ERROR(TokenRows(path, rows));
    }
    LK_RETURN_IF_ERROR(CheckAdded(kEmbeddingPath, embedding_));
    if (vocab_ != base_.vocab_size()) LK_RETURN_IF_ERROR(ResizedHead());
    LK_RETURN_IF_ERROR(CheckAdded(kHeadPath, head_));
    if (const RawModule* module = raw_.Find(kEmbeddingPath)) {
      LK_RETURN_IF_ERROR(AdaptEmbedding(*module));
    }
    if (adapter_->embedding.rows.rows.data != nullptr && !embedding_.empty()) {
      return absl::UnimplementedError(absl::StrCat(raw_.variant, " on ", kEmbeddingPath,
                                                   " beside rows of the adapter's own is not served"));
    }
    LK_RETURN_IF_ERROR(embedding_.Pack(kEmbeddingPath, base_.hidden(), vocab_, packer_,
                                       &adapter_->embedding.rows));
    return head_.Pack(kHeadPath, base_.hidden(), vocab_, packer_, &Head().rows);
  }

 private:
  using ReadBase = std::function<void(int32_t first, int32_t rows, float* out)>;

  ModuleDelta& Head() { return adapter_->modules[HeadModule(base_.layers())]; }

  ReadBase BaseTable(std::string_view path) const {
    if (path == kEmbeddingPath) {
      return [this](int32_t first, int32_t rows, float* out) {
        base_.ReadEmbedding(first, rows, out);
      };
    }
    return [this](int32_t first, int32_t rows, float* out) {
      base_.ReadRows(HeadModule(base_.layers()), first, rows, out);
    };
  }

  // A table that modules_to_save names is all the adapter's; of a copy what differs.
  absl::Status Whole(const char* path, const std::optional<RawTensor>& copy, Rows* rows) {
    if (const RawTensor* saved = FindSaved(raw_, path)) {
      LK_ASSIGN_OR_RETURN(Matrix2 table, ReadTensor(*saved, {vocab_, base_.hidden()}));
      std::vector<int32_t> tokens(vocab_);
      for (int32_t t = 0; t < vocab_; ++t) tokens[t] = t;
      rows->Keep(tokens, std::move(table));
      return absl::OkStatus();
    }
    if (!copy) return absl::OkStatus();
    LK_ASSIGN_OR_RETURN(const Matrix2 table, ReadTensor(*copy, {vocab_, base_.hidden()}));
    LK_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                        Differing(copy->name, path, table));
    Matrix2 own(static_cast<int64_t>(tokens.size()), table.columns);
    for (size_t k = 0; k < tokens.size(); ++k) {
      std::copy_n(table.row(tokens[k]), table.columns, own.row(k));
    }
    rows->Keep(tokens, std::move(own));
    return absl::OkStatus();
  }

  // Tokens behind the base's, and those whose rows differ where most do not. Where most differ, one
  // of the two tables was rounded, which must be all: else the adapter belongs to another base. A head that an
  // adapter began with is not compared: it lacks what lowering takes from the base's.
  absl::StatusOr<std::vector<int32_t>> Differing(const std::string& name, const char* path,
                                                 const Matrix2& table) const {
    constexpr double kMostRounded = 0.2;
    const int32_t shared = std::min(vocab_, base_.vocab_size());
    std::vector<int32_t> changed;
    std::vector<float> ours(kRowsAtATime * table.columns);
    double difference = 0, norm = 0;
    const bool residual = path == std::string_view(kHeadPath) && TrainsOnResidual(raw_.config);
    for (int32_t t = residual ? shared : 0; t < shared; ++t) {
      if (t % kRowsAtATime == 0) {
        BaseTable(path)(t, std::min(kRowsAtATime, shared - t), ours.data());
      }
      const float* row = ours.data() + t % kRowsAtATime * table.columns;
      bool same = true;
      for (int64_t i = 0; i < table.columns; ++i) {
        const double d = double{table.at(t, i)} - row[i];
        same &= d == 0;
        difference += d * d;
        norm += double{row[i]} * row[i];
      }
      if (!same) changed.push_back(t);
    }
    if (2 * changed.size() > static_cast<size_t>(shared)) {
      if (difference > kMostRounded * kMostRounded * norm) {
        return absl::InvalidArgumentError(absl::StrCat(
            name, " differs from the base model's ", path, " by ",
            100 * std::sqrt(difference / norm), " % (at most ", 100 * kMostRounded,
            " %): the adapter belongs to another base"));
      }
      changed.clear();
    }
    for (int32_t t = shared; t < vocab_; ++t) changed.push_back(t);
    return changed;
  }

  const std::vector<int64_t>* IndicesOf(const std::string& path) const {
    for (const auto& [module, indices] : raw_.parts.token_indices) {
      if (path == module || path.ends_with("." + module)) return &indices;
    }
    return nullptr;
  }

  // Trained rows of the embedding, of the head, or of both when they are tied.
  absl::Status TokenRows(const std::string& path, const RawTensor& tensor) {
    const std::vector<int64_t>* stated = IndicesOf(path);
    // A tied head is trained with the embedding, whose indices they then are.
    if (stated == nullptr && base_.tied_head()) stated = IndicesOf(kEmbeddingPath);
    if (stated == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("the configuration does not say which tokens ", tensor.name, " is of"));
    }
    if (path != kHeadPath && path != kEmbeddingPath) {
      return absl::NotFoundError(absl::StrCat("the base model has no table ", path));
    }
    std::vector<int32_t> tokens;
    for (const int64_t token : *stated) {
      if (token < 0 || token >= vocab_ ||
          std::find(tokens.begin(), tokens.end(), token) != tokens.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat(tensor.name, ": token ", token,
                         " is given twice or outside the vocabulary of ", vocab_));
      }
      tokens.push_back(static_cast<int32_t>(token));
    }
    LK_ASSIGN_OR_RETURN(
        const Matrix2 rows,
        ReadTensor(tensor, {static_cast<int64_t>(tokens.size()), base_.hidden()}));
    const bool head = path == kHeadPath;
    const bool head_has_own = raw_.parts.token_rows.contains(kHeadPath);
    if (!head) embedding_.Keep(tokens, rows);
    if (head || (base_.tied_head() && !head_has_own)) head_.Keep(tokens, rows);
    return absl::OkStatus();
  }

  absl::Status CheckAdded(const char* path, const Rows& rows) const {
    for (int32_t t = base_.vocab_size(); t < vocab_; ++t) {
      if (rows.Find(t) != nullptr) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("the adapter has ", vocab_, " tokens, the base model ", base_.vocab_size(),
                       ", and ", path, " has no row for token ", t,
                       "; save it with PEFT's save_embedding_layers=True"));
    }
    return absl::OkStatus();
  }

  // A low-rank pair of the head as it is for the base's tokens, folded into the rows that are the
  // adapter's own.
  absl::Status ResizedHead() {
    const RawModule* module = raw_.Find(kHeadPath);
    if (module == nullptr || !module->a || !module->b) return absl::OkStatus();
    if (module->magnitude || module->lora_bias || module->base_bias) {
      return absl::UnimplementedError(
          absl::StrCat("DoRA or a bias on lm_head is not served with a vocabulary of ", vocab_,
                       " tokens; the base model has ", base_.vocab_size()));
    }
    const auto rank = module->a->view.shape.empty() ? 0 : module->a->view.shape[0];
    LK_ASSIGN_OR_RETURN(Matrix2 a, ReadTensor(*module->a, {rank, base_.hidden()}));
    LK_ASSIGN_OR_RETURN(Matrix2 b, ReadTensor(*module->b, {vocab_, rank}));
    Scale(module->scale, &b);
    std::vector<int32_t> tokens;
    for (int32_t t = 0; t < vocab_; ++t) {
      if (head_.Find(t) != nullptr) tokens.push_back(t);
    }
    Matrix2 own(static_cast<int64_t>(tokens.size()), base_.hidden());
    for (size_t k = 0; k < tokens.size(); ++k) {
      const Matrix2 delta = Multiply(RowsOf(b, tokens[k], 1), a);
      const float* row = head_.Find(tokens[k]);
      for (int64_t i = 0; i < own.columns; ++i) own.at(k, i) = row[i] + delta.at(0, i);
    }
    head_.Keep(tokens, std::move(own));
    Lowered lowered;
    Matrix2 for_base(base_.vocab_size(), rank);
    std::copy_n(b.row(0), std::min(b.rows, for_base.rows) * rank, for_base.row(0));
    lowered.pairs.push_back({std::move(a), std::move(for_base)});
    ModuleDelta delta;
    LK_RETURN_IF_ERROR(packer_->Module(kHeadPath, std::move(lowered), &delta));
    Head().low_rank = delta.low_rank;
    return absl::OkStatus();
  }

  // LoRA on the embedding, and DoRA, whose norms go down the table's columns.
  absl::Status AdaptEmbedding(const RawModule& module) {
    if (!module.a || !module.b) return absl::OkStatus();  // complained of by the reader
    const int64_t hidden = base_.hidden();
    const int64_t rank = module.a->view.shape.empty() ? 0 : module.a->view.shape[0];
    LK_ASSIGN_OR_RETURN(Matrix2 a, ReadTensor(*module.a, {rank, vocab_}));
    LK_ASSIGN_OR_RETURN(Matrix2 b, ReadTensor(*module.b, {hidden, rank}));
    Scale(module.scale, &b);
    Lowered lowered;
    if (module.magnitude) {
      LK_ASSIGN_OR_RETURN(const Matrix2 magnitude, ReadTensor(*module.magnitude, {hidden}));
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
    const int32_t hidden = base_.hidden();
    std::vector<double> squares(hidden);
    std::vector<float> rows(int64_t{kRowsAtATime} * hidden);
    for (int32_t t = 0; t < vocab_; ++t) {
      const int32_t of_base = std::min(kRowsAtATime, base_.vocab_size() - t);
      if (t % kRowsAtATime == 0 && of_base > 0) base_.ReadEmbedding(t, of_base, rows.data());
      const float* own = embedding_.Find(t);
      const float* row = own ? own : rows.data() + int64_t{t % kRowsAtATime} * hidden;
      for (int32_t d = 0; d < hidden; ++d) {
        double value = row[d];
        for (int64_t k = 0; k < a.rows; ++k) value += double{a.at(k, t)} * b.at(d, k);
        squares[d] += value * value;
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

  const RawAdapter& raw_;
  const BaseModel& base_;
  const int32_t vocab_;
  Packer* const packer_;
  Adapter* const adapter_;
  Rows embedding_, head_;
};

}  // namespace

absl::StatusOr<int32_t> VocabularyOf(const RawAdapter& raw, const BaseModel& base) {
  std::vector<std::pair<const RawTensor*, size_t>> tables;  // and their dimension of tokens
  for (const char* path : {kEmbeddingPath, kHeadPath}) {
    if (const RawTensor* saved = FindSaved(raw, path)) tables.push_back({saved, 0});
  }
  for (const auto* copy : {&raw.parts.embedding_copy, &raw.parts.head_copy}) {
    if (copy->has_value()) tables.push_back({&**copy, 0});
  }
  const RawModule* embedding = raw.Find(kEmbeddingPath);
  if (embedding != nullptr && embedding->a) tables.push_back({&*embedding->a, 1});
  const RawModule* head = raw.Find(kHeadPath);
  if (head != nullptr && head->b) tables.push_back({&*head->b, 0});
  const RawTensor* first = nullptr;
  int64_t vocab = base.vocab_size();
  for (const auto& [tensor, dimension] : tables) {
    const std::vector<int64_t>& shape = tensor->view.shape;
    if (shape.size() != 2) continue;  // whoever reads it says so
    const int64_t tokens = shape[dimension];
    if (first == nullptr) first = tensor, vocab = tokens;
    if (tokens == vocab) continue;
    return absl::InvalidArgumentError(absl::StrCat(first->name, " has ", vocab, " tokens and ",
                                                   tensor->name, " ", tokens));
  }
  const int64_t most = int64_t{base.vocab_size()} + Limits::kMaxAddedTokens;
  if (vocab >= 1 && vocab <= most) return static_cast<int32_t>(vocab);
  return absl::ResourceExhaustedError(absl::StrCat(
      first->name, " has ", vocab, " tokens; with a base model of ", base.vocab_size(), " 1 to ",
      most, " are served"));
}

absl::Status PackTokenTables(const RawAdapter& raw, const BaseModel& base, int32_t vocab,
                             Packer* packer, Adapter* adapter) {
  return Tables(raw, base, vocab, packer, adapter).Run();
}

}  // namespace lorikeet
