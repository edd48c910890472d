// The seed corpus of every fuzz target: the goldens in the form its input has.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace lorikeet::testing {

// By target ("safetensors", "adapter", ...): name and input. Read from the source's root.
using Seeds = std::map<std::string, std::vector<std::pair<std::string, std::string>>>;
Seeds GoldenSeeds();

}  // namespace lorikeet::testing
