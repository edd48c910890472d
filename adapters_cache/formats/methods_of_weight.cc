// Methods whose delta depends on the base's weight: folded once, at load.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/methods.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

Matrix2 Add(Matrix2 a, const Matrix2& b, double factor) {
  for (size_t i = 0; i < a.values.size(); ++i) {
    a.values[i] = static_cast<float>(a.values[i] + factor * b.values[i]);
  }
  return a;
}

float Gelu(float z) { return 0.5f * z * (1 + std::erf(z * 0.70710678f)); }

absl::StatusOr<float (*)(float)> ActivationOf(const ModuleTensors& m) {
  const std::string name = m.Text("act_fn", "relu");
  LK_RETURN_IF_ERROR(m.status());
  if (name == "relu") return +[](float z) { return std::max(z, 0.0f); };
  if (name == "silu" || name == "swish") return +[](float z) { return z / (1 + std::exp(-z)); };
  if (name == "gelu") return &Gelu;
  if (name == "tanh") return +[](float z) { return std::tanh(z); };
  if (name == "sigmoid") return +[](float z) { return 1 / (1 + std::exp(-z)); };
  if (name == "identity" || name == "linear") return +[](float z) { return z; };
  return absl::UnimplementedError("act_fn '" + name + "' is unknown");
}

}  // namespace

// DEFT: ΔW = Q (s·R − Nᵀ W).
absl::Status LowerDeft(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const Matrix2 p, m.GetMatrix("deft_P", m.out(), -1));
  const int64_t r = p.columns;
  const std::string method = m.Text("decomposition_method", "qr");
  const bool para = m.Flag("para", false);
  const double alpha = m.Patterned("alpha_pattern", "alpha", static_cast<double>(r));
  LK_RETURN_IF_ERROR(m.status());
  Matrix2 q = p, n = p;
  if (method == "relu") {
    for (float& value : n.values) value = std::max(value, 0.0f);
  } else if (method == "qr") {
    q = n = HouseholderQ(p);
  } else {
    return absl::UnimplementedError("decomposition_method '" + method + "' is unknown");
  }
  Matrix2 a = m.TimesWeight(Transpose(n));
  Scale(-1, &a);
  if (!para) {
    LK_ASSIGN_OR_RETURN(const Matrix2 residual, m.GetMatrix("deft_R", r, m.in()));
    const bool scaled = m.config().contains("alpha") && !m.config()["alpha"].is_null();
    a = Add(std::move(a), residual, scaled ? alpha / static_cast<double>(r) : 1.0);
  }
  out->pairs.push_back({std::move(a), std::move(q)});
  return absl::OkStatus();
}

// FRoD: W' = U (S + diag(λ)) Vᵀ, U from W's own decomposition along shared directions V.
absl::Status LowerFrod(const ModuleTensors& m, Lowered* out) {
  const std::string& path = m.path();
  const size_t last = path.rfind('.');
  const size_t before = last == std::string::npos ? last : path.rfind('.', last - 1);
  std::string category = before == std::string::npos ? path : path.substr(before + 1);
  std::replace(category.begin(), category.end(), '.', '_');
  LK_ASSIGN_OR_RETURN(const Matrix2 v, m.GetMatrix("frod_V." + category, m.in(), m.in()));
  LK_ASSIGN_OR_RETURN(const auto lambda, m.Get("frod_lambda_l", {m.in()}));
  LK_ASSIGN_OR_RETURN(const auto values, m.Get("frod_lambda_s_values", {-1}));
  const int64_t n = static_cast<int64_t>(values.size());
  LK_ASSIGN_OR_RETURN(const auto places, m.GetIndices("frod_s_indices." + category, {2, n}));
  if (m.HasShared("frod_s_size." + category)) {
    LK_RETURN_IF_ERROR(m.GetIndices("frod_s_size." + category, {2}).status());
  }
  const Matrix2 w = m.Weight();
  LK_ASSIGN_OR_RETURN(Matrix2 u, SolveRight(w, Transpose(v)));
  for (int64_t c = 0; c < u.columns; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < u.rows; ++r) sum += double{u.at(r, c)} * u.at(r, c);
    const double norm = std::max(std::sqrt(sum), 1e-12);
    for (int64_t r = 0; r < u.rows; ++r) u.at(r, c) = static_cast<float>(u.at(r, c) / norm);
  }
  Matrix2 middle(m.in(), m.in());
  for (int64_t i = 0; i < m.in(); ++i) middle.at(i, i) = lambda[i];
  for (int64_t e = 0; e < n; ++e) {
    const int64_t row = places[e], column = places[n + e];
    if (row < 0 || row >= m.in() || column < 0 || column >= m.in()) {
      return m.Invalid(absl::StrCat("frod_s_indices holds [", row, ", ", column, "]"));
    }
    middle.at(row, column) += values[e];
  }
  out->dense = Add(Multiply(Multiply(u, middle), Transpose(v)), w, -1);
  return absl::OkStatus();
}

namespace {

// A part of GLoRA: Xd·Xu, X, or nothing; [rows, columns] or broadcast from [rows, 1] or [1].
// `key`: the setting that says which.
absl::StatusOr<Matrix2> GloraPart(const ModuleTensors& m, const std::string& name, const char* key) {
  const std::string path = "glora_" + name;
  if (m.Has(path + ".Xd")) {
    LK_ASSIGN_OR_RETURN(const Matrix2 down, m.GetMatrix(path + ".Xd", -1, -1));
    LK_ASSIGN_OR_RETURN(const Matrix2 up, m.GetMatrix(path + ".Xu", down.columns, -1));
    return Multiply(down, up);
  }
  if (!m.Has(path + ".X")) {
    const std::string wanted = absl::AsciiStrToLower(m.Text(key, "none"));
    LK_RETURN_IF_ERROR(m.status());
    if (wanted != "none") return m.Invalid(absl::StrCat(key, " asks for ", path, ", which the file does not have"));
    m.Ignore(path + ".zeros");
    return Matrix2();
  }
  LK_ASSIGN_OR_RETURN(const auto values,
                      m.Get(path + ".X", std::vector<int64_t>(m.Dimensions(path + ".X"), -1)));
  return Matrix2(static_cast<int64_t>(values.size()), 1, values);
}

// Entry [o, i] of a part that may be broadcast.
float At(const Matrix2& part, int64_t o, int64_t i) {
  if (part.values.empty()) return 0;
  return part.at(part.rows == 1 ? 0 : o, part.columns == 1 ? 0 : i);
}

absl::Status GloraBias(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const Matrix2 c, GloraPart(m, "C", "config_C"));
  LK_ASSIGN_OR_RETURN(const Matrix2 d, GloraPart(m, "D", "config_D_E"));
  LK_ASSIGN_OR_RETURN(const Matrix2 e, GloraPart(m, "E", "config_D_E"));
  const std::vector<float> bias = m.Bias();
  if (bias.empty()) return absl::OkStatus();
  const auto fits = [](const Matrix2& part, int64_t rows) {
    return part.values.empty() || (part.columns == 1 && (part.rows == 1 || part.rows == rows));
  };
  if (!fits(c, m.in()) || !fits(d, m.out()) || !fits(e, m.out())) {
    return m.Invalid("glora_C, glora_D or glora_E does not fit the linear");
  }
  const Matrix2 w = m.Weight();
  out->bias.resize(m.out());
  for (int64_t o = 0; o < m.out(); ++o) {
    double sum = double{bias[o]} * At(d, o, 0) + At(e, o, 0);
    for (int64_t i = 0; i < m.in(); ++i) sum += double{w.at(o, i)} * At(c, i, 0);
    out->bias[o] = static_cast<float>(sum);
  }
  return absl::OkStatus();
}

}  // namespace

// GLoRA (Chavan et al. 2023): W + W∘A + B, b + b∘D + E + W·C.
absl::Status LowerGlora(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const Matrix2 a, GloraPart(m, "A", "config_A_B"));
  LK_ASSIGN_OR_RETURN(const Matrix2 b, GloraPart(m, "B", "config_A_B"));
  LK_RETURN_IF_ERROR(GloraBias(m, out));
  const auto fits = [&](const Matrix2& part) {
    return part.values.empty() || ((part.rows == 1 || part.rows == m.out()) &&
                                   (part.columns == 1 || part.columns == m.in()));
  };
  if (!fits(a) || !fits(b)) return m.Invalid("glora_A or glora_B does not fit the linear");
  bool by_row = a.columns <= 1 && b.columns <= 1;
  for (int64_t o = 0; by_row && o < m.out(); ++o) by_row = 1 + At(a, o, 0) != 0;
  if (!by_row) {
    const Matrix2 w = m.Weight();
    out->dense = Matrix2(m.out(), m.in());
    for (int64_t o = 0; o < m.out(); ++o) {
      for (int64_t i = 0; i < m.in(); ++i) {
        out->dense.at(o, i) = w.at(o, i) * At(a, o, i) + At(b, o, i);
      }
    }
    return absl::OkStatus();
  }
  // A scale of each output, and B's sum of the inputs as a pair that the scale multiplies too.
  for (int64_t o = 0; o < m.out(); ++o) out->out_scale.push_back(1 + At(a, o, 0));
  if (b.values.empty()) return absl::OkStatus();
  Matrix2 ones(1, m.in()), column(m.out(), 1);
  std::fill(ones.values.begin(), ones.values.end(), 1.0f);
  for (int64_t o = 0; o < m.out(); ++o) column.at(o, 0) = At(b, o, 0) / out->out_scale[o];
  out->pairs.push_back({std::move(ones), std::move(column)});
  return absl::OkStatus();
}

// HiRA (Huang et al. 2025): ΔW = W ∘ (B·A).
absl::Status LowerHira(const ModuleTensors& m, Lowered* out) {
  Matrix2 a, b;
  if (m.Has("hira_embedding_A")) {
    LK_ASSIGN_OR_RETURN(b, m.GetMatrix("hira_embedding_A", -1, m.out()));
    LK_ASSIGN_OR_RETURN(a, m.GetMatrix("hira_embedding_B", m.in(), b.rows));
    a = Transpose(a);
    b = Transpose(b);
  } else {
    LK_ASSIGN_OR_RETURN(a, m.GetMatrix("hira_A", -1, m.in()));
    LK_ASSIGN_OR_RETURN(b, m.GetMatrix("hira_B", m.out(), a.rows));
  }
  const Matrix2 w = m.Weight();
  out->dense = Multiply(b, a);
  for (size_t i = 0; i < w.values.size(); ++i) out->dense.values[i] *= w.values[i];
  return absl::OkStatus();
}

// HRA (Yuan et al. 2024): W times r Householder reflections, I − U T Uᵀ in compact form.
absl::Status LowerHra(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const Matrix2 columns, m.GetMatrix("hra_u", m.in(), -1));
  const bool gram_schmidt = m.Flag("apply_GS", false);
  LK_RETURN_IF_ERROR(m.status());
  Matrix2 u = Transpose(columns);  // [r, in]
  const int64_t r = u.rows, n = u.columns;
  const auto dot = [&](int64_t x, int64_t y) {
    return std::inner_product(u.row(x), u.row(x) + n, u.row(y), 0.0,
                              std::plus<>(), [](float p, float q) { return double{p} * q; });
  };
  for (int64_t k = 0; k < r; ++k) {
    for (int64_t j = 0; gram_schmidt && j < k; ++j) {
      const double along = dot(j, k);
      for (int64_t i = 0; i < n; ++i) u.at(k, i) -= static_cast<float>(along * u.at(j, i));
    }
    const double norm = std::sqrt(dot(k, k));
    if (norm == 0) return m.Invalid(absl::StrCat("column ", k, " of hra_u is zero"));
    for (int64_t i = 0; i < n; ++i) u.at(k, i) = static_cast<float>(u.at(k, i) / norm);
  }
  Matrix2 t(r, r);
  std::vector<double> with(r);  // the columns before the k-th
  for (int64_t k = 0; k < r; ++k) {
    t.at(k, k) = 2;
    if (gram_schmidt) continue;
    for (int64_t l = 0; l < k; ++l) with[l] = dot(l, k);
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (int64_t l = j; l < k; ++l) sum += t.at(j, l) * with[l];
      t.at(j, k) = static_cast<float>(-2 * sum);
    }
  }
  Matrix2 b = Multiply(m.WeightTimes(Transpose(u)), t);
  Scale(-1, &b);
  out->pairs.push_back({std::move(u), std::move(b)});
  return absl::OkStatus();
}

// OSF (Nayak et al. 2025): the trailing singular components of W are trained anew.
absl::Status LowerOsf(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto s, m.Get("osf_svd_params.S_low", {-1}));
  const int64_t k = static_cast<int64_t>(s.size());
  LK_ASSIGN_OR_RETURN(Matrix2 u, m.GetMatrix("osf_svd_params.U_low", m.out(), k));
  LK_ASSIGN_OR_RETURN(const Matrix2 v, m.GetMatrix("osf_svd_params.V_low", k, m.in()));
  LK_ASSIGN_OR_RETURN(Svd svd, SingularValues(m.Weight()));
  const int64_t all = static_cast<int64_t>(svd.s.size());
  if (k > all) return m.Invalid(absl::StrCat("S_low has ", k, " of ", all, " components"));
  ScaleColumns(s, &u);
  Matrix2 tail = ColumnsOf(svd.u, all - k, k);
  ScaleColumns({svd.s.end() - k, svd.s.end()}, &tail);
  Scale(-1, &tail);
  if (2 * k > Limits::kMaxAdapterRank || 2 * k * (m.in() + m.out()) > int64_t{m.in()} * m.out()) {
    out->dense = Add(Multiply(u, v), Multiply(tail, Transpose(ColumnsOf(svd.v, all - k, k))), 1);
    out->dense_is_choice = 2 * k <= Limits::kMaxAdapterRank;
  }
  out->pairs.push_back({v, std::move(u)});
  out->pairs.push_back({Transpose(ColumnsOf(svd.v, all - k, k)), std::move(tail)});
  return absl::OkStatus();
}

// PEANuT (Zhong et al. 2025): a small network of W gives A.
absl::Status LowerPeanut(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const Matrix2 a, m.GetMatrix("peanut_A.weight", -1, m.out()));
  LK_ASSIGN_OR_RETURN(Matrix2 b, m.GetMatrix("peanut_B.weight", m.out(), a.rows));
  LK_ASSIGN_OR_RETURN(const auto activate, ActivationOf(m));
  const double scaling = m.Number("scaling", 1);
  LK_RETURN_IF_ERROR(m.status());
  const auto layer = [&](const Matrix2& x, const Matrix2& w) {
    Matrix2 h = MultiplyTransposed(x, w);
    for (float& value : h.values) value = activate(value);
    return h;
  };
  Matrix2 h = layer(Transpose(m.Weight()), a);  // [in, r]
  std::vector<Matrix2> kept;
  for (int n = 0; m.Has(absl::StrCat("peanut_encoders.", n, ".weight")); ++n) {
    LK_ASSIGN_OR_RETURN(const Matrix2 w, m.GetMatrix(absl::StrCat("peanut_encoders.", n, ".weight"),
                                                     a.rows, a.rows));
    kept.push_back(h);
    h = layer(h, w);
  }
  for (int n = 0; m.Has(absl::StrCat("peanut_decoders.", n, ".weight")); ++n) {
    LK_ASSIGN_OR_RETURN(const Matrix2 w, m.GetMatrix(absl::StrCat("peanut_decoders.", n, ".weight"),
                                                     a.rows, a.rows));
    if (kept.empty()) return m.Invalid("more peanut_decoders than peanut_encoders");
    h = Add(layer(h, w), kept.back(), 1);
    kept.pop_back();
  }
  Scale(scaling, &b);
  out->pairs.push_back({Transpose(h), std::move(b)});
  return absl::OkStatus();
}

}  // namespace lorikeet
