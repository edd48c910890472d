// Text to token ids and back, equal to Hugging Face's `tokenizers` library (which does the work).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/text/gguf_tokenizer.h"

struct LkTokenizer;  // server/text/rust/lorikeet_text.h

namespace lorikeet {

// A token with a role. `text` is how the vocabulary writes it.
struct NamedToken {
  int32_t id;
  std::string text;
};

struct NamedTokens {
  std::optional<NamedToken> bos, eos, unk, pad;
};

// Jinja sources; empty: the model brings none. `with_tools` replaces `text` where a request names
// tools and the model has a template of its own for that.
struct ChatTemplateSource {
  std::string text;
  std::string with_tools;
};

// Contents of the files of a Hugging Face directory by their names in it.
using TokenizerFiles = std::map<std::string, std::string, std::less<>>;

// What each id contributes to the text: the rules of the tokenizer's decoder, tabulated.
struct TokenPieces {
  enum class Join {
    kBytes,         // concatenate, then read as UTF-8 with U+FFFD for each maximal invalid part
    kByteFallback,  // text, but for single bytes; a run of those that is not UTF-8 as a whole
                    // becomes one U+FFFD a byte
  };
  static constexpr uint8_t kExists = 1;
  static constexpr uint8_t kSpecial = 2;
  static constexpr uint8_t kByte = 4;  // a byte-fallback token

  std::string bytes;
  std::vector<uint32_t> begin;  // [count + 1]
  std::vector<uint8_t> flags;   // [count]
  Join join = Join::kBytes;
  std::string strip;  // up to strip_max of this character go from the start of the text
  uint32_t strip_max = 0;
  uint32_t longest = 0;  // the most bytes of a text that become one token; 0: any number may

  int32_t count() const { return static_cast<int32_t>(flags.size()); }
  bool has(int32_t id, uint8_t flag) const {
    return id >= 0 && id < count() && (flags[id] & flag) != 0;
  }
  // REQUIRES: 0 <= id < count().
  std::string_view piece(int32_t id) const {
    return std::string_view(bytes).substr(begin[id], begin[id + 1] - begin[id]);
  }
};

// Immutable and thread-safe.
class Tokenizer {
 public:
  // A Hugging Face directory: tokenizer.json, and where they are there tokenizer_config.json,
  // special_tokens_map.json, generation_config.json, config.json, chat_template.jinja or .json and
  // additional_chat_templates/. What goes around a text is up to tokenizer.json alone:
  // add_bos_token and add_eos_token of tokenizer_config.json count for nothing, as in
  // Transformers 5. clean_up_tokenization_spaces is not applied: it would change text that is
  // streamed already. NOT_FOUND: no tokenizer.json; INVALID_ARGUMENT: a file that does not parse,
  // by name.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromDirectory(
      const std::filesystem::path& directory);
  // The same of contents; `where` is what messages put before a file's name.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromFiles(const TokenizerFiles& files,
                                                              std::string_view where);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromGguf(const GgufTokenizerSpec& spec);

  // The chat templates of such files without the rest.
  static absl::StatusOr<ChatTemplateSource> TemplatesOf(const TokenizerFiles& files,
                                                        std::string_view where);

  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // `add_special`: apply the tokenizer's own template (BOS, for most models): true for plain text,
  // false for a rendered chat template, which writes its special tokens itself. Special tokens
  // written in the text become those tokens either way. INVALID_ARGUMENT: not UTF-8.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special) const;

  // The text of a whole sequence; ids that do not exist are skipped. A stream of tokens is decoded
  // by Detokenizer.
  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids, bool skip_special) const;

  std::optional<int32_t> TokenToId(std::string_view token) const;
  std::optional<std::string> IdToToken(int32_t id) const;  // as the vocabulary writes it

  // Highest id + 1. A model may have more rows than that: its rows are padded.
  int32_t vocab_size() const { return pieces_.count(); }
  bool is_special(int32_t id) const { return pieces_.has(id, TokenPieces::kSpecial); }
  const TokenPieces& pieces() const { return pieces_; }

  const NamedTokens& named() const { return named_; }
  // Tokens that end a generation, sorted: the EOS token and those the model's files add to it.
  const std::vector<int32_t>& end_ids() const { return end_ids_; }
  const ChatTemplateSource& chat_template() const { return chat_template_; }

 private:
  struct Free {
    void operator()(LkTokenizer* tokenizer) const;
  };

  Tokenizer() = default;
  // Parses a tokenizer.json and fills rust_ and pieces_.
  absl::Status Init(std::string_view tokenizer_json);
  // The token if the vocabulary has it.
  std::optional<NamedToken> Named(std::string_view text) const;

  std::unique_ptr<LkTokenizer, Free> rust_;
  TokenPieces pieces_;
  NamedTokens named_;
  std::vector<int32_t> end_ids_;
  ChatTemplateSource chat_template_;
};

}  // namespace lorikeet
