// Methods whose delta is a low-rank product made of the file's tensors alone.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/methods.h"
#include "adapters_cache/formats/tensor_train.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

absl::Status AddPair(Matrix2 a, Matrix2 b, double scale, Lowered* out) {
  Scale(scale, &b);
  out->pairs.push_back({std::move(a), std::move(b)});
  return absl::OkStatus();
}

// An integer setting within [low, high].
absl::StatusOr<int64_t> Whole(const ModuleTensors& m, const char* key, int64_t fallback, int64_t low,
                              int64_t high) {
  const double value = m.Number(key, static_cast<double>(fallback));
  LK_RETURN_IF_ERROR(m.status());
  if (value >= low && value <= high && value == std::floor(value)) return static_cast<int64_t>(value);
  return absl::InvalidArgumentError(
      absl::StrCat(key, " is ", value, "; it must be a whole number of ", low, " to ", high));
}

// lora_alpha over the rank, which is that of the file's tensors; `r` must say the same if it is there.
absl::StatusOr<double> ScaleOfRank(const ModuleTensors& m, int64_t rank) {
  const double stated = m.Number("r", static_cast<double>(rank)), alpha = m.Number("lora_alpha", 8);
  LK_RETURN_IF_ERROR(m.status());
  if (stated == static_cast<double>(rank)) return alpha / static_cast<double>(rank);
  return m.Invalid(absl::StrCat("r is ", stated, ", the rank of its tensors ", rank));
}

std::string Join(std::string_view prefix, std::string_view rest) {
  return std::string(prefix) + std::string(rest);
}

}  // namespace

// AdaLoRA (Zhang et al. 2023): s·B·(E∘A), s = α / (init_r + 1e-5).
absl::Status LowerAdaLora(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(Matrix2 a, m.GetMatrix("lora_A", -1, m.in()));
  LK_ASSIGN_OR_RETURN(Matrix2 b, m.GetMatrix("lora_B", m.out(), a.rows));
  LK_ASSIGN_OR_RETURN(const std::vector<float> e, m.Get("lora_E", {a.rows, 1}));
  m.Ignore("lora_ranknum");
  const double rank = m.Number("init_r", 12);
  double alpha = m.Number("lora_alpha", 8);
  LK_RETURN_IF_ERROR(m.status());
  if (rank <= 0) return m.Invalid(absl::StrCat("init_r is ", rank, "; it must be above 0"));
  if (alpha <= 0) alpha = rank;
  ScaleRows(e, &a);
  return AddPair(std::move(a), std::move(b), alpha / (rank + 1e-5), out);
}

// DeLoRA (Bini et al. 2025): columns and rows normalised, one strength λ, inputs scaled by the norms
// of W's columns.
absl::Status LowerDelora(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(Matrix2 a, m.GetMatrix("delora_A", -1, m.in()));
  LK_ASSIGN_OR_RETURN(Matrix2 b, m.GetMatrix("delora_B", m.out(), a.rows));
  LK_ASSIGN_OR_RETURN(const std::vector<float> lambda, m.Get("delora_lambda", {1}));
  std::vector<float> norms(m.in());
  if (m.Has("delora_w_norm")) {
    LK_ASSIGN_OR_RETURN(norms, m.Get("delora_w_norm", {m.in()}));
  } else {
    const Matrix2 w = m.Weight();
    for (int64_t c = 0; c < w.columns; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < w.rows; ++r) sum += double{w.at(r, c)} * w.at(r, c);
      norms[c] = static_cast<float>(std::sqrt(sum));
    }
  }
  std::vector<float> factors(a.rows);
  for (int64_t k = 0; k < a.rows; ++k) {
    double row = 0, column = 0;
    for (int64_t i = 0; i < a.columns; ++i) row += double{a.at(k, i)} * a.at(k, i);
    for (int64_t o = 0; o < b.rows; ++o) column += double{b.at(o, k)} * b.at(o, k);
    factors[k] = static_cast<float>(lambda[0] / (a.rows * std::max(std::sqrt(row), 1e-4) *
                                                 std::max(std::sqrt(column), 1e-4)));
  }
  ScaleColumns(norms, &a);
  ScaleColumns(factors, &b);
  return AddPair(std::move(a), std::move(b), 1, out);
}

// GraLoRA (Jung et al. 2025): N input slices, each rank cut in N for the N output slices.
absl::Status LowerGralora(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf("gralora_A", 3));
  const int64_t n = shape[0], r = shape[2];
  if (m.in() % n || m.out() % n || r % n) {
    return m.Invalid(absl::StrCat("gralora_A has ", n, " slices, which do not divide rank ", r,
                                  " and the linear's widths"));
  }
  const int64_t in = m.in() / n, width = m.out() / n, part = r / n;
  LK_ASSIGN_OR_RETURN(const auto a, m.Get("gralora_A", {n, in, r}));
  LK_ASSIGN_OR_RETURN(const auto b, m.Get("gralora_B", {n, r, width}));
  // Rank (slice, j, t): slice's column j·part + t of A, and row slice·part + t of B_j.
  Matrix2 big_a(n * r, m.in()), big_b(m.out(), n * r);
  for (int64_t slice = 0; slice < n; ++slice) {
    for (int64_t k = 0; k < r; ++k) {
      const int64_t j = k / part, t = k % part, rank = slice * r + k;
      for (int64_t i = 0; i < in; ++i) {
        big_a.at(rank, slice * in + i) = a[(slice * in + i) * r + k];
      }
      for (int64_t o = 0; o < width; ++o) {
        big_b.at(j * width + o, rank) = b[(j * r + slice * part + t) * width + o];
      }
    }
  }
  int64_t hybrid = 0;
  Matrix2 general_a, general_b;
  if (m.Has("gralora_A_general.weight")) {
    LK_ASSIGN_OR_RETURN(general_a, m.GetMatrix("gralora_A_general.weight", -1, m.in()));
    hybrid = general_a.rows;
    LK_ASSIGN_OR_RETURN(general_b, m.GetMatrix("gralora_B_general.weight", m.out(), hybrid));
  }
  const double scale = m.Number("alpha", 64) / static_cast<double>(r + hybrid);
  const double wanted = m.Number("hybrid_r", 0);
  LK_RETURN_IF_ERROR(m.status());
  if (wanted > 0 && hybrid == 0) return m.Invalid("hybrid_r asks for gralora_A_general, which the file does not have");
  if (hybrid > 0) {
    LK_RETURN_IF_ERROR(AddPair(std::move(general_a), std::move(general_b), scale, out));
  }
  Scale(scale, &big_b);
  out->pairs.push_back({.a = std::move(big_a), .b = std::move(big_b), .blocks = true});
  return absl::OkStatus();
}

// LoHa (Hyeon-Woo et al. 2022): (w1a·w1b) ∘ (w2a·w2b), a product of rank r².
absl::Status LowerLoha(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const Matrix2 a1, m.GetMatrix("hada_w1_a", m.out(), -1));
  const int64_t r = a1.columns;
  LK_ASSIGN_OR_RETURN(const Matrix2 b1, m.GetMatrix("hada_w1_b", r, m.in()));
  LK_ASSIGN_OR_RETURN(const Matrix2 a2, m.GetMatrix("hada_w2_a", m.out(), r));
  LK_ASSIGN_OR_RETURN(const Matrix2 b2, m.GetMatrix("hada_w2_b", r, m.in()));
  const double alpha = m.Patterned("alpha_pattern", "alpha", 8);
  LK_RETURN_IF_ERROR(m.status());
  const double scale = alpha / static_cast<double>(std::max<int64_t>(r, 1));
  if (r > 64 || r * r * (m.in() + m.out()) > int64_t{m.in()} * m.out()) {
    out->dense = Multiply(a1, b1);
    const Matrix2 other = Multiply(a2, b2);
    for (size_t i = 0; i < other.values.size(); ++i) {
      out->dense.values[i] *= static_cast<float>(scale * other.values[i]);
    }
    if (r * r <= Limits::kMaxAdapterRank) out->dense_is_choice = true;
  }
  if (r * r > Limits::kMaxAdapterRank) return absl::OkStatus();
  Matrix2 a(r * r, m.in()), b(m.out(), r * r);
  for (int64_t p = 0; p < r; ++p) {
    for (int64_t q = 0; q < r; ++q) {
      for (int64_t i = 0; i < m.in(); ++i) a.at(p * r + q, i) = b1.at(p, i) * b2.at(q, i);
      for (int64_t o = 0; o < m.out(); ++o) b.at(o, p * r + q) = a1.at(o, p) * a2.at(o, q);
    }
  }
  return AddPair(std::move(a), std::move(b), scale, out);
}

// MiSS (Kang & Yin 2024), once Bone: chunks of r inputs are summed, then multiplied by a block.
// "bat" makes a dense delta W[p, q]·B_p + B_p of every r×r tile of W.
absl::Status LowerMiss(const ModuleTensors& m, Lowered* out) {
  const std::string name = m.Has("bone_block") ? "bone_block" : "miss_block";
  const auto init = m.config().find("init_weights");
  const bool bat = init != m.config().end() && *init == "bat";
  const bool mini = init != m.config().end() && *init == "mini";
  if (bat) {
    LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf(name, 3));
    const int64_t r = shape[1];
    if (m.out() % r || m.in() % r) return m.Invalid(absl::StrCat("block ", r, " divides no width"));
    LK_ASSIGN_OR_RETURN(const auto blocks, m.Get(name, {m.out() / r, r, r}));
    const Matrix2 w = m.Weight();
    out->dense = Matrix2(m.out(), m.in());
    for (int64_t o = 0; o < m.out(); ++o) {
      const float* block = &blocks[o / r * r * r];
      for (int64_t i = 0; i < m.in(); ++i) {
        double sum = block[o % r * r + i % r];
        for (int64_t k = 0; k < r; ++k) sum += double{w.at(o, i / r * r + k)} * block[k * r + i % r];
        out->dense.at(o, i) = static_cast<float>(sum);
      }
    }
    return absl::OkStatus();
  }
  LK_ASSIGN_OR_RETURN(const Matrix2 block, m.GetMatrix(name, -1, mini ? -1 : m.out()));
  if (block.rows == 0 || block.columns == 0 || m.out() % block.columns) {
    return m.Invalid(absl::StrCat(name, " [", block.rows, ", ", block.columns,
                                  "] does not tile the outputs"));
  }
  const auto tiled_identity = [&]() -> absl::StatusOr<Matrix2> {
    Matrix2 a(block.rows, m.in());
    for (int64_t i = 0; i < m.in(); ++i) a.at(i % block.rows, i) = 1;
    return a;
  };
  LK_ASSIGN_OR_RETURN(auto a, m.SharedFactor(absl::StrCat(block.rows, " x ", m.in()), tiled_identity));
  Matrix2 b(m.out(), block.rows);
  for (int64_t o = 0; o < m.out(); ++o) {
    for (int64_t k = 0; k < block.rows; ++k) b.at(o, k) = block.at(k, o % block.columns);
  }
  out->pairs.push_back({.b = std::move(b), .shared_a = std::move(a)});
  return absl::OkStatus();
}

// Poly (Ponti et al. 2022): a task's pair is a sum of skills' by its shares, every slice of the inputs and of the
// outputs with shares of its own.
absl::Status LowerPoly(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf("poly_lora_A", 4));
  const int64_t splits = shape[0], skills = shape[1], in = shape[2], r = shape[3];
  const int64_t width = m.out() / splits;
  if (splits * in != m.in() || splits * width != m.out()) {
    return m.Invalid(absl::StrCat("poly_lora_A has ", splits, " slices of ", in, ", which are not the linear's"));
  }
  LK_ASSIGN_OR_RETURN(const auto a, m.Get("poly_lora_A", shape));
  LK_ASSIGN_OR_RETURN(const auto b, m.Get("poly_lora_B", {splits, skills, r, width}));
  LK_ASSIGN_OR_RETURN(const Matrix2 logits, m.GetMatrix("poly_router.module_logits", -1, splits * skills));
  LK_ASSIGN_OR_RETURN(const int64_t task, TaskOf(m.config(), logits.rows));
  Matrix2 task_a(r, m.in()), task_b(m.out(), r);
  for (int64_t split = 0; split < splits; ++split) {
    double total = 1e-12;  // PEFT's
    const auto weight = [&](int64_t skill) { return 1 / (1 + std::exp(-double{logits.at(task, split * skills + skill)})); };
    for (int64_t skill = 0; skill < skills; ++skill) total += weight(skill);
    for (int64_t skill = 0; skill < skills; ++skill) {
      const auto share = static_cast<float>(weight(skill) / total);
      const float* from_a = &a[(split * skills + skill) * in * r];
      const float* from_b = &b[(split * skills + skill) * r * width];
      for (int64_t i = 0; i < in * r; ++i) task_a.at(i % r, split * in + i / r) += share * from_a[i];
      for (int64_t i = 0; i < r * width; ++i) task_b.at(split * width + i % width, i / width) += share * from_b[i];
    }
  }
  return AddPair(std::move(task_a), std::move(task_b), 1 / static_cast<double>(r), out);
}

namespace {

// What a linear of RandLoRA has: the bases [r, 1, ≥ low] and [≥ high, ≥ n, r] of all adapters, n of them used,
// and scales of its own.
struct RandLora {
  Matrix2 lambda;             // [r, n]
  Matrix2 gamma;              // [n, low]
  std::vector<int64_t> a, b;  // shapes of the bases
  double scale = 1;

  int64_t rank() const { return lambda.rows * lambda.columns; }
};

absl::StatusOr<RandLora> ReadRandLora(const ModuleTensors& m) {
  RandLora out;
  const int64_t low = std::min(m.in(), m.out()), high = std::max(m.in(), m.out());
  LK_ASSIGN_OR_RETURN(out.lambda, m.GetMatrix("randlora_lambda", -1, -1));
  const int64_t r = out.lambda.rows, bases = out.lambda.columns;
  LK_ASSIGN_OR_RETURN(out.gamma, m.GetMatrix("randlora_gamma", bases, low));
  if (r == 0 || bases == 0) return m.Invalid("randlora_lambda is empty");
  if (!m.Has("randlora_A") && !m.HasShared("randlora_A")) {
    return m.Invalid("the file has no projections (save_projection: false), and they cannot be "
                     "made again; save the adapter with save_projection=True");
  }
  LK_ASSIGN_OR_RETURN(out.a, m.ShapeOf("randlora_A", 3));
  LK_ASSIGN_OR_RETURN(out.b, m.ShapeOf("randlora_B", 3));
  if (out.a[0] != r || out.a[1] != 1 || out.b[2] != r) {
    return m.Invalid(absl::StrCat("randlora_A and randlora_B are not of rank ", r));
  }
  if (out.a[2] < low || out.b[0] < high || out.b[1] < bases) {
    return m.Invalid("randlora_A or randlora_B is too small for this linear");
  }
  out.scale = m.Number("randlora_alpha", 640) / static_cast<double>(r);
  LK_RETURN_IF_ERROR(m.status());
  return out;
}

// Bases of B side by side, base · r + column: [high, rank], as many rows as are stored.
absl::StatusOr<Matrix2> BasesOfB(const ModuleTensors& m, const RandLora& of) {
  LK_ASSIGN_OR_RETURN(const auto b, m.Get("randlora_B", of.b));
  Matrix2 all(of.b[0], of.rank());
  for (int64_t h = 0; h < all.rows; ++h) std::copy_n(&b[h * of.b[1] * of.b[2]], all.columns, all.row(h));
  return all;
}

}  // namespace

// RandLoRA (Albert et al. 2025): s · B U, a full-rank sum of fixed random bases with trained diagonals. U is the
// adapter's own, B all adapters'; for linears that narrow, the transpose of it.
absl::Status LowerRandLora(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const RandLora of, ReadRandLora(m));
  LK_ASSIGN_OR_RETURN(const auto a, m.Get("randlora_A", of.a));
  const int64_t bases = of.lambda.columns;
  Matrix2 u(of.rank(), of.gamma.columns);
  for (int64_t k = 0; k < u.rows; ++k) {  // rank by rank of A, unlike B's: PEFT flattens them so
    const int64_t p = k / bases, q = k % bases;
    const double weight = of.scale * of.lambda.at(p, q);
    for (int64_t i = 0; i < u.columns; ++i) {
      u.at(k, i) = static_cast<float>(weight * a[p * of.a[2] + i] * of.gamma.at(q, i));
    }
  }
  const bool widens = m.in() <= m.out();
  if (of.rank() > Limits::kMaxAdapterRank) {
    LK_ASSIGN_OR_RETURN(const Matrix2 b, BasesOfB(m, of));
    out->dense = Multiply(RowsOf(b, 0, std::max(m.in(), m.out())), u);
    if (!widens) out->dense = Transpose(out->dense);
    return absl::OkStatus();
  }
  const std::string which = absl::StrCat(bases, widens ? " of " : " turned of ", m.HashOf("randlora_B"));
  LK_ASSIGN_OR_RETURN(auto b, m.SharedFactor(which, [&]() -> absl::StatusOr<Matrix2> {
    LK_ASSIGN_OR_RETURN(Matrix2 all, BasesOfB(m, of));
    return widens ? std::move(all) : Transpose(all);
  }));
  if (widens) out->pairs.push_back({.a = std::move(u), .shared_b = std::move(b)});
  else out->pairs.push_back({.b = Transpose(u), .shared_a = std::move(b)});
  return absl::OkStatus();
}

// TinyLoRA (Morris et al. 2026): B·(Σ v_k P_k)·A, v shared by groups of linears.
absl::Status LowerTinyLora(const ModuleTensors& m, Lowered* out) {
  for (const char* projection : {"tinylora_A", "tinylora_B", "tinylora_P"}) {
    if (m.Has(projection)) continue;
    return m.Invalid(absl::StrCat("the file has no ", projection, " (save_projection: false), and it cannot be made "
                                  "again; save the adapter with save_projection=True"));
  }
  LK_ASSIGN_OR_RETURN(Matrix2 a, m.GetMatrix("tinylora_A", -1, m.in()));
  const int64_t r = a.rows;
  LK_ASSIGN_OR_RETURN(Matrix2 b, m.GetMatrix("tinylora_B", m.out(), r));
  LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf("tinylora_P", 3));
  LK_ASSIGN_OR_RETURN(const auto p, m.Get("tinylora_P", {shape[0], r, r}));
  const double tying = m.Number("weight_tying", 0);
  LK_RETURN_IF_ERROR(m.status());
  const int64_t n = m.count();
  const double wanted = std::nearbyint(n * (1 - std::clamp(tying, 0.0, 1.0)));
  const int64_t groups = std::max<int64_t>(1, static_cast<int64_t>(wanted));
  const int64_t group =
      std::min(m.ordinal() / std::max<int64_t>(1, n / groups), groups - 1);
  LK_ASSIGN_OR_RETURN(const auto v, m.Get(absl::StrCat("tinylora_v.", group), {shape[0]}));
  Matrix2 middle(r, r);
  for (int64_t k = 0; k < shape[0]; ++k) {
    for (int64_t i = 0; i < r * r; ++i) middle.values[i] += v[k] * p[k * r * r + i];
  }
  out->pairs.push_back({.shared_a = std::make_shared<Matrix2>(std::move(a)),
                        .shared_b = std::make_shared<Matrix2>(std::move(b)),
                        .rank_mix = std::move(middle)});
  return absl::OkStatus();
}

// Uni-LoRA (Li et al. 2025): every factor entry is one of d shared values, scaled.
absl::Status LowerUniLora(const ModuleTensors& m, Lowered* out) {
  if (!m.Has("unilora_indices_A")) {
    return m.Invalid("the file has no unilora_indices; save the adapter with save_indices=True");
  }
  LK_ASSIGN_OR_RETURN(const auto theta, m.Get("unilora_theta_d", {-1}));
  const auto factor = [&](std::string_view which, int64_t rows,
                          int64_t columns) -> absl::StatusOr<Matrix2> {
    LK_ASSIGN_OR_RETURN(const auto indices,
                        m.GetIndices(Join("unilora_indices_", which), {rows, columns}));
    LK_ASSIGN_OR_RETURN(Matrix2 scaled, m.GetMatrix(Join("unilora_scales_", which), rows, columns));
    for (size_t i = 0; i < indices.size(); ++i) {
      if (indices[i] < 0 || indices[i] >= static_cast<int64_t>(theta.size())) {
        return m.Invalid(absl::StrCat("unilora index ", indices[i], " of ", theta.size()));
      }
      scaled.values[i] *= theta[indices[i]];
    }
    return scaled;
  };
  LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf("unilora_indices_A", 2));
  LK_ASSIGN_OR_RETURN(Matrix2 a, factor("A", shape[0], m.in()));
  LK_ASSIGN_OR_RETURN(Matrix2 b, factor("B", m.out(), shape[0]));
  return AddPair(std::move(a), std::move(b), 1, out);
}

namespace {

// Mixtures of bank vectors: [d0, d1, v] from logits [d0, d1, h] or from their top-k form.
absl::StatusOr<std::vector<float>> VbMixtures(const ModuleTensors& m, const std::string& name,
                                              const Matrix2& bank, int64_t topk,
                                              std::vector<int64_t>* dims) {
  const bool stored = m.Has(name + "_topk_indices");
  LK_ASSIGN_OR_RETURN(*dims, m.ShapeOf(stored ? name + "_topk_indices" : name, 3));
  const int64_t cells = (*dims)[0] * (*dims)[1], v = bank.columns;
  std::vector<int64_t> indices;
  std::vector<float> weights;
  if (stored) {
    topk = (*dims)[2];
    LK_ASSIGN_OR_RETURN(indices, m.GetIndices(name + "_topk_indices", *dims));
    LK_ASSIGN_OR_RETURN(const auto most,
                        m.Get(name + "_topk_weights", {(*dims)[0], (*dims)[1], topk - 1}));
    for (int64_t c = 0; c < cells; ++c) {
      float rest = 1;
      for (int64_t k = 0; k + 1 < topk; ++k) {
        weights.push_back(most[c * (topk - 1) + k]);
        rest -= weights.back();
      }
      weights.push_back(rest);
    }
  } else {
    const int64_t h = bank.rows;
    LK_ASSIGN_OR_RETURN(const auto logits, m.Get(name, {(*dims)[0], (*dims)[1], h}));
    if (topk > h) return m.Invalid(absl::StrCat("topk is ", topk, " of ", h, " vectors"));
    std::vector<int64_t> order(h);
    for (int64_t c = 0; c < cells; ++c) {
      const float* l = &logits[c * h];
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + topk, order.end(),
                        [l](int64_t x, int64_t y) { return l[x] > l[y]; });
      double total = 0;
      for (int64_t k = 0; k < topk; ++k) total += std::exp(double{l[order[k]]} - l[order[0]]);
      for (int64_t k = 0; k < topk; ++k) {
        indices.push_back(order[k]);
        weights.push_back(
            static_cast<float>(std::exp(double{l[order[k]]} - l[order[0]]) / total));
      }
    }
  }
  std::vector<float> out(cells * v);
  for (int64_t c = 0; c < cells; ++c) {
    for (int64_t k = 0; k < topk; ++k) {
      const int64_t index = indices[c * topk + k];
      if (index < 0 || index >= bank.rows) {
        return m.Invalid(absl::StrCat("vector ", index, " of a bank of ", bank.rows));
      }
      for (int64_t i = 0; i < v; ++i) out[c * v + i] += weights[c * topk + k] * bank.at(index, i);
    }
  }
  return out;
}

}  // namespace

// VB-LoRA (Li et al. 2024): blocks of the factors are mixtures of vectors from one bank.
absl::Status LowerVbLora(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const Matrix2 bank, m.GetMatrix("vblora_vector_bank", -1, -1));
  LK_ASSIGN_OR_RETURN(const int64_t topk, Whole(m, "topk", 2, 1, bank.rows));
  std::vector<int64_t> dims;
  LK_ASSIGN_OR_RETURN(const auto a, VbMixtures(m, "vblora_logits_A", bank, topk, &dims));
  const int64_t r = dims[0], v = bank.columns;
  if (dims[1] * v != m.in()) return m.Invalid("vblora_logits_A does not fit the linear's input");
  Matrix2 full_a(r, m.in(), a);
  LK_ASSIGN_OR_RETURN(const auto b, VbMixtures(m, "vblora_logits_B", bank, topk, &dims));
  if (dims[0] * v != m.out() || dims[1] != r) {
    return m.Invalid("vblora_logits_B does not fit the linear's output and rank");
  }
  Matrix2 full_b(m.out(), r);
  for (int64_t o = 0; o < m.out(); ++o) {
    for (int64_t k = 0; k < r; ++k) full_b.at(o, k) = b[(o / v * r + k) * v + o % v];
  }
  return AddPair(std::move(full_a), std::move(full_b), 1, out);
}

namespace {

// What the tensors of a pair that all linears share are called, and those of a linear's own.
struct SharedPairNames {
  std::string a, b;                      // [≥ rank, ≥ in] and [≥ out, rank]
  std::string rank_scale, delta_scale;  // [rows of a] and [out]
};

// scale · delta_scale ∘ (B (rank_scale ∘ (A x))).
absl::Status AddSharedPair(const ModuleTensors& m, const SharedPairNames& names, double scale, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto a_shape, m.ShapeOf(names.a, 2));
  LK_ASSIGN_OR_RETURN(const auto b_shape, m.ShapeOf(names.b, 2));
  const int64_t r = b_shape[1];
  if (a_shape[1] < m.in() || b_shape[0] < m.out() || a_shape[0] < r) {
    return m.Invalid("the shared projections are smaller than this linear");
  }
  LK_ASSIGN_OR_RETURN(auto d, m.Get(names.rank_scale, {a_shape[0]}));
  LK_ASSIGN_OR_RETURN(auto b, m.Get(names.delta_scale, {m.out()}));
  d.resize(r);
  for (float& value : b) value = static_cast<float>(scale * value);
  LK_ASSIGN_OR_RETURN(auto shared_a, m.SharedFactor("a", [&]() -> absl::StatusOr<Matrix2> {
    LK_ASSIGN_OR_RETURN(const Matrix2 a, m.GetMatrix(names.a, -1, -1));
    return RowsOf(a, 0, r);
  }));
  LK_ASSIGN_OR_RETURN(auto shared_b, m.SharedFactor("b", [&] { return m.GetMatrix(names.b, -1, -1); }));
  out->pairs.push_back({.shared_a = std::move(shared_a),
                        .shared_b = std::move(shared_b),
                        .rank_scale = std::move(d),
                        .delta_scale = std::move(b)});
  return absl::OkStatus();
}

}  // namespace

// VeRA (Kopiczko et al. 2023) and PVeRA: λ_b ∘ (B (λ_d ∘ (A x))), A and B shared by all linears.
absl::Status LowerVera(const ModuleTensors& m, Lowered* out) {
  const bool mean_only = m.Has("pvera_lambda_d");
  const std::string_view prefix = mean_only ? "pvera_" : "vera_";
  if (m.Flag("sample_at_inference", false)) {
    return absl::UnimplementedError("sample_at_inference draws at random for every token");
  }
  LK_RETURN_IF_ERROR(m.status());
  if (!m.HasShared(Join(prefix, "A"))) {
    return m.Invalid("the file has no projections (save_projection: false); save the adapter with "
                     "save_projection=True");
  }
  return AddSharedPair(
      m, {Join(prefix, "A"), Join(prefix, "B"), Join(prefix, "lambda_d"), Join(prefix, "lambda_b")}, 1, out);
}

// Tied-LoRA (Renduchintala et al. 2023): s · v ∘ (B (u ∘ (A x))), A and B trained and tied over all linears.
absl::Status LowerTiedLora(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto b_shape, m.ShapeOf("tied_lora_B", 2));
  LK_ASSIGN_OR_RETURN(const double scale, ScaleOfRank(m, b_shape[1]));
  return AddSharedPair(m, {"tied_lora_A", "tied_lora_B", "tied_lora_u", "tied_lora_v"}, scale, out);
}

namespace {

// The cores "NAME.cores.0", "NAME.cores.1", ... of a linear.
absl::StatusOr<Matrix2> Train(const ModuleTensors& m, const std::string& name, int64_t rows, int64_t columns) {
  std::vector<TrainCore> cores;
  const auto core = [&] { return absl::StrCat(name, ".cores.", cores.size()); };
  while (m.Has(core()) || cores.empty()) {
    LK_ASSIGN_OR_RETURN(auto shape, m.ShapeOf(core(), 3));
    LK_ASSIGN_OR_RETURN(auto values, m.Get(core(), shape));
    cores.push_back({std::move(shape), std::move(values)});
  }
  const absl::StatusOr<Matrix2> matrix = ContractTrain(cores, rows, columns);
  return matrix.ok() ? matrix : m.Invalid(absl::StrCat(name, ": ", matrix.status().message()));
}

}  // namespace

// LoRETTA (Yang et al. 2024), its low-rank form: s · x A B, both factors tensor trains.
absl::Status LowerLoretta(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const Matrix2 a, Train(m, "lora_A", m.in(), -1));
  LK_ASSIGN_OR_RETURN(const Matrix2 b, Train(m, "lora_B", a.columns, m.out()));
  LK_ASSIGN_OR_RETURN(const double scale, ScaleOfRank(m, a.columns));
  return AddPair(Transpose(a), Transpose(b), scale, out);
}

}  // namespace lorikeet
