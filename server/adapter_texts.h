// Tokenizers and chat templates that adapters bring, one for all adapters with the same files.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/adapter.h"
#include "server/text/model_text.h"

namespace lorikeet {

// Thread-safe.
class AdapterTexts {
 public:
  // Of the base model; `base` outlives this.
  AdapterTexts(const Tokenizer& base, std::vector<int32_t> eos_ids)
      : base_(base), eos_ids_(std::move(eos_ids)) {}

  // `files`: contents by name, of a folder called `where` in messages; `vocab`: rows of logits of the
  // adapter. nullptr: they hold neither a tokenizer nor a template. INVALID_ARGUMENT: a file that
  // does not parse, by name, or a tokenizer with more tokens than `vocab`.
  absl::StatusOr<std::shared_ptr<const AdapterText>> Read(const TokenizerFiles& files,
                                                          const std::string& where, int32_t vocab);

 private:
  const Tokenizer& base_;
  const std::vector<int32_t> eos_ids_;
  std::mutex mutex_;
  std::map<std::string, std::weak_ptr<const AdapterText>> known_;  // by hash of contents and vocab
};

// What requests to `adapter` (nullptr: the base model) speak, `base` being the model's own.
ModelText TextOf(const ModelText& base, const Adapter* adapter);

}  // namespace lorikeet
