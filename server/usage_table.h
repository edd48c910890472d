// Counters by name for the names used most: what bounds the number of series in the metrics.
//
// At most `capacity` names have counters of their own; what the rest do is counted together. A name
// that is asked for more than twice as much lately as the coldest of them takes its place and starts
// from zero. So every counter only ever grows until its name goes, as Prometheus wants it. (After
// Space-Saving, Metwally et al. 2005, with counts that age.)
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lorikeet {

struct Usage {
  int64_t requests = 0;
  int64_t failed = 0;             // of them, that ended with an error or were cancelled
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t adapter_wait_us = 0;    // for the adapter to reach host and device
  int64_t serving_us = 0;         // from admission to the end

  Usage& operator+=(const Usage& other);
};

// Thread-safe.
class UsageTable {
 public:
  explicit UsageTable(size_t capacity) : capacity_(capacity) {}

  void Add(std::string_view name, const Usage& usage);  // one request's
  // Takes away the names that are gone, and their counters.
  void Retire(const std::function<bool(const std::string&)>& gone);

  struct Counters {
    std::vector<std::pair<std::string, Usage>> named;  // by name
    Usage other;                                       // of all names without counters
  };
  Counters Read() const;

 private:
  struct Entry {
    double heat = 0;     // requests, ageing
    bool named = false;  // has counters; else it may get them
    Usage usage;
  };
  using Entries = std::map<std::string, Entry, std::less<>>;

  bool MayBeNamed(const Entry& entry);
  Entries::iterator Coldest(bool named);
  void Age();

  const size_t capacity_;
  mutable std::mutex mutex_;
  Entries entries_;  // at most `capacity_` named ones and as many others
  size_t named_ = 0;
  int64_t adds_ = 0;
  Usage other_;
};

}  // namespace lorikeet
