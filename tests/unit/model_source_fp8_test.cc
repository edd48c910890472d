// FP8 checkpoints as compressed-tensors and Transformers write them (tests/golden/golden_fp8.py), whole
// and damaged.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>

#include "engine/model/fp8.h"
#include "engine/tensor/dequantize.h"
#include "engine/tensor/safetensors.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;

constexpr char kWeight[] = "model.layers.0.mlp.down_proj.weight";
const std::filesystem::path kGolden = "tests/golden";

TensorFile Read(const std::filesystem::path& path) {
  absl::StatusOr<TensorFile> file = ReadSafetensors(kGolden / path);
  LK_CHECK_MSG(file.ok(), file.status().ToString());
  return *std::move(file);
}

TEST(Fp8Test, EveryWeightIsBitForBitWhatTheLibrariesWiden) {
  const TensorFile golden = Read("fp8/dequantised.safetensors");
  std::map<std::string, TensorFile> models;
  std::deque<AlignedBuffer> buffers;
  for (const auto& [name, expected] : golden.tensors()) {
    const size_t slash = name.find('/');
    const std::string model = name.substr(0, slash);
    if (!models.contains(model)) {
      models[model] = Read("models/" + model + "/model.safetensors");
      ASSERT_TRUE(RepackFp8(&models[model], &buffers).ok());
    }
    const TensorView* found = models[model].Find(name.substr(slash + 1));
    ASSERT_NE(found, nullptr) << name;
    ASSERT_EQ(found->dtype, DType::kScaledF8E4M3) << name;
    ASSERT_EQ(found->shape, expected.shape) << name;
    std::vector<float> values(found->elements());
    Dequantize(found->dtype, found->bytes.data(), found->elements(), values.data());
    EXPECT_EQ(std::memcmp(values.data(), expected.bytes.data(), expected.bytes.size()), 0) << name;
  }
  EXPECT_EQ(golden.tensors().size(), 21u);
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
  std::function<void(TensorView* view, std::vector<std::byte>* bytes)> change;  // null: taken away
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
    TensorFile file = Read("models/llama-fp8/model.safetensors");
    const std::string name = std::string(kWeight) + damage.part;
    TensorView view = *file.Find(name);
    std::vector<std::byte> bytes(view.bytes.begin(), view.bytes.end());
    file.Erase(name);
    if (damage.change) {
      damage.change(&view, &bytes);
      view.bytes = bytes;
      file.Put(name, view);
    }
    std::deque<AlignedBuffer> buffers;
    const absl::Status status = RepackFp8(&file, &buffers);
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
