// What an adapter comes to on a base model: which parts of which linears, and what they cost a token.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// The linears of one name, layers and experts aside.
struct LoadedGroup {
  std::string module;  // "model.layers.*.self_attn.q_proj"
  int32_t count = 0;
  int32_t min_rank = 0;
  int32_t max_rank = 0;
  std::string parts;         // "low rank, output scale", of the first of them
  double multiply_adds = 0;  // a token, beyond the base's
  double of_base = 0;        // the base's in the same linears
};

struct LoadedReport {
  std::vector<LoadedGroup> groups;  // in the model's order
  std::vector<std::string> beside;  // what it changes beside linears: "64 virtual tokens"
  double multiply_adds = 0;         // a token in everything, beyond the base's
  double of_base = 0;               // the base's in all linears
};

// `expert_share`: of a layer's experts, the part that a token passes.
LoadedReport InspectLoaded(const Adapter& adapter, const BaseModel& base, double expert_share);

// For a terminal, several lines, each ended by a newline.
std::string FormatLoaded(const LoadedReport& report);

}  // namespace lorikeet
