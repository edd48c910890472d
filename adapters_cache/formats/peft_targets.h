// Which linears a PEFT configuration means: target_modules, exclude_modules, layers_to_transform,
// layers_pattern, and the dictionaries from pattern to value. The rules are PEFT's
// (check_target_module_exists and get_pattern_key in its sources), since a rule that is almost
// right changes alpha / r without a word.
//
// PEFT's patterns are Python regular expressions; RE2 compiles them. Both agree on everything that
// RE2 accepts for ASCII paths; what it does not accept (look-around, back-references) is refused.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "adapters_cache/formats/problems.h"
#include "nlohmann/json.hpp"

namespace re2 {
class RE2;
}

namespace lorikeet {

class PeftTargets {
 public:
  // Reports what PEFT would not accept either, and patterns that RE2 cannot compile.
  static PeftTargets Parse(const nlohmann::ordered_json& config, Problems* problems);

  // False when target_modules is absent or null: PEFT then guesses by model family.
  bool stated() const { return stated_; }

  // Whether PEFT would adapt the linear at `path` ("model.layers.0.self_attn.q_proj").
  bool Match(std::string_view path) const;

 private:
  // A list of names (equal to the path, or its last parts) or one pattern for the whole path.
  struct Selector {
    std::vector<std::string> names;
    std::shared_ptr<const re2::RE2> pattern;

    bool Exact(std::string_view path) const;
    bool Suffix(std::string_view path) const;
  };
  static Selector ParseSelector(const nlohmann::ordered_json& config, const char* key,
                                Problems* problems);
  void ParseLayers(const nlohmann::ordered_json& config, Problems* problems);
  bool LayerSelected(std::string_view path) const;

  bool stated_ = false;
  bool all_linear_ = false;
  Selector target_;
  Selector exclude_;
  std::vector<int64_t> layers_;  // empty: all
  std::vector<std::shared_ptr<const re2::RE2>> layer_patterns_;
};

// rank_pattern, alpha_pattern: the first key k in file order for which (.*\.)?(k)$ matches the
// whole path gives the value.
class PeftPatternValues {
 public:
  static PeftPatternValues Parse(const nlohmann::ordered_json& config, const char* key,
                                 Problems* problems);

  std::optional<double> Find(std::string_view path) const;

 private:
  std::vector<std::pair<std::shared_ptr<const re2::RE2>, double>> entries_;
};

}  // namespace lorikeet
