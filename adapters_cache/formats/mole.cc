#include "adapters_cache/formats/mole.h"

#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/formats/settings.h"

namespace lorikeet {

void ParseMole(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  raw->variant = "mole";
  WarnOfUnknownKeys(files.config, "adapters temperature", raw);
  for (const AdapterFiles& expert : files.experts) raw->experts.push_back(ParseAdapter(expert, problems));
  if (raw->experts.empty()) problems->Invalid("adapters names no LoRAs");
  Settings settings(files.config, problems);
  PrototypeGates& gates = raw->prototype_gates;
  gates.experts = gates.chosen = static_cast<int32_t>(raw->experts.size());
  gates.temperature = static_cast<float>(settings.Number("temperature", 1));
  gates.magnitudes = false;
  if (!(gates.temperature > 0)) problems->Invalid("temperature must be above 0");
  std::vector<std::string> unused;
  for (const auto& [name, view] : files.tensors.tensors()) {
    const std::string canonical = CanonicalName(name);
    std::string_view path = canonical;
    const bool placed = StripSuffix(&path, ".mole_gate.weight") &&
                        raw->modules[std::string(path)].tensors.emplace("mole_gate.weight", RawTensor{name, view}).second;
    if (!placed) unused.push_back(name);
  }
  if (unused.empty()) return;
  problems->Invalid(
      absl::StrCat(unused.size(), " tensors have no place in this adapter: ", ListNames(unused)));
}

}  // namespace lorikeet
