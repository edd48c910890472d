// Linear algebra of loads.
#include <cmath>
#include <random>

#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/formats/tensor_train.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;

Matrix2 Random(int64_t rows, int64_t columns, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Matrix2 out(rows, columns);
  for (float& value : out.values) value = normal(rng);
  return out;
}

// Of singular values that fall off as those of a model's weights do.
Matrix2 Decaying(int64_t rows, int64_t columns) {
  const int64_t k = std::min(rows, columns);
  Matrix2 left = HouseholderQ(Random(rows, k, 1));
  std::vector<float> values(k);
  for (int64_t i = 0; i < k; ++i) values[i] = std::pow(static_cast<float>(i + 1), -0.5f);
  ScaleColumns(values, &left);
  return MultiplyTransposed(left, HouseholderQ(Random(columns, k, 2)));
}

Matrix2 Product(const Svd& svd, int64_t count) {
  Matrix2 u = ColumnsOf(svd.u, 0, count);
  ScaleColumns({svd.s.begin(), svd.s.begin() + count}, &u);
  return MultiplyTransposed(u, ColumnsOf(svd.v, 0, count));
}

TEST(Matrix, TheLargestSingularValuesAreThoseOfAll) {
  constexpr int64_t kCount = 7;
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{300, 220}, {220, 300}}) {
    const Matrix2 a = Decaying(rows, columns);
    const auto all = SingularValues(a), some = LargestSingularValues(a, kCount);
    ASSERT_TRUE(all.ok() && some.ok()) << some.status();
    ASSERT_LT(static_cast<int64_t>(some->s.size()), columns);  // not all of them
    const Matrix2 expected = Product(*all, kCount), found = Product(*some, kCount);
    double error = 0, norm = 0;
    for (size_t i = 0; i < found.values.size(); ++i) {
      error += std::pow(found.values[i] - expected.values[i], 2);
      norm += std::pow(expected.values[i], 2);
    }
    EXPECT_LT(std::sqrt(error / norm), 1e-5) << rows << " x " << columns;
  }
}

TEST(Matrix, WhatTakesTooLongIsRefusedAtOnce) {
  const Matrix2 wide(1100, 1100);
  EXPECT_THAT(std::string(SingularValues(wide).status().message()), HasSubstr("at most 1024"));
  EXPECT_THAT(std::string(LargestSingularValues(wide, 505).status().message()), HasSubstr("at most 504 of them"));
  EXPECT_THAT(std::string(LargestSingularValues(wide, 1101).status().message()),
              HasSubstr("rank 1101 of 1100 singular values"));
}

// value[i, j, k] = Σ first[i, a] · second[a, j, b] · third[b, k], i the most significant.
TEST(Matrix, ATrainIsTheProductOfItsCores) {
  const Matrix2 first = Random(3, 2, 1), second = Random(2, 4 * 3, 2), third = Random(3, 5, 3);
  const auto product = ContractTrain({{{1, 3, 2}, first.values}, {{2, 4, 3}, second.values}, {{3, 5, 1}, third.values}}, 12, -1);
  ASSERT_TRUE(product.ok()) << product.status();
  ASSERT_EQ(product->columns, 5);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int k = 0; k < 5; ++k) {
        double sum = 0;
        for (int a = 0; a < 2; ++a) {
          for (int b = 0; b < 3; ++b) sum += double{first.at(i, a)} * second.at(a, j * 3 + b) * third.at(b, k);
        }
        EXPECT_NEAR(product->at(i * 4 + j, k), sum, 1e-5);
      }
    }
  }
}

// However its sizes multiply up.
TEST(Matrix, ATrainOfTooManyValuesIsRefused) {
  const TrainCore large{{1, int64_t{1} << 20, 1}, {}};
  EXPECT_THAT(std::string(ContractTrain({large, large, large, large}, -1, 1).status().message()),
              HasSubstr("the cores up to 1 make more than 268435456 values"));
  EXPECT_THAT(std::string(ContractTrain({{{1, 2, INT64_MAX}, {}}}, -1, 1).status().message()), HasSubstr("the last ends in 1"));
  EXPECT_THAT(std::string(ContractTrain({{{1, 2, int64_t{1} << 40}, {}}, {{int64_t{1} << 40, 1, 1}, {}}}, -1, 1).status().message()),
              HasSubstr("the cores up to 0 make more than"));
  EXPECT_FALSE(ContractTrain({}, 1, 1).ok());
}

}  // namespace
}  // namespace lorikeet
