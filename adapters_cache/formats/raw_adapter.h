// An adapter as its checkpoint states it: tensors by module with their hyper-parameters resolved,
// nothing yet checked against a base model. Views point into the files, which it keeps in memory.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "engine/api/base_model.h"
#include "engine/tensor/tensor_file.h"
#include "nlohmann/json.hpp"

namespace lorikeet {

// The input embedding's path, and a LoRA's path on it; the head's.
inline constexpr char kEmbeddingPath[] = "model.embed_tokens";
inline constexpr char kHeadPath[] = "lm_head";

// A tensor with the name it has in the file, for messages.
struct RawTensor {
  std::string name;
  TensorView view;
};

class ModuleTensors;
struct Lowered;

// Reads one linear's tensors and states what they come to. Anything wrong is INVALID_ARGUMENT.
using LowerFn = absl::Status (*)(const ModuleTensors& tensors, Lowered* lowered);

// One linear, or the input embedding as a linear from the vocabulary, in the notation of engine/api/adapter.h.
struct RawModule {
  std::optional<RawTensor> a;            // [rank, in]
  std::optional<RawTensor> b;            // [out, rank]
  std::optional<RawTensor> lora_bias;    // [out]; contributes scale · lora_bias
  std::optional<RawTensor> magnitude;    // [out]; m of DoRA's m / ‖W + s·B·A‖row
  std::optional<RawTensor> base_bias;    // [out]; replaces the base's bias
  float scale = 1.0f;
  int64_t rank = 0;  // as the configuration states it; 0: it does not
  // Of variants other than LoRA's own: by parameter, read by RawAdapter::lower.
  std::map<std::string, RawTensor, std::less<>> tensors;

  bool has_delta() const { return a.has_value() || !tensors.empty(); }
};

// What changes a model outside its linears.
struct RawModelParts {
  std::map<std::string, RawTensor, std::less<>> saved;       // "model.norm.weight": whole tensors
  // Whether the configuration asks for this module as a whole. Empty: for none.
  std::function<bool(std::string_view path)> saves;
  std::map<std::string, RawTensor, std::less<>> token_rows;  // by module: rows of token_indices
  std::map<std::string, std::vector<int64_t>, std::less<>> token_indices;
  // Of the base's tables, perhaps with tokens added.
  std::optional<RawTensor> embedding_copy, head_copy;
  std::vector<int32_t> invocation_tokens;
};

// Whether `name` is `path` or its last parts.
inline bool IsNamed(std::string_view path, std::string_view name) {
  return path == name || (path.size() > name.size() && path.ends_with(name) &&
                          path[path.size() - name.size() - 1] == '.');
}

// PEFT's target_parameters: LoRA on tensors of a module that is no linear.
struct RawParameters {
  // By path, "model.layers.3.mlp.experts.gate_up_proj": a linear of all experts of a layer, a
  // [experts · rank, in], b [out, rank · experts], the expert fastest.
  std::map<std::string, RawModule, std::less<>> pairs;
  std::vector<std::string> targets;  // what is asked for, by path or its last parts

  bool Target(std::string_view path) const {
    return std::any_of(targets.begin(), targets.end(),
                       [path](const std::string& target) { return IsNamed(path, target); });
  }
};

struct RawAdapter {
  std::string variant;                                    // "lora", "rslora", "dora", ...
  std::string base_model;                                 // as the configuration names it
  std::string version;                                    // AdapterFiles::version
  std::map<std::string, RawModule, std::less<>> modules;  // by path: "model.layers.3.mlp.up_proj"
  // Whether the configuration asks for this linear of the model. Each one it asks for must be in
  // `modules`. Empty: the configuration does not say.
  std::function<bool(std::string_view path)> targets;
  RawModelParts parts;
  RawParameters parameters;
  LowerFn lower = nullptr;                              // of variants other than LoRA's own
  LowerFn lower_embedding = nullptr;                    // of those that take the input embedding as well
  std::map<std::string, RawTensor, std::less<>> shared;  // of all modules, for `lower`
  nlohmann::ordered_json config;
  LayerReplication layer_replication;  // of the model it is for
  // Of prompt methods and the like: what the whole file comes to.
  absl::Status (*lower_model)(const RawAdapter& raw, const BaseModel& base,
                              Adapter* adapter) = nullptr;
  // LoRAs with gates (X-LoRA, Arrow, MoLE), or those of MLPs with routers (MixLoRA).
  std::vector<RawAdapter> experts;
  // Of experts, the last: their mean is taken from the factors of the others (Arrow).
  int32_t general_experts = 0;
  std::map<int32_t, RawTensor> routers;  // by layer: [experts, D]
  int32_t routed = 0;                    // experts of a token
  // Gates, whose sets of linears the base has to tell.
  Gating gating;
  bool gates_each_linear = false;
  float gates_weight = 1;  // of every gate
  PrototypeGates prototype_gates;
  std::vector<std::string> warnings;

  const RawModule* Find(std::string_view path) const {  // nullptr: the file has none
    const auto it = modules.find(path);
    return it == modules.end() ? nullptr : &it->second;
  }
  // Whether the configuration asks for a module of which the file has `module`, which changes nothing, or none.
  bool Lacks(std::string_view path, const RawModule* module) const {
    return targets && targets(path) && (module == nullptr || !module->has_delta());
  }
  // Whether what the file has of the input embedding is served.
  bool ServesEmbedding(const RawModule& module) const { return module.tensors.empty() || lower_embedding != nullptr; }
  TensorFile tensors;
};

}  // namespace lorikeet
