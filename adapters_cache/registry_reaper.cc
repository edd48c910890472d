// The registry's own thread: frees what nobody uses, ends unloads.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/registry_core.h"

namespace lorikeet {

void AdapterRegistry::Core::RunReaper() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const SteadyTime next_end = NextEnd();
    if (!graveyard_.empty()) {
      const auto freed = std::exchange(graveyard_, {});
      lock.unlock();
      // `freed` dies here, without the lock.
    } else if (!retired_.empty()) {
      FreeRetired(lock);
    } else if (next_end <= std::chrono::steady_clock::now()) {
      EndDrains(lock);
    } else if (left_more_) {
      ClearLeft(lock);
    } else if (next_end == SteadyTime::max()) {
      reaper_wakes_.wait(lock);
    } else {
      reaper_wakes_.wait_until(lock, next_end);
    }
    if (!lock.owns_lock()) lock.lock();
  }
}

// The device lets go of an image when it hears that its adapter has left host memory.
void AdapterRegistry::Core::FreeRetired(std::unique_lock<std::mutex>& lock) {
  std::vector<VersionPtr> retired = std::exchange(retired_, {});
  lock.unlock();
  std::lock_guard device_lock(device_mutex_);
  for (const VersionPtr& version : retired) {
    const uint64_t serial = version->adapter != nullptr ? version->adapter->serial : 0;
    version->adapter.reset();
    if (device_ == nullptr || serial == 0) {
      OnFreed(version, 0);
      continue;
    }
    device_->Release(serial, [core = shared_from_this(), version](int64_t bytes) {
      core->OnFreed(version, bytes);
    });
  }
}

void AdapterRegistry::Core::OnFreed(const VersionPtr& version, int64_t device_bytes) {
  std::lock_guard lock(mutex_);
  for (const std::shared_ptr<Drain>& drain : version->drains) {
    --drain->leaving;
    drain->result.device_bytes_freed += device_bytes;
  }
  reaper_wakes_.notify_one();
}

// Those that have nothing more to wait for, and those whose time is over. What no request holds
// leaves by itself, and is waited for.
void AdapterRegistry::Core::EndDrains(std::unique_lock<std::mutex>& lock) {
  const auto now = std::chrono::steady_clock::now();
  std::vector<std::shared_ptr<Drain>> ended;
  std::vector<UnloadDone> done;
  for (const auto& drain : drains_) {
    if (drain->End() > now) continue;
    ended.push_back(drain);
    done.push_back(std::exchange(drain->done, nullptr));
  }
  for (const auto& drain : ended) std::erase(drains_, drain);
  std::vector<absl::StatusOr<UnloadResult>> results;
  for (const auto& drain : ended) {
    results.push_back(drain->result);
    if (drain->in_use > 0) {
      results.back() = absl::DeadlineExceededError(
          absl::StrCat("adapter ", QuotedName(drain->name),
                       " is still in use; its name is gone and its memory follows"));
    } else if (!drain->saved.ok()) {
      results.back() = drain->saved;
    }
  }
  lock.unlock();
  for (size_t i = 0; i < done.size(); ++i) done[i](std::move(results[i]));
}

// A name's files go when the state file has it no more, so that no crash leaves a name without files.
void AdapterRegistry::Core::ClearLeft(std::unique_lock<std::mutex>& lock) {
  left_more_ = false;
  const auto is_saved = [this](const auto& left) { return left.second <= saved_generation_; };
  while (true) {
    const auto it = std::find_if(left_.begin(), left_.end(), is_saved);
    if (it == left_.end()) return;
    const std::string directory = it->first;
    left_.erase(it);
    if (Uses(directory)) continue;
    Forget(directory);
    clearing_ = directory;
    lock.unlock();
    options_.on_unused(directory);
    lock.lock();
    clearing_.clear();
    jobs_changed_.notify_all();
  }
}

AdapterRegistry::Core::SteadyTime AdapterRegistry::Core::NextEnd() const {
  SteadyTime next = SteadyTime::max();
  for (const auto& drain : drains_) next = std::min(next, drain->End());
  return next;
}

}  // namespace lorikeet
