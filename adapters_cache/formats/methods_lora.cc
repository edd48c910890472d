// LoRA's relatives whose factors are more than a pair, or whose training changed the base's weight.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/methods.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

// Block k of n blocks of rows to the k-th slice of `columns`.
Matrix2 BlockDiagonalRows(const Matrix2& a, int64_t n, int64_t columns) {
  Matrix2 out(a.rows, columns);
  for (int64_t r = 0; r < a.rows; ++r) {
    std::copy_n(a.row(r), a.columns, out.row(r) + r / (a.rows / n) * a.columns);
  }
  return out;
}

// BD-LoRA: one factor is block-diagonal, stored without its zeros. Returns whether the pair is.
absl::StatusOr<bool> ExpandBlocks(const ModuleTensors& m, Matrix2* a, Matrix2* b) {
  const auto config = m.config().find("use_bdlora");
  if (config == m.config().end() || !IsSet(*config)) return false;
  const auto blocks = config->find("nblocks");
  if (!config->is_object() || blocks == config->end() || !blocks->is_number_integer()) {
    return m.Invalid("use_bdlora has no nblocks");
  }
  const int64_t n = blocks->get<int64_t>();
  if (n < 1 || a->rows % n || b->rows % n) {
    return m.Invalid(absl::StrCat("nblocks ", n, " divides neither the rank nor the outputs"));
  }
  if (a->columns * n == m.in() && n > 1) *a = BlockDiagonalRows(*a, n, m.in());
  if (b->columns * n == a->rows && n > 1) *b = BlockDiagonalRows(*b, n, a->rows);
  return n > 1;
}

// QALoRA (Xu et al. 2023): A reads means of groups of g inputs, times the number of groups.
void ExpandGroups(const ModuleTensors& m, Matrix2* a) {
  if (!m.Flag("use_qalora", false) || a->columns == 0 || m.in() % a->columns) return;
  const int64_t g = m.in() / a->columns;
  Matrix2 out(a->rows, m.in());
  const float factor = static_cast<float>(a->columns) / static_cast<float>(g);
  for (int64_t r = 0; r < a->rows; ++r) {
    for (int64_t i = 0; i < m.in(); ++i) out.at(r, i) = factor * a->at(r, i / g);
  }
  *a = std::move(out);
}

// −U S Vᵀ of the `count` largest or smallest singular components.
absl::Status SubtractComponents(const ModuleTensors& m, bool largest, int64_t count, Lowered* out) {
  const absl::StatusOr<Svd> found = largest ? LargestSingularValues(m.Weight(), count) : SingularValues(m.Weight());
  if (!found.ok()) return m.Invalid(std::string(found.status().message()));
  const Svd& svd = *found;
  const int64_t all = static_cast<int64_t>(svd.s.size()), first = largest ? 0 : all - count;
  if (first < 0) return m.Invalid(absl::StrCat("rank ", count, " of ", all, " singular values"));
  Matrix2 u = ColumnsOf(svd.u, first, count);
  ScaleColumns({svd.s.begin() + first, svd.s.begin() + first + count}, &u);
  Scale(-1, &u);
  out->pairs.push_back({Transpose(ColumnsOf(svd.v, first, count)), std::move(u)});
  return absl::OkStatus();
}

// What the training's start took from the base's weight.
absl::Status SubtractStart(const ModuleTensors& m, int64_t rank, double scale, Lowered* out) {
  const std::string init = InitOf(m.config());
  if (init == "pissa") return SubtractComponents(m, true, rank, out);  // Meng et al. 2024
  if (init != "olora") return absl::OkStatus();                        // Büyükakyüz 2024
  const int64_t most = std::min(m.in(), m.out());
  if (rank > most) return m.Invalid(absl::StrCat("rank ", rank, " of ", most));
  // Q's first columns are those of W's alone, and R's first rows what they make of W.
  Matrix2 q = HouseholderQ(m.WeightColumns(rank));
  Matrix2 r = m.TimesWeight(Transpose(q));
  Scale(-scale, &q);
  out->pairs.push_back({std::move(r), std::move(q)});
  return absl::OkStatus();
}

// DoRA: the norms are those of W with all that the pairs add.
absl::Status ScaleOutputs(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto magnitude, m.Get("lora_magnitude_vector", {m.out()}));
  Matrix2 a(0, m.in());
  for (const LoweredPair& pair : out->pairs) {
    a.rows += pair.a.rows;
    a.values.insert(a.values.end(), pair.a.values.begin(), pair.a.values.end());
  }
  Matrix2 b(m.out(), a.rows);
  int64_t first = 0;
  for (const LoweredPair& pair : out->pairs) {
    for (int64_t o = 0; o < m.out(); ++o) std::copy_n(pair.b.row(o), pair.b.columns, b.row(o) + first);
    first += pair.b.columns;
  }
  LK_ASSIGN_OR_RETURN(out->out_scale, m.DoraScale(a, b, magnitude));
  return absl::OkStatus();
}

}  // namespace

absl::Status LowerLoraRelative(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(Matrix2 a, m.GetMatrix("lora_A.weight", -1, -1));
  LK_ASSIGN_OR_RETURN(Matrix2 b, m.GetMatrix("lora_B.weight", m.out(), -1));
  const int64_t rank = a.rows;
  const double alpha = m.Patterned("alpha_pattern", "lora_alpha", 8);
  const bool root = m.Flag("use_rslora", false);
  const bool tail = m.Has("lora_diag");
  ExpandGroups(m, &a);
  LK_RETURN_IF_ERROR(m.status());
  LK_ASSIGN_OR_RETURN(const bool blocks, ExpandBlocks(m, &a, &b));
  if (rank == 0 || a.columns != m.in() || b.columns != rank) {
    return m.Invalid(absl::StrCat("lora_A [", a.rows, ", ", a.columns, "] and lora_B [", b.rows,
                                  ", ", b.columns, "] do not fit the linear"));
  }
  const double scale = alpha / (root ? std::sqrt(static_cast<double>(rank)) : rank);
  if (tail) {  // KaSA (Wang et al. 2024)
    LK_ASSIGN_OR_RETURN(const auto diagonal, m.Get("lora_diag", {rank}));
    ScaleRows(diagonal, &a);
    LK_RETURN_IF_ERROR(SubtractComponents(m, false, rank, out));
  }
  if (m.Has("lora_latent_mapping")) {  // LoRA-XS (Bałazy et al. 2024): a and b are frozen
    LK_ASSIGN_OR_RETURN(Matrix2 latent, m.GetMatrix("lora_latent_mapping", rank, rank));
    Scale(scale, &latent);
    out->pairs.push_back({.shared_a = std::make_shared<Matrix2>(std::move(a)),
                          .shared_b = std::make_shared<Matrix2>(std::move(b)),
                          .rank_mix = std::move(latent)});
  } else {
    Scale(scale, &b);
    out->pairs.push_back({.a = std::move(a), .b = std::move(b), .blocks = blocks});
  }
  LK_RETURN_IF_ERROR(SubtractStart(m, rank, scale, out));
  return m.Has("lora_magnitude_vector") ? ScaleOutputs(m, out) : absl::OkStatus();
}

}  // namespace lorikeet
