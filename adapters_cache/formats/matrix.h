// Dense linear algebra for loads, in one thread. Products are in float32; what decides a basis is in double.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "adapters_cache/formats/lowered.h"

namespace lorikeet {

Matrix2 Multiply(const Matrix2& a, const Matrix2& b);            // a · b
Matrix2 MultiplyTransposed(const Matrix2& a, const Matrix2& b);  // a · bᵀ
Matrix2 Transpose(const Matrix2& a);
Matrix2 Identity(int64_t n);
// row r of a times factors[r]; column c of a times factors[c].
void ScaleRows(const std::vector<float>& factors, Matrix2* a);
void ScaleColumns(const std::vector<float>& factors, Matrix2* a);
void Scale(double factor, Matrix2* a);
// Rows [begin, begin + count), columns likewise.
Matrix2 RowsOf(const Matrix2& a, int64_t begin, int64_t count);
Matrix2 ColumnsOf(const Matrix2& a, int64_t begin, int64_t count);

// x with x · a = b (Gauss with pivots, in double). INVALID_ARGUMENT: a is singular.
absl::StatusOr<Matrix2> SolveRight(const Matrix2& b, const Matrix2& a);

// out [rows, columns] += factor · a [rows, depth] · b [depth, columns], all packed.
struct ProductShape {
  int64_t rows = 0, depth = 0, columns = 0;
};
void AddProduct(float factor, const float* a, const float* b, ProductShape shape, float* out);

// The first min(m, n) columns of Q of a's Householder QR, a [m, n], with LAPACK's signs.
Matrix2 HouseholderQ(const Matrix2& a);

// Singular values in descending order with their vectors. a: [m, n]; k = min(m, n), or as many as are asked for.
struct Svd {
  Matrix2 u;             // [m, k]
  std::vector<float> s;  // [k]
  Matrix2 v;             // [n, k]
};
// Wider than this a load would take minutes: such adapters are to be converted.
inline constexpr int64_t kMaxSvdWidth = 1024;
// All of them (one-sided Jacobi in double). INVALID_ARGUMENT: min(m, n) > kMaxSvdWidth.
absl::StatusOr<Svd> SingularValues(const Matrix2& a);
// The `count` largest with their vectors, to float32's accuracy, of a matrix of any width. INVALID_ARGUMENT: there
// are fewer, or those behind them are so close that they cannot be told apart in the time a load has.
absl::StatusOr<Svd> LargestSingularValues(const Matrix2& a, int64_t count);

}  // namespace lorikeet
