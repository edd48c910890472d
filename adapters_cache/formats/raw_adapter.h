// An adapter as its checkpoint states it: tensors by module with their hyper-parameters resolved,
// nothing yet checked against a base model. Views point into the files, which it keeps in memory.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tensor/tensor_file.h"

namespace lorikeet {

// A tensor with the name it has in the file, for messages.
struct RawTensor {
  std::string name;
  TensorView view;
};

// y = magnitude-normalised (x Wᵀ + scale·(x Aᵀ) Bᵀ) + bias, as in engine/api/adapter.h.
struct RawModule {
  std::optional<RawTensor> a;          // [rank, in]
  std::optional<RawTensor> b;          // [out, rank]
  std::optional<RawTensor> lora_bias;  // [out]; contributes scale·lora_bias
  std::optional<RawTensor> magnitude;  // [out]; DoRA's m
  std::optional<RawTensor> base_bias;  // [out]; replaces the base's bias
  float scale = 1.0f;
  int32_t rank = 0;  // as the configuration states it; A and B must agree
};

struct RawAdapter {
  std::string variant;                                // "lora", "rslora", "dora", ...
  std::string base_model;                             // as the configuration names it
  std::string version;                                // identity, see ReadAdapterFiles
  std::map<std::string, RawModule, std::less<>> modules;  // by path: "model.layers.3.mlp.up_proj"
  // Whether the configuration asks for this linear of the model; every one it asks for must be in
  // `modules`.
  std::function<bool(std::string_view path)> targets;
  std::vector<std::string> warnings;
  TensorFile tensors;
};

}  // namespace lorikeet
