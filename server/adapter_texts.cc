#include "server/adapter_texts.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/sha256.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

struct OwnText final : AdapterText {
  std::unique_ptr<Tokenizer> tokenizer;  // nullptr: the base's, as all below
  std::unique_ptr<ChatTemplate> chat_template;
  std::unique_ptr<Grammars> grammars;
  std::vector<int32_t> eos_ids;
};

std::string KeyOf(const TokenizerFiles& files, int32_t vocab) {
  Sha256 hash;
  for (const auto& [name, content] : files) {
    hash.Add(absl::StrCat(name, ":", content.size(), ":"));
    hash.Add(content);
  }
  return absl::StrCat(hash.Hex(), ":", vocab);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const AdapterText>> AdapterTexts::Read(const TokenizerFiles& files,
                                                                      const std::string& where,
                                                                      int32_t vocab) {
  const std::string key = KeyOf(files, vocab);
  {
    std::lock_guard lock(mutex_);
    std::erase_if(known_, [](const auto& entry) { return entry.second.expired(); });
    const auto it = known_.find(key);
    if (it != known_.end()) return it->second.lock();
  }
  auto text = std::make_shared<OwnText>();
  ChatTemplateSource source;
  if (files.contains("tokenizer.json")) {
    LK_ASSIGN_OR_RETURN(text->tokenizer, Tokenizer::FromFiles(files, where));
    const int32_t tokens = text->tokenizer->vocab_size();
    if (tokens > vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": its tokenizer has ", tokens, " tokens and its model ", vocab));
    }
    text->eos_ids = eos_ids_;
    for (const int32_t id : text->tokenizer->end_ids()) {
      if (std::ranges::find(text->eos_ids, id) == text->eos_ids.end()) text->eos_ids.push_back(id);
    }
    std::erase_if(text->eos_ids, [vocab](int32_t id) { return id >= vocab; });
    if (!text->eos_ids.empty()) {
      LK_ASSIGN_OR_RETURN(text->grammars,
                          Grammars::Create(*text->tokenizer, vocab, text->eos_ids));
    }
    source = text->tokenizer->chat_template();
  } else {
    LK_ASSIGN_OR_RETURN(source, Tokenizer::TemplatesOf(files, where));
  }
  const Tokenizer& tokenizer = text->tokenizer ? *text->tokenizer : base_;
  if (!source.text.empty()) {
    auto chat = ChatTemplate::Create(source, tokenizer.named());
    if (!chat.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": its chat template: ", chat.status().message()));
    }
    text->chat_template = *std::move(chat);
  }
  if (!text->tokenizer && !text->chat_template) return nullptr;
  std::lock_guard lock(mutex_);
  std::weak_ptr<const AdapterText>& known = known_[key];
  if (auto faster = known.lock()) return faster;
  known = text;
  return text;
}

ModelText TextOf(const ModelText& base, const Adapter* adapter) {
  ModelText text = base;
  if (adapter == nullptr) return text;
  if (adapter->vocab > 0) text.vocab_size = adapter->vocab;
  const auto* own = static_cast<const OwnText*>(adapter->text.get());
  if (own == nullptr) return text;
  text.owner = adapter->text;
  if (own->chat_template) text.chat_template = own->chat_template.get();
  if (!own->tokenizer) return text;
  text.tokenizer = own->tokenizer.get();
  text.grammars = own->grammars.get();
  text.eos_ids = &own->eos_ids;
  return text;
}

}  // namespace lorikeet
