// Connections whose answers have something new.
//
// A step of the engine wakes every stream it made a token for, thousands at once. They wait here, and
// the server's threads are told once for all that come before the first is served; each takes some,
// so that all threads share a large step.
#pragma once

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <cstddef>
#include <deque>
#include <iterator>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace lorikeet {

class WakeQueue {
 public:
  class Sleeper {
   public:
    virtual ~Sleeper() = default;
    virtual void OnWake() = 0;  // on a thread of the io_context; not for long
  };

  // `io` outlives every Push.
  explicit WakeQueue(boost::asio::io_context* io) : io_(io) {}

  // Any thread; does not block.
  void Push(std::shared_ptr<Sleeper> sleeper) {
    bool first;
    {
      std::lock_guard lock(mutex_);
      if (closed_) return;
      first = waiting_.empty();
      waiting_.push_back(std::move(sleeper));
    }
    if (first) PostServe();
  }

  // When nobody runs `io` any more: lets go of who waits and of who would.
  void Close() {
    std::lock_guard lock(mutex_);
    closed_ = true;
    waiting_.clear();
  }

 private:
  static constexpr size_t kAtOnce = 64;

  void PostServe() {
    boost::asio::post(*io_, [this] { Serve(); });
  }

  void Serve() {
    std::vector<std::shared_ptr<Sleeper>> some;
    bool more;
    {
      std::lock_guard lock(mutex_);
      const auto end = waiting_.begin() + std::min(kAtOnce, waiting_.size());
      some.assign(std::move_iterator(waiting_.begin()), std::move_iterator(end));
      waiting_.erase(waiting_.begin(), end);
      more = !waiting_.empty();
    }
    if (more) PostServe();
    for (const auto& sleeper : some) sleeper->OnWake();
  }

  boost::asio::io_context* const io_;
  std::mutex mutex_;
  std::deque<std::shared_ptr<Sleeper>> waiting_;  // Serve is posted while there are any
  bool closed_ = false;
};

}  // namespace lorikeet
