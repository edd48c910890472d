#include "engine/image_ledger.h"

#include <iterator>
#include <utility>

namespace lorikeet {

ImageLedger::~ImageLedger() {
  for (const Waiter& waiter : waiters_) waiter.done(waiter.bytes);
}

void ImageLedger::Begin(const AdapterMoves& moves, int64_t now_us) {
  std::lock_guard lock(mutex_);
  for (const uint64_t serial : moves.drops) {
    Remove(serial);
    ++counts_.drops;
  }
  for (const AdapterLoad& load : moves.loads) {
    const int64_t bytes = load.size.bytes(page_bytes_);
    images_[load.adapter.get()->serial] = {.bytes = bytes, .begun_us = now_us};
  }
}

int64_t ImageLedger::End(const AdapterLoaded& loaded, int64_t now_us) {
  std::lock_guard lock(mutex_);
  Image& image = images_.at(loaded.serial);
  const int64_t begun_us = image.begun_us;
  if (!loaded.status.ok()) {
    images_.erase(loaded.serial);
    ++counts_.failures;
    return begun_us;
  }
  image.ready = true;
  image.used = loaded.bytes;
  ++counts_.images;
  ++counts_.loads;
  counts_.load_bytes += image.used;
  counts_.load_us += now_us - begun_us;
  counts_.image_bytes += image.bytes;
  counts_.used_bytes += image.used;
  return begun_us;
}

void ImageLedger::Remove(uint64_t serial) {
  const Image& image = images_.at(serial);
  --counts_.images;
  counts_.image_bytes -= image.bytes;
  counts_.used_bytes -= image.used;
  images_.erase(serial);
}

void ImageLedger::Settle() {
  std::vector<Waiter> settled;
  {
    std::lock_guard lock(mutex_);
    const auto gone = [&](const Waiter& waiter) { return !images_.contains(waiter.serial); };
    for (Waiter& waiter : waiters_) {
      if (gone(waiter)) settled.push_back(std::move(waiter));
    }
    std::erase_if(waiters_, gone);
  }
  for (const Waiter& waiter : settled) waiter.done(waiter.bytes);
}

int64_t ImageLedger::Bytes(uint64_t serial) const {
  std::lock_guard lock(mutex_);
  const auto found = images_.find(serial);
  return found != images_.end() && found->second.ready ? found->second.bytes : 0;
}

bool ImageLedger::Release(uint64_t serial, std::function<void(int64_t bytes)>* done) {
  std::lock_guard lock(mutex_);
  const auto found = images_.find(serial);
  if (found == images_.end()) return false;
  waiters_.push_back({serial, found->second.bytes, std::move(*done)});
  return true;
}

ImageCounts ImageLedger::counts() const {
  std::lock_guard lock(mutex_);
  return counts_;
}

}  // namespace lorikeet
