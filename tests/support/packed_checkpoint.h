// Golden checkpoints whose weights are codes with scales beside them, whole and damaged.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/base/aligned_buffer.h"
#include "engine/base/check.h"
#include "engine/tensor/dequantize.h"
#include "engine/tensor/safetensors.h"

namespace lorikeet {

using Repack = absl::Status (*)(TensorFile* tensors, std::deque<AlignedBuffer>* buffers);

inline TensorFile ReadGolden(const std::filesystem::path& path) {
  absl::StatusOr<TensorFile> file = ReadSafetensors("tests/golden" / path);
  LK_CHECK_MSG(file.ok(), file.status().ToString());
  return *std::move(file);
}

// Each of the `count` tensors MODEL/NAME of `golden` is, bit for bit, what `repack` makes of the model's,
// as `dtype`.
inline void ExpectWidenedBitForBit(const std::filesystem::path& golden_path, size_t count, DType dtype,
                                   Repack repack) {
  const TensorFile golden = ReadGolden(golden_path);
  std::map<std::string, TensorFile> models;
  std::deque<AlignedBuffer> buffers;
  for (const auto& [name, expected] : golden.tensors()) {
    const size_t slash = name.find('/');
    const std::string model = name.substr(0, slash);
    if (!models.contains(model)) {
      models[model] = ReadGolden("models/" + model + "/model.safetensors");
      ASSERT_TRUE(repack(&models[model], &buffers).ok());
    }
    const TensorView* found = models[model].Find(name.substr(slash + 1));
    ASSERT_NE(found, nullptr) << name;
    ASSERT_EQ(found->dtype, dtype) << name;
    ASSERT_EQ(found->shape, expected.shape) << name;
    std::vector<float> values(found->elements());
    Dequantize(found->dtype, found->bytes.data(), found->elements(), values.data());
    EXPECT_EQ(std::memcmp(values.data(), expected.bytes.data(), expected.bytes.size()), 0) << name;
  }
  EXPECT_EQ(golden.tensors().size(), count);
}

// What `repack` says of a model with one tensor changed, or taken away where there is no change.
using TensorChange = std::function<void(TensorView* view, std::vector<std::byte>* bytes)>;
inline absl::Status RepackDamaged(const std::filesystem::path& model, const std::string& name,
                                  const TensorChange& change, Repack repack) {
  TensorFile file = ReadGolden(model);
  TensorView view = *file.Find(name);
  std::vector<std::byte> bytes(view.bytes.begin(), view.bytes.end());
  file.Erase(name);
  if (change) {
    change(&view, &bytes);
    view.bytes = bytes;
    file.Put(name, view);
  }
  std::deque<AlignedBuffer> buffers;
  return repack(&file, &buffers);
}

}  // namespace lorikeet
