// An answer that is begun on another thread: reading a long body (its JSON, its tokens) takes seconds,
// in which the server's own threads go on with all other connections.
#pragma once

#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "server/http/message.h"

namespace lorikeet {

class BegunElsewhere final : public HttpAnswer {
 public:
  BegunElsewhere(boost::asio::thread_pool* pool, HttpBegin begin, std::function<void()> wake)
      : slot_(std::make_shared<Slot>()) {
    slot_->begin = std::move(begin);
    slot_->wake = std::move(wake);
    // When the client is gone the request is not kept until its turn comes.
    boost::asio::post(*pool, [weak = std::weak_ptr(slot_)] {
      if (const auto slot = weak.lock()) slot->Begin();
    });
  }

  void Pump(HttpWriter& writer) override {
    if (answer_ == nullptr) {
      std::lock_guard lock(slot_->mutex);
      answer_ = std::move(slot_->answer);
    }
    if (answer_ != nullptr) answer_->Pump(writer);
  }

 private:
  struct Slot {
    void Begin() {
      std::unique_ptr<HttpAnswer> begun = std::exchange(begin, nullptr)();
      {
        std::lock_guard lock(mutex);
        answer = std::move(begun);
      }
      wake();
    }

    HttpBegin begin;  // until it is begun
    std::function<void()> wake;
    std::mutex mutex;
    std::unique_ptr<HttpAnswer> answer;  // until it is pumped
  };
  const std::shared_ptr<Slot> slot_;
  std::unique_ptr<HttpAnswer> answer_;
};

}  // namespace lorikeet
