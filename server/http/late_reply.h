// An answer that another thread brings.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "server/http/message.h"

namespace lorikeet {

class LateReply final : public HttpAnswer {
 public:
  explicit LateReply(std::function<void()> wake) : slot_(std::make_shared<Slot>()) {
    slot_->wake = std::move(wake);
  }

  // What brings it: once, on any thread, at any time; the client may be gone by then.
  std::function<void(HttpResponse)> bring() const {
    return [slot = slot_](HttpResponse response) {
      {
        std::lock_guard lock(slot->mutex);
        slot->response = std::move(response);
      }
      slot->wake();
    };
  }

  void Pump(HttpWriter& writer) override {
    std::lock_guard lock(slot_->mutex);
    if (slot_->response) writer.Reply(*std::exchange(slot_->response, std::nullopt));
  }

 private:
  struct Slot {
    std::function<void()> wake;
    std::mutex mutex;
    std::optional<HttpResponse> response;
  };
  const std::shared_ptr<Slot> slot_;
};

}  // namespace lorikeet
