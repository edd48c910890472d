// PEFT's methods that give linears tensors of their own and are no LoRA: each a prefix of parameter
// names, the keys it reads and a lowering.
#pragma once

#include <string_view>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

struct ModuleMethod {
  std::string_view peft_type;
  std::string_view variant;  // for people
  std::string_view prefix;   // of parameters: "M.<prefix>..."
  std::string_view keys;     // of its configuration, separated by spaces
  LowerFn lower;
  bool embeddings = false;   // takes the input embedding too, as a linear from D to the tokens
};

// nullptr: no such method.
const ModuleMethod* FindModuleMethod(std::string_view peft_type);

// Fills modules, shared tensors, targets and warnings; what cannot be served goes to `problems`.
void ParsePeftModules(const ModuleMethod& method, const AdapterFiles& files, RawAdapter* raw,
                      Problems* problems);

}  // namespace lorikeet
