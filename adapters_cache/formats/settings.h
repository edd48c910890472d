// Keys of an adapter's configuration, each checked as it is read: what is wrong goes to `problems`.
// A key that is absent or null has its fallback.
#pragma once

#include <cmath>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/problems.h"
#include "nlohmann/json.hpp"

namespace lorikeet {

class Settings {
 public:
  // Both outlive it.
  Settings(const nlohmann::ordered_json& config, Problems* problems)
      : config_(config), problems_(problems) {}

  bool Flag(const char* key, bool fallback) {
    const nlohmann::ordered_json* value = Get(key);
    if (value == nullptr) return fallback;
    if (value->is_boolean()) return value->get<bool>();
    problems_->Invalid(absl::StrCat(key, " is ", value->dump(), ", neither true nor false"));
    return fallback;
  }
  double Number(const char* key, double fallback) {
    const nlohmann::ordered_json* value = Get(key);
    if (value == nullptr) return fallback;
    if (value->is_number() && std::isfinite(value->get<float>())) return value->get<double>();
    problems_->Invalid(absl::StrCat(key, " is ", value->dump(), ", not a number"));
    return fallback;
  }
  // From 1 to `most`.
  int64_t Whole(const char* key, int64_t fallback, int64_t most) {
    const nlohmann::ordered_json* value = Get(key);
    if (value == nullptr) return fallback;
    if (value->is_number_integer() && *value >= 1 && *value <= most) return value->get<int64_t>();
    problems_->Invalid(absl::StrCat(key, " is ", value->dump(), "; it must be 1 to ", most));
    return fallback;
  }
  // nullptr: absent or null.
  const nlohmann::ordered_json* Get(const char* key) const {
    const auto it = config_.find(key);
    return it == config_.end() || it->is_null() ? nullptr : &*it;
  }

 private:
  const nlohmann::ordered_json& config_;
  Problems* const problems_;
};

}  // namespace lorikeet
