// Who asks, and what they may.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace lorikeet {

enum class Role : uint8_t {
  kGenerate,       // "generate"
  kAdaptersRead,   // "adapters:read": list them, plan for them
  kAdaptersWrite,  // "adapters:write": load, unload, pin, prefetch, alias
  kMetrics,        // "metrics"
};

struct Identity {
  std::string id;      // of its entry in the keys file; empty: the server has no keys
  std::string tenant;  // whose key it is; empty: the server has no keys
  std::set<Role> roles;
  // The adapters there are for it: names, and beginnings of names followed by a '*'.
  std::vector<std::string> adapters = {"*"};

  bool Has(Role role) const { return roles.contains(role); }
  bool SeesAll() const { return std::ranges::count(adapters, "*") > 0; }
  // What it does not see is not there: NOT_FOUND, and in no list.
  bool Sees(std::string_view adapter) const {
    return std::ranges::any_of(adapters, [adapter](std::string_view pattern) {
      if (!pattern.ends_with('*')) return adapter == pattern;
      return adapter.starts_with(pattern.substr(0, pattern.size() - 1));
    });
  }
};

// Kept by calls that outlive a change of the keys.
using Caller = std::shared_ptr<const Identity>;

// Who asks, and from where.
struct Client {
  Caller caller;
  std::string peer;  // address
};

}  // namespace lorikeet
