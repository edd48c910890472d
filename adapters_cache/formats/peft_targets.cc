#include "adapters_cache/formats/peft_targets.h"

#include <algorithm>
#include <charconv>
#include <cstdint>

#include "adapters_cache/formats/raw_adapter.h"
#include "engine/base/check.h"
#include "re2/re2.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;
using Pattern = std::shared_ptr<const re2::RE2>;

constexpr size_t kMaxPatternBytes = 16 << 10;

re2::StringPiece Piece(std::string_view text) { return {text.data(), text.size()}; }

// nullptr after reporting.
Pattern Compile(const std::string& regex, const std::string& stated, const char* key,
                Problems* problems) {
  if (regex.size() > kMaxPatternBytes) {
    problems->Invalid(std::string(key) + ": a pattern of " + std::to_string(regex.size()) +
                      " bytes; at most " + std::to_string(kMaxPatternBytes));
    return nullptr;
  }
  re2::RE2::Options options;
  options.set_log_errors(false);
  auto pattern = std::make_shared<const re2::RE2>(regex, options);
  if (pattern->ok()) return pattern;
  problems->Unserved(std::string(key) + ": the pattern '" + stated +
                     "' cannot be used: " + pattern->error() +
                     " (look-around and back-references are not supported; list the modules "
                     "instead)");
  return nullptr;
}

bool Full(const Pattern& pattern, std::string_view path) {
  return pattern != nullptr && re2::RE2::FullMatch(Piece(path), *pattern);
}

// The value of `key` unless it is absent, null or empty.
const Json* NonEmpty(const Json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return nullptr;
  if (it->is_string() && it->get_ref<const std::string&>().empty()) return nullptr;
  if (it->is_structured() && it->empty()) return nullptr;
  return &*it;
}

std::string Lower(std::string text) {
  for (char& c : text) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return text;
}

}  // namespace

bool PeftTargets::Selector::Exact(std::string_view path) const {
  return std::find(names.begin(), names.end(), path) != names.end();
}

bool PeftTargets::Selector::Suffix(std::string_view path) const {
  return std::any_of(names.begin(), names.end(), [path](const std::string& name) {
    return path.size() > name.size() && path.ends_with(name) &&
           path[path.size() - name.size() - 1] == '.';
  });
}

PeftTargets::Selector PeftTargets::ParseSelector(const Json& config, const char* key,
                                                 Problems* problems) {
  Selector selector;
  const Json* value = NonEmpty(config, key);
  if (value == nullptr) return selector;
  if (value->is_string()) {
    const std::string regex = value->get<std::string>();
    selector.pattern = Compile(regex, regex, key, problems);
    return selector;
  }
  if (!value->is_array()) {
    problems->Invalid(std::string(key) + " is neither a list of names nor a pattern");
    return selector;
  }
  for (const Json& name : *value) {
    if (name.is_string()) {
      selector.names.push_back(name.get<std::string>());
    } else {
      problems->Invalid(std::string(key) + " lists " + name.dump() + ", which is not a name");
    }
  }
  return selector;
}

void PeftTargets::ParseLayers(const Json& config, Problems* problems) {
  const Json* layers = NonEmpty(config, "layers_to_transform");
  const Json* patterns = NonEmpty(config, "layers_pattern");
  if (layers == nullptr && patterns == nullptr) return;
  if (layers == nullptr) {
    problems->Invalid("layers_pattern needs layers_to_transform");
    return;
  }
  if (all_linear_ || target_.pattern != nullptr) {
    problems->Invalid("layers_to_transform needs target_modules to be a list of names");
    return;
  }
  for (const Json& layer : layers->is_array() ? *layers : Json::array({*layers})) {
    if (layer.is_number_integer()) {
      layers_.push_back(layer.get<int64_t>());
    } else {
      problems->Invalid("layers_to_transform holds " + layer.dump() + ", which is not a layer");
    }
  }
  if (patterns == nullptr) {
    static constexpr char kAnyLayer[] = R"(.*?\.[^.]*\.(\d+)\.)";
    layer_patterns_.push_back(Compile(kAnyLayer, kAnyLayer, "layers_pattern", problems));
    return;
  }
  for (const Json& name : patterns->is_array() ? *patterns : Json::array({*patterns})) {
    if (!name.is_string()) {
      problems->Invalid("layers_pattern holds " + name.dump() + ", which is not a pattern");
      continue;
    }
    const std::string stated = name.get<std::string>();
    layer_patterns_.push_back(Compile(R"((?:^|.*?\.))" + stated + R"(\.(?P<idx>\d+)\.)", stated,
                                      "layers_pattern", problems));
  }
}

PeftTargets PeftTargets::Parse(const Json& config, Problems* problems) {
  PeftTargets targets;
  const auto stated = config.find("target_modules");
  targets.stated_ = stated != config.end() && !stated->is_null();
  if (targets.stated_ && stated->is_string() && Lower(stated->get<std::string>()) == "all-linear") {
    targets.all_linear_ = true;
  } else {
    targets.target_ = ParseSelector(config, "target_modules", problems);
  }
  targets.exclude_ = ParseSelector(config, "exclude_modules", problems);
  targets.ParseLayers(config, problems);
  return targets;
}

bool PeftTargets::LayerSelected(std::string_view path) const {
  for (const Pattern& pattern : layer_patterns_) {
    if (pattern == nullptr) continue;
    const auto& groups = pattern->NamedCapturingGroups();
    const auto named = groups.find("idx");
    const int group = named == groups.end() ? 1 : named->second;
    std::vector<re2::StringPiece> matches(group + 1);
    if (!pattern->Match(Piece(path), 0, path.size(), re2::RE2::ANCHOR_START, matches.data(),
                        group + 1)) {
      continue;
    }
    int64_t layer = -1;
    const re2::StringPiece& digits = matches[group];
    std::from_chars(digits.data(), digits.data() + digits.size(), layer);
    return std::find(layers_.begin(), layers_.end(), layer) != layers_.end();
  }
  return false;
}

bool PeftTargets::Match(std::string_view path) const {
  if (Full(exclude_.pattern, path) || exclude_.Exact(path) || exclude_.Suffix(path)) return false;
  if (all_linear_) return path != kHeadPath && path != kEmbeddingPath;
  if (target_.pattern != nullptr) return Full(target_.pattern, path);
  if (target_.Exact(path)) return true;
  return target_.Suffix(path) && (layers_.empty() || LayerSelected(path));
}

PeftPatternValues PeftPatternValues::Parse(const Json& config, const char* key,
                                           Problems* problems) {
  PeftPatternValues values;
  const Json* entries = NonEmpty(config, key);
  if (entries == nullptr) return values;
  if (!entries->is_object()) {
    problems->Invalid(std::string(key) + " is not a dictionary");
    return values;
  }
  for (const auto& [name, value] : entries->items()) {
    if (!value.is_number()) {
      problems->Invalid(std::string(key) + "['" + name + "'] is " + value.dump() +
                        ", not a number");
      continue;
    }
    Pattern pattern = Compile(R"((.*\.)?()" + name + ")", name, key, problems);
    if (pattern != nullptr) values.entries_.emplace_back(std::move(pattern), value.get<double>());
  }
  return values;
}

std::optional<double> PeftPatternValues::Find(std::string_view path) const {
  for (const auto& [pattern, value] : entries_) {
    if (Full(pattern, path)) return value;
  }
  return std::nullopt;
}

}  // namespace lorikeet
