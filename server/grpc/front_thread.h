// The thread that turns token events into messages, so that the engine thread does not: it only
// queues a piece of work here and goes on.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lorikeet {

class FrontThread {
 public:
  FrontThread() : thread_([this] { Loop(); }) {}
  // Runs what was posted, then ends.
  ~FrontThread() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    ready_.notify_one();
    thread_.join();
  }

  // Any thread. One wake-up covers all that is posted before the thread gets to it.
  void Post(std::function<void()> work) {
    bool was_empty;
    {
      std::lock_guard lock(mutex_);
      was_empty = posted_.empty();
      posted_.push_back(std::move(work));
    }
    if (was_empty) ready_.notify_one();
  }

 private:
  void Loop() {
    std::vector<std::function<void()>> batch;
    std::unique_lock lock(mutex_);
    while (true) {
      ready_.wait(lock, [this] { return stopping_ || !posted_.empty(); });
      if (posted_.empty()) return;
      batch.swap(posted_);
      lock.unlock();
      for (auto& work : batch) work();
      batch.clear();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::vector<std::function<void()>> posted_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace lorikeet
