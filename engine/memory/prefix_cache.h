// Blocks of keys and values that earlier sequences computed, for later sequences to use.
//
// A block is kPageTokens tokens of all layers. It is found by exactly what it depends on: the block
// before it, its own tokens, and the KV identity of its positions (what acted on them besides the
// base model, and for whom; the base model and the type of keys and values are the process's own).
// All three are compared in full, so a hit is never a collision of hashes.
//
// Blocks are counted by the sequences that use them. One that nobody uses stays, cold, until its
// pages are needed: the one used longest ago goes first. Sequences use a block's predecessors with
// it and drop them after it, so that no block goes before those that continue it.
//
// Page ids only: no memory, one thread.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "engine/memory/kv_layout.h"
#include "engine/memory/page_pool.h"

namespace lorikeet {

using KvIdentity = std::shared_ptr<const std::string>;  // compared by value

class PrefixCache {
 public:
  // `pool` outlives it.
  explicit PrefixCache(PagePool* pool) : pool_(pool) {}
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  using Tokens = std::span<const int32_t, KvLayout::kPageTokens>;
  struct Block {
    Block* parent = nullptr;  // nullptr: the sequence's first
    KvIdentity identity;
    std::array<int32_t, KvLayout::kPageTokens> tokens;
    std::vector<int32_t> pages;  // [pages_per_block]
    int32_t users = 0;
    int64_t last_use = 0;  // in now(), when it became cold
    int32_t children = 0;                // blocks whose parent it is
    std::list<Block*>::iterator cold{};  // its place in `cold_` while nobody uses it
  };

  // The block after `parent` that holds `tokens`, used once more; nullptr if there is none.
  Block* Use(const Block* parent, const std::string& identity, Tokens tokens);
  // Takes over `pages`, allocated from the pool and holding `tokens`; used once. nullptr, and
  // nothing changed, if there is such a block already. REQUIRES: `parent` is in use.
  Block* Insert(Block* parent, KvIdentity identity, Tokens tokens, std::span<const int32_t> pages);
  // REQUIRES: it is in use, and the caller drops the blocks after it first.
  void Drop(Block* block);

  // Appends `count` page ids to `out`, cold blocks' if the pool has too few; false, and nothing
  // changed, if those are too few as well.
  bool Alloc(int32_t count, std::vector<int32_t>* out);
  void Free(std::span<const int32_t> pages) { pool_->Free(pages); }

  // The cold block used longest ago, or nullptr. REQUIRES for the other: there is one.
  const Block* coldest() const { return cold_.empty() ? nullptr : cold_.front(); }
  void EvictColdest();

  // Steps so far, to tell how long ago something was used.
  void Tick() { ++now_; }
  int64_t now() const { return now_; }

  // Forgets every cold block.
  void Clear();

  int32_t cold_pages() const { return cold_pages_; }
  int32_t available() const { return pool_->free() + cold_pages_; }

 private:
  struct Key {
    const Block* parent;
    const std::string& identity;
    Tokens tokens;
  };
  struct Hash {
    using is_transparent = void;
    size_t operator()(const Key& key) const;
    size_t operator()(const std::unique_ptr<Block>& block) const;
  };
  struct Equal {
    using is_transparent = void;
    bool operator()(const std::unique_ptr<Block>& a, const std::unique_ptr<Block>& b) const;
    bool operator()(const Key& key, const std::unique_ptr<Block>& block) const;
    bool operator()(const std::unique_ptr<Block>& block, const Key& key) const;
  };
  static Key KeyOf(const Block& block) { return {block.parent, *block.identity, block.tokens}; }

  PagePool* const pool_;
  std::unordered_set<std::unique_ptr<Block>, Hash, Equal> blocks_;
  std::list<Block*> cold_;  // the one used longest ago first
  int32_t cold_pages_ = 0;
  int64_t now_ = 0;
};

}  // namespace lorikeet
