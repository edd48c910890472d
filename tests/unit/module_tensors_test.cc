// Products with a weight that is read in panels.
#include "adapters_cache/formats/module_tensors.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

namespace lorikeet {
namespace {

// One linear of [out, in], W[o, i] a small whole number, so that every sum is exact in float.
class WideBase final : public BaseModel {
 public:
  static constexpr int32_t kIn = 701, kOut = 2003;  // two panels and a part of one

  static float At(int64_t o, int64_t i) { return static_cast<float>((o * 31 + i * 17) % 7 - 3); }

  int layers() const override { return 1; }
  int32_t vocab_size() const override { return 1; }
  LinearShape shape(ModuleId) const override { return {kIn, kOut}; }
  void ReadRows(ModuleId, int32_t first, int32_t rows, float* out) const override {
    for (int32_t o = first; o < first + rows; ++o) {
      for (int32_t i = 0; i < kIn; ++i) *out++ = At(o, i);
    }
  }
};

class ModuleTensorsTest : public ::testing::Test {
 protected:
  // Whole numbers as well.
  static Matrix2 Small(int64_t rows, int64_t columns) {
    Matrix2 matrix(rows, columns);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) matrix.at(r, c) = static_cast<float>((r * 7 + c * 3) % 5 - 1);
    }
    return matrix;
  }

  const WideBase base_;
  const ModuleTensors::Tensors none_;
  const nlohmann::ordered_json config_;
  UsedTensors used_;
  ModuleTensors::SharedFactors shared_;
  const ModuleTensors tensors_{base_, 0, {0, 1}, none_, none_, config_, &used_, &shared_};
};

TEST_F(ModuleTensorsTest, ProductsInPanelsAreThoseWithTheWholeWeight) {
  const Matrix2 w = tensors_.Weight();
  const Matrix2 left = Small(3, WideBase::kOut), right = Small(WideBase::kIn, 4);
  EXPECT_NE(Multiply(w, right).at(0, 0), Multiply(w, right).at(1, 0));
  EXPECT_EQ(tensors_.TimesWeight(left).values, Multiply(left, w).values);
  EXPECT_EQ(tensors_.WeightTimes(right).values, Multiply(w, right).values);
  EXPECT_EQ(tensors_.WeightColumns(5).values, ColumnsOf(w, 0, 5).values);
}

}  // namespace
}  // namespace lorikeet
