#include "tests/fuzz/texts.h"

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/base/check.h"
#include "engine/tensor/gguf.h"
#include "server/text/chat_template.h"
#include "server/text/detokenizer.h"
#include "server/text/gguf_tokenizer.h"
#include "server/text/tokenizer.h"
#include "server/text/utf8.h"
#include "tests/unit/text_golden.h"

namespace lorikeet::testing {
namespace {

std::string_view Text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void CheckRefusal(const absl::Status& status) {
  LK_CHECK_MSG(status.ok() || absl::IsInvalidArgument(status) || absl::IsDataLoss(status),
               status.ToString());
  LK_CHECK_MSG(status.ok() || !status.message().empty(), "no message");
}

void CheckTokenizer(const Tokenizer& tokenizer) {
  for (const auto& token : {tokenizer.named().bos, tokenizer.named().eos, tokenizer.named().unk,
                            tokenizer.named().pad}) {
    LK_CHECK(!token || token->id >= 0);
  }
  const auto ids = tokenizer.Encode("Hello \xE4\xB8\x96 1", /*add_special=*/true);
  if (!ids.ok()) return;  // no token for some byte of it
  for (const int32_t id : *ids) LK_CHECK(id >= 0 && id < tokenizer.vocab_size());
  const auto text = tokenizer.Decode(*ids, /*skip_special=*/false);
  LK_CHECK(!text.ok() || ValidateUtf8(*text, "text").ok());
}

void GgufTokenizerText(std::span<const std::byte> bytes) {
  const auto content = ParseGguf(bytes, "fuzz");
  if (!content.ok()) return CheckRefusal(content.status());
  const auto spec = ReadGgufTokenizerSpec(content->metadata);
  if (!spec.ok()) return CheckRefusal(spec.status());
  const auto tokenizer = Tokenizer::FromGguf(*spec);
  if (!tokenizer.ok()) return CheckRefusal(tokenizer.status());
  const auto vocabulary = static_cast<int32_t>(spec->tokens.size());
  for (const int32_t id : (*tokenizer)->end_ids()) LK_CHECK(id >= 0 && id < vocabulary);
  CheckTokenizer(**tokenizer);
}

void TokenizerFilesText(std::string_view config) {
  static const std::string* json = new std::string(ReadJson(kTokenizerGoldens / "llama2" /
                                                            "tokenizer.json").dump());
  const auto tokenizer = Tokenizer::FromFiles(
      {{"tokenizer.json", *json}, {"tokenizer_config.json", std::string(config)}}, "fuzz");
  if (!tokenizer.ok()) return CheckRefusal(tokenizer.status());
  CheckTokenizer(**tokenizer);
  const ChatTemplateSource& source = (*tokenizer)->chat_template();
  if (!source.text.empty()) CheckRefusal(ChatTemplate::Create(source, {}).status());
}

void ChatTemplateText(std::string_view input) {
  const size_t zero = std::min(input.find('\0'), input.size());
  const ChatTemplateSource source{.text = std::string(input.substr(0, zero)), .with_tools = {}};
  const auto chat = ChatTemplate::Create(source, {});
  if (!chat.ok()) return CheckRefusal(chat.status());
  ChatRequest request{.messages_json = R"([{"role":"user","content":"hi"}])"};
  if (zero < input.size()) request.messages_json = input.substr(zero + 1);
  // What the door lets in is UTF-8.
  if (!ValidateUtf8(request.messages_json, "messages").ok()) return;
  const auto text = (*chat)->Render(request);
  CheckRefusal(text.status());
  if (text.ok()) LK_CHECK(ValidateUtf8(*text, "text").ok());
}

void TokensText(std::span<const std::byte> bytes) {
  static const auto* tokenizers = [] {
    auto* all = new std::vector<std::unique_ptr<Tokenizer>>;
    for (const char* name : {"llama2", "gpt2"}) {
      auto tokenizer = GoldenTokenizer(name, "directory");
      LK_CHECK_MSG(tokenizer.ok(), tokenizer.status().ToString());
      all->push_back(*std::move(tokenizer));
    }
    return all;
  }();
  for (const auto& tokenizer : *tokenizers) {
    std::vector<int32_t> ids;
    for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
      const int32_t id = std::to_integer<int32_t>(bytes[i]) * 256 +
                         std::to_integer<int32_t>(bytes[i + 1]);
      ids.push_back(id % tokenizer->vocab_size());
    }
    for (const bool skip_special : {false, true}) {
      Detokenizer stream(*tokenizer, skip_special, Detokenizer::Start::kText);
      std::string text;
      for (const int32_t id : ids) {
        std::string piece;
        stream.Append(id, &piece);
        LK_CHECK(ValidateUtf8(piece, "piece").ok());
        text += piece;
      }
      stream.Finish(&text);
      const auto whole = tokenizer->Decode(ids, skip_special);
      LK_CHECK_MSG(whole.ok() && *whole == text, text);
    }
  }
}

}  // namespace

void FuzzText(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  const std::span<const std::byte> input = bytes.subspan(1);
  switch (static_cast<TextReader>(bytes[0])) {
    case TextReader::kGgufTokenizer:
      return GgufTokenizerText(input);
    case TextReader::kTokenizerFiles:
      return TokenizerFilesText(Text(input));
    case TextReader::kChatTemplate:
      return ChatTemplateText(Text(input));
    case TextReader::kTokens:
      return TokensText(input);
  }
}

}  // namespace lorikeet::testing
