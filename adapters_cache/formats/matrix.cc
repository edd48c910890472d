#include "adapters_cache/formats/matrix.h"

#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

// A matrix in double, by column.
class Columns {
 public:
  explicit Columns(const Matrix2& a) : rows_(a.rows), values_(a.columns) {
    for (int64_t c = 0; c < a.columns; ++c) {
      values_[c].resize(a.rows);
      for (int64_t r = 0; r < a.rows; ++r) values_[c][r] = a.at(r, c);
    }
  }
  int64_t rows() const { return rows_; }
  int64_t count() const { return static_cast<int64_t>(values_.size()); }
  std::vector<double>& operator[](int64_t c) { return values_[c]; }

 private:
  int64_t rows_;
  std::vector<std::vector<double>> values_;
};

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

void Rotate(double c, double s, std::vector<double>* p, std::vector<double>* q) {
  for (size_t i = 0; i < p->size(); ++i) {
    const double a = (*p)[i];
    (*p)[i] = c * a - s * (*q)[i];
    (*q)[i] = s * a + c * (*q)[i];
  }
}

// Makes the columns of `a` orthogonal, turning those of `v` alike.
void Orthogonalise(Columns* a, Columns* v) {
  constexpr int kMaxSweeps = 60;
  constexpr double kSmall = 1e-14;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool turned = false;
    for (int64_t p = 0; p + 1 < a->count(); ++p) {
      for (int64_t q = p + 1; q < a->count(); ++q) {
        const double pq = Dot((*a)[p], (*a)[q]);
        const double pp = Dot((*a)[p], (*a)[p]);
        const double qq = Dot((*a)[q], (*a)[q]);
        if (std::abs(pq) <= kSmall * std::sqrt(pp * qq)) continue;
        turned = true;
        const double zeta = (qq - pp) / (2 * pq);
        const double t = (zeta >= 0 ? 1 : -1) / (std::abs(zeta) + std::sqrt(1 + zeta * zeta));
        const double c = 1 / std::sqrt(1 + t * t);
        Rotate(c, c * t, &(*a)[p], &(*a)[q]);
        Rotate(c, c * t, &(*v)[p], &(*v)[q]);
      }
    }
    if (!turned) return;
  }
}

// out = factor · a · b + keep · out, b perhaps transposed: [columns, depth] then.
void Gemm(char transposed, float factor, const float* a, const float* b, ProductShape shape, float keep,
          float* out) {
  const auto [rows, depth, columns] = shape;
  if (rows == 0 || depth == 0 || columns == 0) return;
  omp_set_num_threads(1);  // of this thread alone: linears of a load have threads, not their products
  const dnnl_status_t status = dnnl_sgemm('N', transposed, rows, columns, depth, factor, a, depth, b,
                                          transposed == 'T' ? depth : columns, keep, out, columns);
  LK_CHECK_MSG(status == dnnl_success, "dnnl_sgemm");
}

}  // namespace

Matrix2 Multiply(const Matrix2& a, const Matrix2& b) {
  LK_CHECK(a.columns == b.rows);
  Matrix2 out(a.rows, b.columns);
  Gemm('N', 1, a.values.data(), b.values.data(), {a.rows, a.columns, b.columns}, 0, out.values.data());
  return out;
}

Matrix2 MultiplyTransposed(const Matrix2& a, const Matrix2& b) {
  LK_CHECK(a.columns == b.columns);
  Matrix2 out(a.rows, b.rows);
  Gemm('T', 1, a.values.data(), b.values.data(), {a.rows, a.columns, b.rows}, 0, out.values.data());
  return out;
}

void AddProduct(float factor, const float* a, const float* b, ProductShape shape, float* out) {
  Gemm('N', factor, a, b, shape, 1, out);
}

Matrix2 Transpose(const Matrix2& a) {
  Matrix2 out(a.columns, a.rows);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t c = 0; c < a.columns; ++c) out.at(c, r) = a.at(r, c);
  }
  return out;
}

Matrix2 Identity(int64_t n) {
  Matrix2 out(n, n);
  for (int64_t i = 0; i < n; ++i) out.at(i, i) = 1;
  return out;
}

void ScaleRows(const std::vector<float>& factors, Matrix2* a) {
  for (int64_t r = 0; r < a->rows; ++r) {
    for (int64_t c = 0; c < a->columns; ++c) a->at(r, c) *= factors[r];
  }
}

void ScaleColumns(const std::vector<float>& factors, Matrix2* a) {
  for (int64_t r = 0; r < a->rows; ++r) {
    for (int64_t c = 0; c < a->columns; ++c) a->at(r, c) *= factors[c];
  }
}

void Scale(double factor, Matrix2* a) {
  for (float& value : a->values) value = static_cast<float>(factor * value);
}

Matrix2 RowsOf(const Matrix2& a, int64_t begin, int64_t count) {
  const auto first = a.values.begin() + begin * a.columns;
  return {count, a.columns, std::vector<float>(first, first + count * a.columns)};
}

Matrix2 ColumnsOf(const Matrix2& a, int64_t begin, int64_t count) {
  Matrix2 out(a.rows, count);
  for (int64_t r = 0; r < a.rows; ++r) std::copy_n(a.row(r) + begin, count, out.row(r));
  return out;
}

absl::StatusOr<Matrix2> SolveRight(const Matrix2& b, const Matrix2& a) {
  LK_CHECK(a.rows == a.columns && b.columns == a.rows);
  const int64_t n = a.rows;
  // aᵀ xᵀ = bᵀ: rows of [aᵀ | bᵀ].
  std::vector<std::vector<double>> rows(n, std::vector<double>(n + b.rows));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < n; ++c) rows[r][c] = a.at(c, r);
    for (int64_t c = 0; c < b.rows; ++c) rows[r][n + c] = b.at(c, r);
  }
  for (int64_t k = 0; k < n; ++k) {
    const auto larger = [k](const auto& x, const auto& y) { return std::abs(x[k]) < std::abs(y[k]); };
    std::iter_swap(rows.begin() + k, std::max_element(rows.begin() + k, rows.end(), larger));
    if (rows[k][k] == 0) return absl::InvalidArgumentError("a matrix to invert is singular");
    for (int64_t r = 0; r < n; ++r) {
      const double factor = r == k ? 0 : rows[r][k] / rows[k][k];
      if (factor == 0) continue;
      for (int64_t c = k; c < n + b.rows; ++c) rows[r][c] -= factor * rows[k][c];
    }
  }
  Matrix2 x(b.rows, n);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < b.rows; ++c) {
      x.at(c, r) = static_cast<float>(rows[r][n + c] / rows[r][r]);
    }
  }
  return x;
}

Matrix2 HouseholderQ(const Matrix2& a) {
  const int64_t m = a.rows, n = a.columns, k = std::min(m, n);
  Columns r(a);
  std::vector<std::vector<double>> reflectors;  // v with v[0..j) = 0, applied as I - 2 v vᵀ
  const auto reflect = [m](const std::vector<double>& v, int64_t from, std::vector<double>* x) {
    double dot = 0;
    for (int64_t i = from; i < m; ++i) dot += v[i] * (*x)[i];
    for (int64_t i = from; i < m; ++i) (*x)[i] -= 2 * dot * v[i];
  };
  for (int64_t j = 0; j < k; ++j) {
    std::vector<double> v(r[j]);
    std::fill_n(v.begin(), j, 0.0);
    double below = 0;
    for (int64_t i = j + 1; i < m; ++i) below += v[i] * v[i];
    // LAPACK leaves a column that is zero below its diagonal as it is.
    if (below == 0) {
      reflectors.emplace_back(m, 0.0);
      continue;
    }
    v[j] += std::copysign(std::sqrt(Dot(v, v)), v[j]);
    const double norm = std::sqrt(Dot(v, v));
    for (double& x : v) x /= norm;
    for (int64_t c = j; c < n; ++c) reflect(v, j, &r[c]);
    reflectors.push_back(std::move(v));
  }
  Matrix2 q(m, k);
  for (int64_t c = 0; c < k; ++c) {
    std::vector<double> e(m, 0.0);
    e[c] = 1;
    for (int64_t j = k; j-- > 0;) reflect(reflectors[j], j, &e);
    for (int64_t i = 0; i < m; ++i) q.at(i, c) = static_cast<float>(e[i]);
  }
  return q;
}

absl::StatusOr<Svd> SingularValues(const Matrix2& a) {
  const int64_t k = std::min(a.rows, a.columns);
  if (k > kMaxSvdWidth) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a singular value decomposition of [", a.rows, ", ", a.columns, "] takes too long at load (at "
        "most ", kMaxSvdWidth, "); convert the adapter to plain LoRA"));
  }
  if (a.rows < a.columns) {
    LK_CHECK(k == a.rows);
    absl::StatusOr<Svd> turned = SingularValues(Transpose(a));
    std::swap(turned->u, turned->v);
    return turned;
  }
  Columns left(a);
  Columns right(Identity(k));
  Orthogonalise(&left, &right);
  std::vector<double> norms(k);
  for (int64_t c = 0; c < k; ++c) norms[c] = std::sqrt(Dot(left[c], left[c]));
  std::vector<int64_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return norms[x] > norms[y]; });
  Svd svd{Matrix2(a.rows, k), std::vector<float>(k), Matrix2(a.columns, k)};
  for (int64_t c = 0; c < k; ++c) {
    const int64_t from = order[c];
    svd.s[c] = static_cast<float>(norms[from]);
    for (int64_t r = 0; r < a.rows; ++r) {
      svd.u.at(r, c) = norms[from] > 0 ? static_cast<float>(left[from][r] / norms[from]) : 0;
    }
    for (int64_t r = 0; r < a.columns; ++r) svd.v.at(r, c) = static_cast<float>(right[from][r]);
  }
  return svd;
}

namespace {

// Of a's restriction to the span of q's orthonormal rows [block, n]: y = a qᵀ = u s (v of y)ᵀ.
absl::StatusOr<Svd> RestrictedValues(const Matrix2& y, const Matrix2& q) {
  const Matrix2 left = HouseholderQ(y);
  LK_ASSIGN_OR_RETURN(const Svd small, SingularValues(Multiply(Transpose(left), y)));
  return Svd{Multiply(left, small.u), small.s, Multiply(Transpose(q), small.v)};
}

// The largest |aᵀ u - s v| of the first `count`, over the largest s.
double Residual(const Matrix2& a, const Svd& svd, int64_t count) {
  const Matrix2 turned = Multiply(Transpose(ColumnsOf(svd.u, 0, count)), a);  // [count, n]
  double most = 0;
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    for (int64_t c = 0; c < a.columns; ++c) {
      const double off = turned.at(k, c) - double{svd.s[k]} * svd.v.at(c, k);
      sum += off * off;
    }
    most = std::max(most, std::sqrt(sum));
  }
  return svd.s[0] > 0 ? most / svd.s[0] : 0;
}

}  // namespace

// Subspace iteration: q ← qᵀ (aᵀ a), of more rows than are asked for, as fast as those behind the block are smaller.
absl::StatusOr<Svd> LargestSingularValues(const Matrix2& a, int64_t count) {
  constexpr int kPasses = 16, kMostPasses = 160;
  constexpr double kConverged = 1e-6;
  const int64_t k = std::min(a.rows, a.columns), block = 2 * count + 16;
  if (count > k) return absl::InvalidArgumentError(absl::StrCat("rank ", count, " of ", k, " singular values"));
  if (4 * block > k && k <= kMaxSvdWidth) return SingularValues(a);  // takes less time
  if (block > kMaxSvdWidth) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the ", count, " largest singular values of [", a.rows, ", ", a.columns, "] take too long at load (at most ",
        (kMaxSvdWidth - 16) / 2, " of them); convert the adapter to plain LoRA"));
  }
  Matrix2 q(block, a.columns);
  uint32_t random = 1;
  for (float& value : q.values) value = (random = random * 1664525 + 1013904223) >> 31 ? 1 : -1;
  double residual = 0;
  for (int pass = 1; pass <= kMostPasses; ++pass) {
    q = Transpose(HouseholderQ(Transpose(q)));
    const Matrix2 y = MultiplyTransposed(a, q);
    if (pass % kPasses == 0) {
      LK_ASSIGN_OR_RETURN(Svd svd, RestrictedValues(y, q));
      residual = Residual(a, svd, count);
      if (residual < kConverged) return svd;
    }
    q = Multiply(Transpose(y), a);
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "the ", count, " largest singular values of [", a.rows, ", ", a.columns, "] are so close to the next that ",
      kMostPasses, " iterations leave ", residual, " of the largest (at most ", kConverged,
      "); convert the adapter to plain LoRA"));
}

}  // namespace lorikeet
