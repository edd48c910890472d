#include "adapters_cache/shared_blobs.h"

#include <utility>

#include "adapters_cache/sha256.h"

namespace lorikeet {

std::shared_ptr<const AlignedBuffer> SharedBlobs::Share(
    std::shared_ptr<const AlignedBuffer> block) {
  Sha256 hash;
  hash.Add(block->data(), block->size());
  const std::string key = hash.Hex();
  std::lock_guard lock(state_->mutex);
  std::weak_ptr<const AlignedBuffer>& known = state_->blocks[key];
  if (auto in_use = known.lock()) return in_use;
  state_->bytes += static_cast<int64_t>(block->size());
  const AlignedBuffer* content = block.get();
  const auto forget = [state = state_, key, block = std::move(block)](const AlignedBuffer*) {
    std::lock_guard lock(state->mutex);
    state->bytes -= static_cast<int64_t>(block->size());
    const auto it = state->blocks.find(key);
    if (it != state->blocks.end() && it->second.expired()) state->blocks.erase(it);
  };
  std::shared_ptr<const AlignedBuffer> shared(content, forget);
  known = shared;
  return shared;
}

int64_t SharedBlobs::bytes() const {
  std::lock_guard lock(state_->mutex);
  return state_->bytes;
}

}  // namespace lorikeet
