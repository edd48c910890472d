// What an adapter directory holds and whether a server would load it, without a server or a base
// model: `lorikeet adapters inspect DIR`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace lorikeet {

// The linears of one kind over all layers that have it.
struct InspectGroup {
  std::string module;  // "self_attn.q_proj", "lm_head"
  int32_t count = 0;   // layers that have it
  int32_t in = 0;
  int32_t out = 0;
  int32_t min_rank = 0;
  int32_t max_rank = 0;
  float min_scale = 0;
  float max_scale = 0;
};

struct InspectReport {
  std::string path;
  std::string variant;     // "lora", "rslora", "dora", ...; the peft_type as written if refused
  std::string base_model;  // as the configuration names it; informative
  std::string version;     // the identity a server gives it; empty when files cannot be read
  std::string dtypes;      // of the tensors: "BF16", "F16 F32"
  std::vector<InspectGroup> groups;
  int64_t parameters = 0;
  int64_t tensor_bytes = 0;
  std::vector<std::string> refusals;  // why LoadAdapter would refuse it; empty: it would load
                                      // into a base model with these shapes
  std::vector<std::string> warnings;

  bool loadable() const { return refusals.empty(); }
};

// Never fails: what cannot be read is a refusal.
InspectReport InspectAdapter(const std::filesystem::path& directory);

// For a terminal, several lines, each ended by a newline.
std::string FormatReport(const InspectReport& report);

}  // namespace lorikeet
