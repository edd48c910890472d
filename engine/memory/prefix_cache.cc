#include "engine/memory/prefix_cache.h"

#include <algorithm>
#include <functional>
#include <string_view>
#include <utility>

#include "engine/base/check.h"

namespace lorikeet {

PrefixCache::~PrefixCache() { Clear(); }

size_t PrefixCache::Hash::operator()(const Key& key) const {
  const std::string_view bytes(reinterpret_cast<const char*>(key.tokens.data()),
                               key.tokens.size_bytes());
  const std::hash<std::string_view> text;
  const size_t parent = std::hash<const Block*>()(key.parent);
  // An odd factor, so that equal parts in other places differ.
  constexpr size_t kFactor = 0x9E3779B97F4A7C15u;
  return ((parent * kFactor + text(key.identity)) * kFactor) ^ text(bytes);
}

size_t PrefixCache::Hash::operator()(const std::unique_ptr<Block>& block) const {
  return (*this)(KeyOf(*block));
}

bool PrefixCache::Equal::operator()(const Key& key, const std::unique_ptr<Block>& block) const {
  return key.parent == block->parent && key.identity == *block->identity &&
         std::ranges::equal(key.tokens, block->tokens);
}

bool PrefixCache::Equal::operator()(const std::unique_ptr<Block>& block, const Key& key) const {
  return (*this)(key, block);
}

bool PrefixCache::Equal::operator()(const std::unique_ptr<Block>& a,
                                    const std::unique_ptr<Block>& b) const {
  return (*this)(KeyOf(*a), b);
}

PrefixCache::Block* PrefixCache::Use(const Block* parent, const std::string& identity,
                                     Tokens tokens) {
  const auto found = blocks_.find(Key{parent, identity, tokens});
  if (found == blocks_.end()) return nullptr;
  Block* block = found->get();
  if (block->users++ == 0) {
    cold_.erase(block->cold);
    cold_pages_ -= static_cast<int32_t>(block->pages.size());
  }
  return block;
}

PrefixCache::Block* PrefixCache::Insert(Block* parent, KvIdentity identity, Tokens tokens,
                                        std::span<const int32_t> pages) {
  LK_CHECK(parent == nullptr || parent->users > 0);
  if (blocks_.contains(Key{parent, *identity, tokens})) return nullptr;
  auto block = std::make_unique<Block>();
  block->parent = parent;
  block->identity = std::move(identity);
  std::ranges::copy(tokens, block->tokens.begin());
  block->pages.assign(pages.begin(), pages.end());
  block->users = 1;
  if (parent != nullptr) ++parent->children;
  Block* inserted = block.get();
  blocks_.insert(std::move(block));
  return inserted;
}

void PrefixCache::Drop(Block* block) {
  LK_CHECK(block->users > 0);
  if (--block->users > 0) return;
  block->cold = cold_.insert(cold_.end(), block);
  block->last_use = now_;
  cold_pages_ += static_cast<int32_t>(block->pages.size());
}

bool PrefixCache::Alloc(int32_t count, std::vector<int32_t>* out) {
  if (count > available()) return false;
  while (count > pool_->free()) EvictColdest();
  return pool_->Alloc(count, out);
}

void PrefixCache::Clear() {
  while (!cold_.empty()) EvictColdest();
}

void PrefixCache::EvictColdest() {
  Block* block = cold_.front();
  LK_CHECK_MSG(block->children == 0, "a block goes before those that continue it");
  cold_.pop_front();
  cold_pages_ -= static_cast<int32_t>(block->pages.size());
  if (block->parent != nullptr) --block->parent->children;
  pool_->Free(block->pages);
  blocks_.erase(blocks_.find(KeyOf(*block)));
}

}  // namespace lorikeet
