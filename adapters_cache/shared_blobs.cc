#include "adapters_cache/shared_blobs.h"

#include <algorithm>
#include <utility>

#include "adapters_cache/sha256.h"
#include "engine/base/check.h"

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

std::shared_ptr<const Adapter> SharedBlobs::Together(
    std::vector<SharedRows> rows, const std::vector<std::shared_ptr<const AlignedBuffer>>& blocks) {
  std::ranges::sort(rows, {}, &SharedRows::data);
  std::vector<std::shared_ptr<const Adapter>> looked_at;  // the last owner's end takes the lock itself
  std::lock_guard lock(state_->mutex);
  std::erase_if(state_->together, [](const auto& adapter) { return adapter.expired(); });
  for (const auto& known : state_->together) {
    looked_at.push_back(known.lock());
    const auto& in_use = looked_at.back();
    if (in_use != nullptr && in_use->shared_rows == rows) return in_use;
  }
  auto adapter = std::make_shared<Adapter>();
  for (const SharedRows& row : rows) {
    for (const auto& block : blocks) {
      if (block->data() != row.data) continue;
      adapter->blocks.push_back(block);
      break;
    }
  }
  LK_CHECK(adapter->blocks.size() == rows.size());
  adapter->shared_rows = std::move(rows);
  state_->together.push_back(adapter);
  return adapter;
}

int64_t SharedBlobs::bytes() const {
  std::lock_guard lock(state_->mutex);
  return state_->bytes;
}

}  // namespace lorikeet
