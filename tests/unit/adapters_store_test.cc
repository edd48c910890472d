// Factors go to memory value by value, rows or columns, whatever their shape and type.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "adapters_cache/store_factors.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;

constexpr std::byte kUntouched{0xa5};

float Stored(const std::vector<std::byte>& bytes, DType dtype, int64_t index) {
  float value;
  Dequantize(dtype, bytes.data() + ByteSize(dtype, index), 1, &value);
  return value;
}

void ExpectStored(DType from, DType to, int64_t rows, int64_t columns, bool transposed, std::mt19937& rng) {
  std::vector<std::byte> bytes(1 + ByteSize(from, rows * columns));  // not aligned, as in files
  std::vector<float> values(rows * columns);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float value = normal(rng);
    const uint16_t bits = from == DType::kF16 ? FloatToF16(value) : FloatToBF16(value);
    std::byte* at = bytes.data() + 1 + ByteSize(from, i);
    if (from == DType::kF32) std::memcpy(at, &value, sizeof(value));
    else std::memcpy(at, &bits, sizeof(bits));
    Dequantize(from, at, 1, &values[i]);
    if (to == DType::kBF16) values[i] = BF16ToFloat(FloatToBF16(values[i]));
  }
  const RawTensor tensor{"t", {from, {rows, columns}, std::span(bytes).subspan(1)}};
  const int64_t width = transposed ? rows : columns, count = transposed ? columns : rows;
  const int64_t stride = width + 1 + rng() % 8;
  std::vector<std::byte> out(ByteSize(to, count * stride), kUntouched);
  const absl::Status status = transposed ? StoreColumns(tensor, to, stride, out.data())
                                         : StoreRows(tensor, to, stride, out.data());
  ASSERT_TRUE(status.ok()) << status;
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t r = transposed ? i : k, c = transposed ? k : i;
      ASSERT_EQ(Stored(out, to, k * stride + i), values[r * columns + c])
          << Info(from).name << " to " << Info(to).name << " [" << rows << ", " << columns << "] at " << r
          << ", " << c;
    }
    for (int64_t b = ByteSize(to, k * stride + width); b < ByteSize(to, (k + 1) * stride); ++b) {
      ASSERT_EQ(out[b], kUntouched);
    }
  }
}

TEST(StoreFactors, EveryValueIsWhereItBelongs) {
  std::mt19937 rng(1);
  for (const DType from : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const DType to : {from, DType::kF32, DType::kBF16}) {
      for (int i = 0; i < 40; ++i) {
        ExpectStored(from, to, 1 + rng() % 200, 1 + rng() % 40, i % 2 == 0, rng);
      }
    }
  }
}

TEST(StoreFactors, EveryFiniteHalfBecomesTheNearestBfloat16) {
  std::vector<uint16_t> halves;
  for (uint32_t bits = 0; bits <= UINT16_MAX; ++bits) {
    if ((bits & 0x7c00) != 0x7c00) halves.push_back(static_cast<uint16_t>(bits));
  }
  const auto count = static_cast<int64_t>(halves.size());
  const RawTensor tensor{"t", {DType::kF16, {1, count}, std::as_bytes(std::span(halves))}};
  std::vector<uint16_t> stored(count);
  ASSERT_TRUE(StoreRows(tensor, DType::kBF16, count, reinterpret_cast<std::byte*>(stored.data())).ok());
  for (int64_t i = 0; i < count; ++i) {
    ASSERT_EQ(stored[i], FloatToBF16(F16ToFloat(halves[i]))) << std::hex << halves[i];
  }
}

TEST(StoreFactors, NamesTheFirstValueThatIsTooLarge) {
  std::vector<float> values(70 * 3, 1);
  values[3 * 66 + 2] = values[3 * 67] = 3.4e38f;
  const RawTensor tensor{"t", {DType::kF32, {70, 3}, std::as_bytes(std::span(values))}};
  std::vector<std::byte> out(2 * 70 * 3);
  const absl::Status rows = StoreRows(tensor, DType::kBF16, 3, out.data());
  EXPECT_THAT(std::string(rows.message()), HasSubstr("element 200 is 3.4e+38"));
  EXPECT_EQ(StoreColumns(tensor, DType::kBF16, 70, out.data()), rows);
}

}  // namespace
}  // namespace lorikeet
