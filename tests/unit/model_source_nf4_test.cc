// NF4 checkpoints as bitsandbytes writes them (tests/golden/golden_nf4.py), whole and damaged.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <functional>

#include "engine/model/model_source.h"
#include "engine/model/nf4.h"
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

TEST(Nf4Test, EveryWeightIsBitForBitWhatBitsandbytesDequantises) {
  const TensorFile golden = Read("nf4/dequantised.safetensors");
  std::map<std::string, TensorFile> models;
  std::deque<AlignedBuffer> buffers;
  for (const auto& [name, expected] : golden.tensors()) {
    const size_t slash = name.find('/');
    const std::string model = name.substr(0, slash);
    if (!models.contains(model)) {
      models[model] = Read("models/" + model + "/model.safetensors");
      ASSERT_TRUE(RepackNf4(&models[model], &buffers).ok());
    }
    const TensorView* found = models[model].Find(name.substr(slash + 1));
    ASSERT_NE(found, nullptr) << name;
    ASSERT_EQ(found->dtype, DType::kNF4) << name;
    ASSERT_EQ(found->shape, expected.shape) << name;
    std::vector<float> values(found->elements());
    Dequantize(found->dtype, found->bytes.data(), found->elements(), values.data());
    EXPECT_EQ(std::memcmp(values.data(), expected.bytes.data(), expected.bytes.size()), 0) << name;
  }
  EXPECT_EQ(golden.tensors().size(), 28u);
}

// A model with one tensor of one weight's group changed, or taken away.
struct Damage {
  const char* part;
  std::function<void(TensorView* view, std::vector<std::byte>* bytes)> change;  // null: taken away
  absl::StatusCode code;
  const char* message;
};

void Replace(std::vector<std::byte>* bytes, std::string_view from, std::string_view to) {
  std::string text(reinterpret_cast<const char*>(bytes->data()), bytes->size());
  const size_t at = text.find(from);
  LK_CHECK(at != std::string::npos);
  text.replace(at, from.size(), to);
  bytes->assign(reinterpret_cast<const std::byte*>(text.data()),
                reinterpret_cast<const std::byte*>(text.data()) + text.size());
}

auto Text(const char* from, const char* to) {
  return [=](TensorView* view, std::vector<std::byte>* bytes) {
    Replace(bytes, from, to);
    view->shape = {static_cast<int64_t>(bytes->size())};
  };
}

constexpr auto kShorter = [](TensorView* view, std::vector<std::byte>* bytes) {
  bytes->resize(bytes->size() / 2);
  view->shape[0] /= 2;
};

constexpr char kStatePart[] = ".quant_state.bitsandbytes__nf4";

TEST(Nf4Test, WhatDoesNotFitIsRefusedByName) {
  constexpr absl::StatusCode kLoss = absl::StatusCode::kDataLoss;
  constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
  const Damage damages[] = {
      {"", kShorter, kLoss, "down_proj.weight has 2048 bytes, not 4096"},
      {"", nullptr, kLoss, "down_proj.weight is missing"},
      {".absmax", nullptr, kLoss, ".absmax is missing"},
      {".absmax", kShorter, kLoss, ".absmax has 64 values, not 128"},
      {".nested_absmax", nullptr, kLoss, ".nested_absmax is missing"},
      {".nested_quant_map", kShorter, kLoss, ".nested_quant_map has 128 values, not 256"},
      {".quant_map", [](auto*, auto* bytes) { (*bytes)[5] = std::byte{7}; }, kInvalid, "other levels"},
      {kStatePart, Text("\"blocksize\": 64", "\"blocksize\": 32"), kInvalid, "a blocksize of 32"},
      {kStatePart, Text("\"blocksize\": 64", "\"blocksize\": -64"), kLoss, "blocksize is -64"},
      {kStatePart, Text("[64, 128]", "[128, 32]"), kInvalid, "a width of 32"},
      {kStatePart, Text("[64, 128]", "[128, 64, 1"), kLoss, "malformed JSON"},
      {kStatePart, Text("[64, 128]", "[\"a\"]"), kLoss, "shape[0] is \"a\""},
      {kStatePart, Text("[64, 128]", "7"), kLoss, "shape[0] is null"},
      {kStatePart, Text("[64, 128]", "[6400000000, 64]"), kLoss, "shape[0] is 6400000000"},
      {kStatePart, Text("[64, 128]", "[128, 128]"), kLoss, ".absmax has 128 values, not 256"},
      {kStatePart, Text("nested_offset", "another"), kLoss, ".absmax is U8, not F32"},
  };
  for (const Damage& damage : damages) {
    TensorFile file = Read("models/llama-nf4/model.safetensors");
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
    const absl::Status status = RepackNf4(&file, &buffers);
    EXPECT_EQ(status.code(), damage.code) << damage.part << " " << damage.message << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(damage.message)) << damage.part;
    EXPECT_THAT(std::string(status.message()), HasSubstr(kWeight)) << damage.part;
  }
}

TEST(Nf4Test, AnotherTypeIsRefusedByName) {
  TensorFile file = Read("models/llama-nf4/model.safetensors");
  file.Put(std::string(kWeight) + ".quant_state.bitsandbytes__fp4",
           *file.Find(std::string(kWeight) + kStatePart));
  std::deque<AlignedBuffer> buffers;
  EXPECT_THAT(std::string(RepackNf4(&file, &buffers).message()), HasSubstr("'fp4'"));
}

}  // namespace
}  // namespace lorikeet
