#include "server/usage_table.h"

namespace lorikeet {
namespace {

// Requests a name, on average, after which what was asked before counts half.
constexpr int64_t kHalfLife = 64;
// How much hotter than the coldest a name must be to take its place: fewer changes of series.
constexpr double kHotter = 2;

}  // namespace

Usage& Usage::operator+=(const Usage& other) {
  requests += other.requests;
  failed += other.failed;
  prompt_tokens += other.prompt_tokens;
  cached_tokens += other.cached_tokens;
  completion_tokens += other.completion_tokens;
  adapter_wait_us += other.adapter_wait_us;
  serving_us += other.serving_us;
  return *this;
}

void UsageTable::Add(std::string_view name, const Usage& usage) {
  std::lock_guard lock(mutex_);
  if (++adds_ % (kHalfLife * static_cast<int64_t>(capacity_ + 1)) == 0) Age();
  auto it = entries_.find(name);
  if (it == entries_.end()) {
    if (entries_.size() - named_ > capacity_) entries_.erase(Coldest(/*named=*/false));
    it = entries_.emplace(std::string(name), Entry()).first;
  }
  Entry& entry = it->second;
  entry.heat += 1;
  if (!entry.named && MayBeNamed(entry)) {
    entry.named = true;
    ++named_;
  }
  (entry.named ? entry.usage : other_) += usage;
}

// Frees the coldest name's place for it, if there is none and it is that much hotter.
bool UsageTable::MayBeNamed(const Entry& entry) {
  if (named_ < capacity_) return true;
  const auto coldest = Coldest(/*named=*/true);
  if (coldest == entries_.end() || entry.heat <= kHotter * coldest->second.heat) return false;
  coldest->second.named = false;
  coldest->second.usage = {};
  --named_;
  return true;
}

UsageTable::Entries::iterator UsageTable::Coldest(bool named) {
  auto coldest = entries_.end();
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    if (it->second.named != named) continue;
    if (coldest == entries_.end() || it->second.heat < coldest->second.heat) coldest = it;
  }
  return coldest;
}

void UsageTable::Age() {
  for (auto& [name, entry] : entries_) entry.heat /= 2;
}

void UsageTable::Retire(const std::function<bool(const std::string&)>& gone) {
  std::lock_guard lock(mutex_);
  std::erase_if(entries_, [&](const auto& item) {
    if (!gone(item.first)) return false;
    named_ -= item.second.named ? 1 : 0;
    return true;
  });
}

UsageTable::Counters UsageTable::Read() const {
  std::lock_guard lock(mutex_);
  Counters counters{.named = {}, .other = other_};
  for (const auto& [name, entry] : entries_) {
    if (entry.named) counters.named.emplace_back(name, entry.usage);
  }
  return counters;
}

}  // namespace lorikeet
