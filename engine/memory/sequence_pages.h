// The pages that hold one sequence's keys and values, in token order.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/memory/kv_layout.h"
#include "engine/memory/page_pool.h"

namespace lorikeet {

// Gives its pages back when it dies. Not copyable: a page has one owner.
class SequencePages {
 public:
  // `pool` and `layout` outlive it.
  SequencePages(PagePool* pool, const KvLayout* layout) : pool_(pool), layout_(layout) {}
  ~SequencePages() { Release(); }
  SequencePages(const SequencePages&) = delete;
  SequencePages& operator=(const SequencePages&) = delete;

  // Makes room for `tokens` tokens in all. False, and nothing changed, if the pool lacks pages.
  bool Reserve(int64_t tokens) {
    const int32_t missing = layout_->PagesFor(tokens) - static_cast<int32_t>(ids_.size());
    return missing <= 0 || pool_->Alloc(missing, &ids_);
  }
  void Release() {
    pool_->Free(ids_);
    ids_.clear();
  }

  // Pages of the first `tokens` tokens: block-major, pages_per_block ids a block.
  std::span<const int32_t> First(int64_t tokens) const {
    return std::span(ids_).first(layout_->PagesFor(tokens));
  }
  int32_t count() const { return static_cast<int32_t>(ids_.size()); }

 private:
  PagePool* pool_;
  const KvLayout* layout_;
  std::vector<int32_t> ids_;
};

}  // namespace lorikeet
