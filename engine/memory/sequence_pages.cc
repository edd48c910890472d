#include "engine/memory/sequence_pages.h"

#include <algorithm>

#include "engine/base/check.h"

namespace lorikeet {
namespace {

PrefixCache::Tokens BlockOf(std::span<const int32_t> tokens, size_t block) {
  return tokens.subspan(block * KvLayout::kPageTokens).first<KvLayout::kPageTokens>();
}

}  // namespace

bool SequencePages::Reserve(int64_t tokens) {
  const int32_t missing = PagesFor(tokens) - count();
  return missing <= 0 || cache_->Alloc(missing, &ids_);
}

void SequencePages::Release() {
  cache_->Free(std::span(ids_).subspan(shared_.size() * layout_->pages_per_block));
  ids_.clear();
  for (; !shared_.empty(); shared_.pop_back()) cache_->Drop(shared_.back());
}

int32_t SequencePages::Adopt(std::span<const int32_t> tokens, const KvIdentity& identity) {
  LK_CHECK(ids_.empty());
  const size_t blocks = tokens.size() / KvLayout::kPageTokens;
  while (shared_.size() < blocks) {
    PrefixCache::Block* block =
        cache_->Use(last_shared(), *identity, BlockOf(tokens, shared_.size()));
    if (block == nullptr) break;
    ids_.insert(ids_.end(), block->pages.begin(), block->pages.end());
    shared_.push_back(block);
  }
  return static_cast<int32_t>(shared_.size()) * KvLayout::kPageTokens;
}

void SequencePages::Share(std::span<const int32_t> tokens, const KvIdentity& identity,
                          bool replace) {
  const size_t blocks = tokens.size() / KvLayout::kPageTokens;
  while (shared_.size() < blocks) {
    const PrefixCache::Tokens block_tokens = BlockOf(tokens, shared_.size());
    const auto own = std::span(ids_).subspan(shared_.size() * layout_->pages_per_block,
                                             layout_->pages_per_block);
    PrefixCache::Block* block = cache_->Insert(last_shared(), identity, block_tokens, own);
    if (block == nullptr) {
      if (!replace) return;
      block = cache_->Use(last_shared(), *identity, block_tokens);
      cache_->Free(own);
      std::ranges::copy(block->pages, own.begin());
    }
    shared_.push_back(block);
  }
}

}  // namespace lorikeet
