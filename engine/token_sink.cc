#include <atomic>
#include <memory>
#include <new>
#include <utility>

#include "engine/base/check.h"
#include "engine/engine.h"

namespace lorikeet {

// Each slot is used once, so the two indices only grow and no slot is ever shared.
struct TokenSink::Slots {
  explicit Slots(int32_t capacity)
      : capacity(capacity),
        memory(std::make_unique_for_overwrite<std::byte[]>(size_t(capacity) * sizeof(TokenEvent))) {
  }
  ~Slots() {
    for (int32_t i = popped; i < pushed.load(std::memory_order_acquire); ++i) at(i)->~TokenEvent();
  }

  TokenEvent* at(int32_t i) {
    return std::launder(reinterpret_cast<TokenEvent*>(&memory[size_t(i) * sizeof(TokenEvent)]));
  }

  static_assert(alignof(TokenEvent) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__);
  const int32_t capacity;
  const std::unique_ptr<std::byte[]> memory;  // slots [popped, pushed) are alive
  std::atomic<int32_t> pushed{0};             // engine thread
  int32_t popped = 0;                         // front thread
};

TokenSink::TokenSink(int32_t max_events, std::function<void()> wake)
    : slots_(std::make_unique<Slots>(max_events)), wake_(std::move(wake)) {}

TokenSink::~TokenSink() = default;

int32_t TokenSink::capacity() const { return slots_->capacity; }

bool TokenSink::Pop(TokenEvent* event) {
  if (slots_->popped == slots_->pushed.load(std::memory_order_acquire)) return false;
  TokenEvent* slot = slots_->at(slots_->popped++);
  *event = std::move(*slot);
  slot->~TokenEvent();
  return true;
}

void TokenSink::Push(TokenEvent event) {
  const int32_t index = slots_->pushed.load(std::memory_order_relaxed);
  LK_CHECK_MSG(index < slots_->capacity, "more events than the sink has room for");
  new (&slots_->memory[size_t(index) * sizeof(TokenEvent)]) TokenEvent(std::move(event));
  slots_->pushed.store(index + 1, std::memory_order_release);
  if (wake_) wake_();
}

}  // namespace lorikeet
