// The pages that hold one sequence's keys and values, in token order: blocks it shares through the
// prefix cache first, then its own.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/memory/kv_layout.h"
#include "engine/memory/prefix_cache.h"

namespace lorikeet {

// Gives its pages back when it dies.
class SequencePages {
 public:
  // `cache` and `layout` outlive it. A sequence may have `sets` of keys and values for its tokens, a
  // block of each in turn; with more than one it shares nothing.
  SequencePages(PrefixCache* cache, const KvLayout* layout, int32_t sets = 1)
      : cache_(cache), layout_(layout), sets_(sets) {}
  ~SequencePages() { Release(); }
  SequencePages(const SequencePages&) = delete;
  SequencePages& operator=(const SequencePages&) = delete;

  // Makes room for `tokens` tokens in all. False, and nothing changed, if pages are lacking.
  bool Reserve(int64_t tokens);
  void Release();

  // Uses what the cache has of the first `tokens`, whole blocks from the first on; returns their
  // number of tokens. REQUIRES: no pages are held.
  int32_t Adopt(std::span<const int32_t> tokens, const KvIdentity& identity);
  // Shares the whole blocks of `tokens`, whose keys and values are computed or will be before
  // anything later. A block that another sequence has shared meanwhile takes the place of this
  // one's own if `replace`, which needs that no step still writes to it; else sharing ends there.
  void Share(std::span<const int32_t> tokens, const KvIdentity& identity, bool replace);

  // Pages of the first `tokens` tokens: block-major, pages_per_block ids a block and set.
  std::span<const int32_t> First(int64_t tokens) const {
    return std::span(ids_).first(PagesFor(tokens));
  }
  // For `tokens` tokens, of all sets.
  int32_t PagesFor(int64_t tokens) const { return sets_ * layout_->PagesFor(tokens); }
  int32_t sets() const { return sets_; }
  int32_t count() const { return static_cast<int32_t>(ids_.size()); }

 private:
  PrefixCache::Block* last_shared() const { return shared_.empty() ? nullptr : shared_.back(); }

  PrefixCache* cache_;
  const KvLayout* layout_;
  const int32_t sets_;
  std::vector<int32_t> ids_;
  std::vector<PrefixCache::Block*> shared_;  // of the first shared_.size() blocks of `ids_`
};

}  // namespace lorikeet
