// FP8 checkpoints as compressed-tensors and Transformers write them (tests/golden/golden_fp8.py), whole
// and damaged.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "engine/model/fp8.h"
#include "tests/support/packed_checkpoint.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;

constexpr char kWeight[] = "model.layers.0.mlp.down_proj.weight";

TEST(Fp8Test, EveryWeightIsBitForBitWhatTheLibrariesWiden) {
  ExpectWidenedBitForBit("fp8/dequantised.safetensors", 21, DType::kScaledF8E4M3, RepackFp8);
}

// The format's definition: sign, four bits of exponent with bias 7, three of mantissa.
TEST(Fp8Test, EveryCodeIsItsValue) {
  for (int code = 0; code < 128; ++code) {
    const int exponent = code / 8, mantissa = code % 8;
    const float value = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    for (const int sign : {0, 128}) {
      const float widened = F8E4M3ToFloat(static_cast<uint8_t>(code + sign));
      if (code == 127) EXPECT_TRUE(std::isnan(widened));
      else EXPECT_EQ(widened, sign ? -value : value) << code;
    }
  }
}

// A model with one tensor of one weight's group changed, or taken away.
struct Damage {
  const char* part;
  TensorChange change;  // null: taken away
  const char* message;  // null: it fits
};

auto Shape(std::vector<int64_t> shape) {
  return [=](TensorView* view, std::vector<std::byte>* bytes) {
    view->shape = shape;
    bytes->resize(ByteSize(view->dtype, view->elements()));
  };
}

TEST(Fp8Test, WhatDoesNotFitIsRefusedByName) {
  const Damage damages[] = {
      {"_scale", nullptr, "down_proj.weight_scale is missing"},
      {"_scale", Shape({63, 1}), "_scale is [63, 1]; of a weight [64, 256] one scale, [64] or [1, 2]"},
      {"_scale", Shape({}), nullptr},
      {"_scale", Shape({64}), nullptr},
      {"_scale", Shape({1, 2}), nullptr},
      {"_scale", Shape({2, 1}), "_scale is [2, 1]"},
      {"_scale", Shape({0}), "_scale is [0]"},
      {"_scale", [](TensorView* view, auto*) { view->dtype = DType::kI32; }, "_scale is I32"},
      {"_scale", [](auto*, auto* bytes) { (*bytes)[3] = (*bytes)[2] = std::byte{0xff}; }, "_scale"},
      {"", [](auto*, auto* bytes) { (*bytes)[70] = std::byte{0xff}; }, "down_proj.weight[70] is NaN"},
      {"", Shape({64 * 256}), "F8_E4M3 [16384]; a matrix"},
      {"", Shape({256, 63}), "F8_E4M3 [256, 63]; a matrix whose width is a multiple of 64"},
      {"", Shape({0, 64}), "F8_E4M3 [0, 64]"},
  };
  for (const Damage& damage : damages) {
    const absl::Status status =
        RepackDamaged("models/llama-fp8/model.safetensors", std::string(kWeight) + damage.part,
                      damage.change, RepackFp8);
    if (damage.message == nullptr) {
      EXPECT_TRUE(status.ok()) << status;
      continue;
    }
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << damage.message << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(damage.message));
    EXPECT_THAT(std::string(status.message()), HasSubstr(kWeight));
  }
}

}  // namespace
}  // namespace lorikeet
