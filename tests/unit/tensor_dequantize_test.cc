#include "engine/tensor/dequantize.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "engine/tensor/tensor_view.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using testing::AsBytes;
using testing::Raw;
using testing::RawVector;
using testing::ReadFile;

class DequantizeTest : public ::testing::TestWithParam<DType> {};

// tests/golden/dequantize: random blocks and what gguf-py makes of them. Equal to the last bit.
TEST_P(DequantizeTest, EqualsGgufPy) {
  const std::string base = std::string("tests/golden/dequantize/") + Info(GetParam()).name;
  const std::string blocks = ReadFile(base + ".bin");
  const std::string expected = ReadFile(base + ".f32");
  const int64_t elements = expected.size() / sizeof(float);
  ASSERT_EQ(elements, 1024) << base;
  ASSERT_EQ(static_cast<int64_t>(blocks.size()), ByteSize(GetParam(), elements)) << base;

  std::vector<float> want(elements), got(elements);
  std::memcpy(want.data(), expected.data(), expected.size());
  Dequantize(GetParam(), AsBytes(blocks).data(), elements, got.data());
  for (int64_t i = 0; i < elements; ++i) {
    ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(want[i]))
        << "value " << i << " is " << got[i] << ", gguf-py has " << want[i];
  }
}

// Views into files are aligned to nothing.
TEST_P(DequantizeTest, ReadsUnalignedBytes) {
  const std::string base = std::string("tests/golden/dequantize/") + Info(GetParam()).name;
  const std::string blocks = ReadFile(base + ".bin");
  std::vector<float> aligned(1024), shifted(1024);
  Dequantize(GetParam(), AsBytes(blocks).data(), 1024, aligned.data());
  const std::string moved = "x" + blocks;
  Dequantize(GetParam(), AsBytes(moved).data() + 1, 1024, shifted.data());
  EXPECT_EQ(std::memcmp(aligned.data(), shifted.data(), 4096), 0);
}

INSTANTIATE_TEST_SUITE_P(AllTypes, DequantizeTest,
                         ::testing::Values(DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0,
                                           DType::kQ4_0, DType::kQ4_1, DType::kQ4_K, DType::kQ5_K,
                                           DType::kQ6_K),
                         [](const auto& info) { return Info(info.param).name; });

TensorView View(DType dtype, std::vector<int64_t> shape, std::string_view bytes) {
  TensorView view;
  view.dtype = dtype;
  view.shape = std::move(shape);
  view.bytes = AsBytes(bytes);
  return view;
}

// Of several at a time, as of one.
TEST(DequantizeHalves, WidensEveryPattern) {
  std::vector<uint16_t> halves(1 << 16);
  std::iota(halves.begin(), halves.end(), 0);
  std::vector<float> got(halves.size());
  Dequantize(DType::kF16, std::as_bytes(std::span(halves)).data(), got.size(), got.data());
  for (const uint16_t bits : halves) {
    ASSERT_EQ(std::bit_cast<uint32_t>(got[bits]), std::bit_cast<uint32_t>(F16ToFloat(bits))) << bits;
  }
}

TEST(CheckFiniteTest, NamesTheFirstBadValueWhereverItStands) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const int64_t bad : {0, 1, 4095, 4096, 9998, 9999}) {
    std::vector<float> values(10000, 1.5f);
    values[bad] = bad % 2 == 0 ? -kInf : std::nanf("");
    if (bad + 1 < 10000) values[bad + 1] = kInf;
    const std::string raw = RawVector(values);
    const absl::Status status = CheckFinite("w.lora_A", View(DType::kF32, {100, 100}, raw));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    const std::string want = "'w.lora_A' [100, 100]: element " + std::to_string(bad) + " is " +
                             (bad % 2 == 0 ? "infinite" : "NaN");
    EXPECT_NE(std::string(status.message()).find(want), std::string::npos)
        << status << "\nshould say: " << want;
  }
}

TEST(CheckFiniteTest, KnowsEveryWidth) {
  const auto code = [](DType dtype, std::vector<uint16_t> bits) {
    const std::string raw = RawVector(bits);
    return CheckFinite("t", View(dtype, {static_cast<int64_t>(bits.size())}, raw)).code();
  };
  // 0x7bff and 0x7f7f are the largest finite values; 0x7c00 as bfloat16 is finite too.
  EXPECT_EQ(code(DType::kF16, {0x7bff, 0xfbff, 0, 0x8000, 1}), absl::StatusCode::kOk);
  EXPECT_EQ(code(DType::kF16, {0, 0x7c00}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(DType::kF16, {0, 0xfe01}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(DType::kBF16, {0x7f7f, 0x7c00, 0xff7f}), absl::StatusCode::kOk);
  EXPECT_EQ(code(DType::kBF16, {0x7f80}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(DType::kBF16, {0xffc0}), absl::StatusCode::kInvalidArgument);

  const std::string good = Raw(uint16_t{0x3c00}) + std::string(32, 1);
  const std::string bad = Raw(uint16_t{0x7c00}) + std::string(32, 1);
  EXPECT_TRUE(CheckFinite("q", View(DType::kQ8_0, {32}, good)).ok());
  EXPECT_FALSE(CheckFinite("q", View(DType::kQ8_0, {32}, bad)).ok());
  EXPECT_TRUE(CheckFinite("empty", View(DType::kF32, {0, 4}, "")).ok());
}

}  // namespace
}  // namespace lorikeet
