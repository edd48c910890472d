// The registry's own thread: frees what nobody uses, ends unloads.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/registry_core.h"

namespace lorikeet {

void AdapterRegistry::Core::RunReaper() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (!graveyard_.empty()) {
      const auto freed = std::exchange(graveyard_, {});
      lock.unlock();
      // `freed` dies here, without the lock.
    } else if (!retired_.empty()) {
      FreeRetired(lock);
    } else if (NextDeadline() <= std::chrono::steady_clock::now()) {
      EndLateDrains(lock);
    } else if (NextDeadline() == SteadyTime::max()) {
      reaper_wakes_.wait(lock);
    } else {
      reaper_wakes_.wait_until(lock, NextDeadline());
    }
    if (!lock.owns_lock()) lock.lock();
  }
}

// Their bytes are gone when their unloads hear of it.
void AdapterRegistry::Core::FreeRetired(std::unique_lock<std::mutex>& lock) {
  std::vector<VersionPtr> retired = std::exchange(retired_, {});
  lock.unlock();
  for (const VersionPtr& version : retired) version->adapter.reset();
  lock.lock();
  std::vector<std::shared_ptr<Drain>> over;
  for (const VersionPtr& version : retired) {
    for (const std::shared_ptr<Drain>& drain : version->drains) {
      if (--drain->missing == 0 && drain->done) over.push_back(drain);
    }
  }
  for (const auto& drain : over) std::erase(drains_, drain);
  std::vector<UnloadDone> done;
  for (const auto& drain : over) done.push_back(std::exchange(drain->done, nullptr));
  lock.unlock();
  for (size_t i = 0; i < over.size(); ++i) done[i](over[i]->result);
}

void AdapterRegistry::Core::EndLateDrains(std::unique_lock<std::mutex>& lock) {
  const auto now = std::chrono::steady_clock::now();
  std::vector<std::shared_ptr<Drain>> late;
  std::vector<UnloadDone> done;
  std::vector<absl::StatusOr<UnloadResult>> results;
  for (const auto& drain : drains_) {
    if (drain->deadline > now) continue;
    late.push_back(drain);
    results.push_back(drain->result);
    if (drain->missing > 0) {
      results.back() = absl::DeadlineExceededError(
          absl::StrCat("adapter ", QuotedName(drain->name),
                       " is still in use; its name is gone and its memory follows"));
    }
    done.push_back(std::exchange(drain->done, nullptr));
  }
  for (const auto& drain : late) std::erase(drains_, drain);
  lock.unlock();
  for (size_t i = 0; i < done.size(); ++i) done[i](std::move(results[i]));
}

AdapterRegistry::Core::SteadyTime AdapterRegistry::Core::NextDeadline() const {
  SteadyTime next = SteadyTime::max();
  for (const auto& drain : drains_) next = std::min(next, drain->deadline);
  return next;
}

}  // namespace lorikeet
