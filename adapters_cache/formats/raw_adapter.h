// An adapter as its checkpoint states it: tensors by module with their hyper-parameters resolved,
// nothing yet checked against a base model. Views point into the files, which it keeps in memory.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/tensor/tensor_file.h"

namespace lorikeet {

// A tensor with the name it has in the file, for messages.
struct RawTensor {
  std::string name;
  TensorView view;
};

// One linear, in the notation of engine/api/adapter.h.
struct RawModule {
  std::optional<RawTensor> a;            // [rank, in]
  std::optional<RawTensor> b;            // [out, rank]
  std::optional<RawTensor> lora_bias;    // [out]; contributes scale · lora_bias
  std::optional<RawTensor> magnitude;    // [out]; m of DoRA's m / ‖W + s·B·A‖row
  std::optional<RawTensor> base_bias;    // [out]; replaces the base's bias
  std::optional<RawTensor> base_weight;  // [out, in]; a copy of the base's weight, used for nothing
  float scale = 1.0f;
};

struct RawAdapter {
  std::string variant;                                    // "lora", "rslora", "dora", ...
  std::string base_model;                                 // as the configuration names it
  std::string version;                                    // AdapterFiles::version
  std::map<std::string, RawModule, std::less<>> modules;  // by path: "model.layers.3.mlp.up_proj"
  // Whether the configuration asks for this linear of the model. Each one it asks for must be in
  // `modules`. Empty: the configuration does not say.
  std::function<bool(std::string_view path)> targets;
  std::vector<std::string> warnings;
  TensorFile tensors;
};

}  // namespace lorikeet
