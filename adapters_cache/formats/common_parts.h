// What any PEFT method's file may hold beside its own tensors: whole modules (modules_to_save),
// trained rows of the embedding (trainable_token_indices), replaced biases, copies of the base.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

class CommonParts {
 public:
  // Reads modules_to_save, trainable_token_indices and bias; `method` is PEFT's name of biases of
  // adapted modules: "lora" for lora_only.
  CommonParts(const nlohmann::ordered_json& config, const std::string& method, RawAdapter* raw,
              Problems* problems);

  // Takes the tensor called `canonical` (the file's name without PEFT's prefix) if it is one of
  // these.
  bool Place(std::string_view canonical, const std::string& name, const TensorView& view);

 private:
  bool Saves(std::string_view module) const;
  bool PlaceSaved(std::string_view canonical, const std::string& name, const TensorView& view);
  static bool PlaceCopy(const std::string& name, const TensorView& view,
                        std::optional<RawTensor>* copy);
  void ReadTokenIndices(const nlohmann::ordered_json& config, Problems* problems);

  RawAdapter* raw_;
  std::vector<std::string> saved_;  // modules_to_save
  bool base_bias_ = false;
};

// Removes `suffix` if the text ends with it and something is left.
bool StripSuffix(std::string_view* text, std::string_view suffix);

// "base_model.model.M.lora_A.default.weight" -> "M.lora_A.weight".
std::string CanonicalName(std::string_view name);

// Warns of every set key of the configuration that is neither common to PEFT's methods nor listed in
// `keys` (separated by spaces).
void WarnOfUnknownKeys(const nlohmann::ordered_json& config, std::string_view keys,
                       RawAdapter* raw);

// Of an adapter trained on several tasks, the one that is served: `task_id`, which who loads it adds to the
// configuration. INVALID_ARGUMENT: it is not there, or not below `tasks`.
absl::StatusOr<int64_t> TaskOf(const nlohmann::ordered_json& config, int64_t tasks);

// What init_lora_weights names, in lower case; empty: nothing.
std::string InitOf(const nlohmann::ordered_json& config);
// Whether the training began by taking what init_lora_weights names from the base's weights (PiSSA, OLoRA): a copy
// of an adapted one in the file is what was left.
bool TrainsOnResidual(const nlohmann::ordered_json& config);

// Neither null, false nor empty.
bool IsSet(const nlohmann::ordered_json& value);

}  // namespace lorikeet
