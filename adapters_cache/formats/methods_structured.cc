// Methods of vectors, rotations and structured products.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/methods.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

// Q − Qᵀ of an upper triangle in row-major order.
Matrix2 Skew(const float* upper, int64_t b) {
  Matrix2 q(b, b);
  for (int64_t i = 0, at = 0; i < b; ++i) {
    for (int64_t j = i + 1; j < b; ++j, ++at) {
      q.at(i, j) = upper[at];
      q.at(j, i) = -upper[at];
    }
  }
  return q;
}

// (I − Q)(I + Q)⁻¹ (Cayley).
absl::StatusOr<Matrix2> Cayley(const Matrix2& q) {
  Matrix2 minus = Identity(q.rows), plus = Identity(q.rows);
  for (size_t i = 0; i < q.values.size(); ++i) {
    minus.values[i] -= q.values[i];
    plus.values[i] += q.values[i];
  }
  return SolveRight(minus, plus);
}

// I + 2Q + … + 2Q^{t−2} + Q^{t−1}, the first terms of (I + Q)(I − Q)⁻¹; two terms are I + 2Q, and three are
// PEFT's four.
Matrix2 CayleyNeumann(const Matrix2& q, int64_t terms) {
  Matrix2 r = Identity(q.rows);
  if (terms <= 1) return r;
  const auto add = [&r](const Matrix2& power, double factor) {
    for (size_t i = 0; i < r.values.size(); ++i) {
      r.values[i] += static_cast<float>(factor * power.values[i]);
    }
  };
  add(q, 2);
  if (terms == 2) return r;
  Matrix2 power = q;
  for (int64_t k = 2; k + 1 < std::max<int64_t>(terms, 4); ++k) {
    power = Multiply(power, q);
    add(power, 2);
  }
  add(Multiply(power, q), 1);
  return r;
}

// The rotations of one factor's blocks [n, b, b], their Cayley parameters given.
absl::StatusOr<std::vector<Matrix2>> BoftRotations(const float* values, int64_t n, int64_t b) {
  std::vector<Matrix2> rotations;
  for (int64_t k = 0; k < n; ++k) {
    const float* r = values + k * b * b;
    Matrix2 q(b, b);
    for (int64_t i = 0; i < b; ++i) {
      for (int64_t j = 0; j < b; ++j) q.at(i, j) = 0.5f * (r[i * b + j] - r[j * b + i]);
    }
    LK_ASSIGN_OR_RETURN(rotations.emplace_back(), Cayley(q));
  }
  return rotations;
}

// P · blockdiag(rotations) · Pᵀ in one span of inputs: P brings the half-blocks of every group
// together, those of even number first.
Matrix2 ButterflyFactor(const Matrix2* rotations, int64_t span, int64_t group) {
  const int64_t b = rotations->rows, half = b / 2;
  const auto source = [&](int64_t i) {
    const int64_t place = i % group / half, halves = group / half;
    const int64_t from = place < halves / 2 ? 2 * place : 2 * (place - halves / 2) + 1;
    return i / group * group + from * half + i % half;
  };
  Matrix2 factor(span, span);
  for (int64_t i = 0; i < span; ++i) {
    for (int64_t j = 0; j < span; ++j) {
      const int64_t p = source(i), q = source(j);
      if (p / b == q / b) factor.at(i, j) = rotations[p / b].at(p % b, q % b);
    }
  }
  return factor;
}

}  // namespace

// BEFT: a bias.
absl::Status LowerBeft(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(out->bias, m.Get("beft_bias", {1, m.out()}));
  return absl::OkStatus();
}

// BOFT (Liu et al. 2024): m butterfly factors, factor l within groups of 2^l blocks, so that their
// product F_(m-1)···F_0 is block-diagonal with spans of 2^(m-1) blocks.
absl::Status LowerBoft(const ModuleTensors& m, Lowered* out) {
  constexpr int64_t kMaxSpan = 512;
  LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf("boft_R", 4));
  const int64_t factors = shape[0], n = shape[1], b = shape[2];
  if (n * b != m.in()) return m.Invalid(absl::StrCat("boft_R covers ", n * b, " inputs"));
  const int64_t blocks = factors >= 1 && factors <= 10 ? int64_t{1} << (factors - 1) : 0;
  if (blocks == 0 || n % blocks || (factors > 1 && (b % 2 || b * blocks > kMaxSpan))) {
    return m.Invalid(absl::StrCat("BOFT with ", factors, " factors of ", n, " blocks of ", b,
                                  " is not served: blocks are even, and 2^(factors - 1) of them "
                                  "divide the inputs and span at most ", kMaxSpan));
  }
  LK_ASSIGN_OR_RETURN(const auto values, m.Get("boft_R", {factors, n, b, b}));
  LK_ASSIGN_OR_RETURN(out->out_scale, m.Get("boft_s", {m.out(), 1}));
  const int64_t span = b * blocks;
  for (int64_t first = 0; first < n; first += blocks) {
    Matrix2 product = Identity(span);
    for (int64_t l = 0; l < factors; ++l) {
      LK_ASSIGN_OR_RETURN(const auto rotations,
                          BoftRotations(&values[(l * n + first) * b * b], blocks, b));
      product = factors == 1 ? rotations[0]
                             : Multiply(ButterflyFactor(rotations.data(), span, b << l), product);
    }
    out->rotation.insert(out->rotation.end(), product.values.begin(), product.values.end());
  }
  out->rotation_block = static_cast<int32_t>(span);
  return absl::OkStatus();
}

// C³A (Chen et al. 2024): block-circulant, divided by the whole input width.
absl::Status LowerC3a(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf("c3a_kernel", 3));
  const int64_t b = shape[2];
  if (m.in() % b || m.out() % b) return m.Invalid(absl::StrCat("block ", b, " divides no width"));
  LK_ASSIGN_OR_RETURN(out->circulant, m.Get("c3a_kernel", {m.out() / b, m.in() / b, b}));
  for (float& value : out->circulant) value /= static_cast<float>(m.in());
  out->circulant_block = static_cast<int32_t>(b);
  return absl::OkStatus();
}

// (IA)³ (Liu et al. 2022): a scale of the inputs [1, in] or of the outputs [out, 1], bias included.
absl::Status LowerIa3(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf("ia3_l", 2));
  if (shape == std::vector<int64_t>{1, m.in()} && shape[1] != 1) {
    LK_ASSIGN_OR_RETURN(out->rotation, m.Get("ia3_l", {1, m.in()}));
    out->rotation_block = 1;
    return absl::OkStatus();
  }
  LK_ASSIGN_OR_RETURN(out->output_scale, m.Get("ia3_l", {m.out(), 1}));
  return absl::OkStatus();
}

// LoKr (Yeh et al. 2023): w1 ⊗ w2, each whole or a product.
absl::Status LowerLokr(const ModuleTensors& m, Lowered* out) {
  const auto factor = [&](const std::string& name) -> absl::StatusOr<Matrix2> {
    if (m.Has(name)) return m.GetMatrix(name, -1, -1);
    LK_ASSIGN_OR_RETURN(const Matrix2 a, m.GetMatrix(name + "_a", -1, -1));
    LK_ASSIGN_OR_RETURN(const Matrix2 b, m.GetMatrix(name + "_b", a.columns, -1));
    return Multiply(a, b);
  };
  LK_ASSIGN_OR_RETURN(out->kronecker1, factor("lokr_w1"));
  LK_ASSIGN_OR_RETURN(out->kronecker2, factor("lokr_w2"));
  const Matrix2& w1 = out->kronecker1;
  const Matrix2& w2 = out->kronecker2;
  if (w1.rows * w2.rows != m.out() || w1.columns * w2.columns != m.in()) {
    return m.Invalid(absl::StrCat("lokr_w1 [", w1.rows, ", ", w1.columns, "] ⊗ lokr_w2 [", w2.rows,
                                  ", ", w2.columns, "] is not [", m.out(), ", ", m.in(), "]"));
  }
  const double rank = m.Patterned("rank_pattern", "r", 8);
  const double alpha = m.Patterned("alpha_pattern", "alpha", 8);
  LK_RETURN_IF_ERROR(m.status());
  if (rank <= 0) return m.Invalid(absl::StrCat("r is ", rank, "; it must be above 0"));
  Scale(alpha / rank, &out->kronecker1);
  return absl::OkStatus();
}

// OFT (Qiu et al. 2023): rotations of blocks of inputs.
absl::Status LowerOft(const ModuleTensors& m, Lowered* out) {
  if (m.Has("oft_r")) {
    return absl::UnimplementedError("oft_r is the layout of PEFT before 0.14; train or convert anew");
  }
  const char* name = m.Has("oft_embedding_R.weight") ? "oft_embedding_R.weight" : "oft_R.weight";
  LK_ASSIGN_OR_RETURN(const auto shape, m.ShapeOf(name, 2));
  const int64_t stored = shape[0];
  const double b_exact = (1 + std::sqrt(1 + 8.0 * static_cast<double>(shape[1]))) / 2;
  const int64_t b = std::llround(b_exact);
  if (b * (b - 1) / 2 != shape[1] || m.in() % b || (stored != 1 && stored * b != m.in())) {
    return m.Invalid(absl::StrCat(name, " [", stored, ", ", shape[1],
                                  "] does not divide the ", m.in(), " inputs into blocks"));
  }
  LK_ASSIGN_OR_RETURN(const auto upper, m.Get(name, shape));
  const bool neumann = m.Flag("use_cayley_neumann", true);
  const double terms = m.Number("num_cayley_neumann_terms", 5);
  const bool bounded = m.Flag("coft", false);
  const double eps = m.Number("eps", 6e-5);
  LK_RETURN_IF_ERROR(m.status());
  if (!(terms >= 1 && terms <= 100)) return m.Invalid("num_cayley_neumann_terms is out of range");
  for (int64_t k = 0; k < m.in() / b; ++k) {
    Matrix2 q = Skew(&upper[(stored == 1 ? 0 : k) * shape[1]], b);
    double norm = 0;
    for (const float value : q.values) norm += double{value} * value;
    const double most = eps / std::sqrt(static_cast<double>(stored));
    if (bounded && std::sqrt(norm) > most) Scale(most / std::sqrt(norm), &q);
    Matrix2 r;
    if (neumann) {
      r = CayleyNeumann(q, static_cast<int64_t>(terms));
    } else {
      LK_ASSIGN_OR_RETURN(r, Cayley(q));
    }
    out->rotation.insert(out->rotation.end(), r.values.begin(), r.values.end());
  }
  out->rotation_block = static_cast<int32_t>(b);
  return absl::OkStatus();
}

// RoAd (Liao et al. 2024): 2×2 rotations of pairs of outputs, bias included.
absl::Status LowerRoad(const ModuleTensors& m, Lowered* out) {
  const std::string variant = m.Text("variant", "road_1");
  const double group = m.Number("group_size", 64);
  LK_RETURN_IF_ERROR(m.status());
  const int64_t g = static_cast<int64_t>(group);
  if (g < 2 || g > m.out() || g % 2 || m.out() % g) {
    return m.Invalid(absl::StrCat("group_size ", group, " does not divide ", m.out(), " outputs"));
  }
  const int64_t stored = variant == "road_1" ? m.out() / 2 : variant == "road_2" ? m.out() : 2 * m.out();
  LK_ASSIGN_OR_RETURN(const auto theta, m.Get("road_theta", {stored}));
  LK_ASSIGN_OR_RETURN(const auto alpha, m.Get("road_alpha", {stored}));
  for (int64_t o = 0; o < m.out(); ++o) {
    int64_t first = o, second = o;
    if (variant == "road_1") {
      first = second = o / g * (g / 2) + o % (g / 2);
    } else if (variant == "road_4") {
      first = o / g * 2 * g + o % g;
      second = first + g;
    } else if (variant != "road_2") {
      return absl::UnimplementedError("variant '" + variant + "' of RoAd is unknown");
    }
    out->output_scale.push_back(alpha[first] * std::cos(theta[first]));
    out->output_cross.push_back(alpha[second] * std::sin(theta[second]));
  }
  out->output_half = static_cast<int32_t>(g / 2);
  return absl::OkStatus();
}

}  // namespace lorikeet
