// NF4 checkpoints as bitsandbytes writes them (tests/golden/golden_nf4.py), whole and damaged.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>

#include "engine/model/model_source.h"
#include "engine/model/nf4.h"
#include "tests/support/packed_checkpoint.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;

constexpr char kWeight[] = "model.layers.0.mlp.down_proj.weight";

TEST(Nf4Test, EveryWeightIsBitForBitWhatBitsandbytesDequantises) {
  ExpectWidenedBitForBit("nf4/dequantised.safetensors", 28, DType::kNF4, RepackNf4);
}

// A model with one tensor of one weight's group changed, or taken away.
struct Damage {
  const char* part;
  TensorChange change;  // null: taken away
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
    const absl::Status status =
        RepackDamaged("models/llama-nf4/model.safetensors", std::string(kWeight) + damage.part,
                      damage.change, RepackNf4);
    EXPECT_EQ(status.code(), damage.code) << damage.part << " " << damage.message << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(damage.message)) << damage.part;
    EXPECT_THAT(std::string(status.message()), HasSubstr(kWeight)) << damage.part;
  }
}

TEST(Nf4Test, AnotherTypeIsRefusedByName) {
  TensorFile file = ReadGolden("models/llama-nf4/model.safetensors");
  file.Put(std::string(kWeight) + ".quant_state.bitsandbytes__fp4",
           *file.Find(std::string(kWeight) + kStatePart));
  std::deque<AlignedBuffer> buffers;
  EXPECT_THAT(std::string(RepackNf4(&file, &buffers).message()), HasSubstr("'fp4'"));
}

}  // namespace
}  // namespace lorikeet
