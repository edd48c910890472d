// JSON schemas, regular expressions and grammars as constraints on an answer's tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/api/token_constraint.h"
#include "server/text/tokenizer.h"

struct LkGrammars;  // server/text/rust/lorikeet_text.h

namespace lorikeet {

struct GrammarSource {
  enum class Kind : uint8_t {
    kJsonSchema,  // text: the schema
    kJsonObject,  // any JSON object; text is not used
    kRegex,       // of the whole answer, in the syntax of Rust's regex crate
    kLark,        // a grammar in llguidance's variant of Lark
  };
  Kind kind = Kind::kJsonSchema;
  std::string text;
};

// An expression that matches one of the texts and nothing else. REQUIRES: not empty.
GrammarSource ChoiceGrammar(std::span<const std::string> choices);

// A model's tokens, ready for any number of grammars. Immutable and thread-safe.
class Grammars {
 public:
  // `vocab`: rows of logits, at least the tokenizer's vocabulary; `end_ids`: what ends an answer,
  // at least one. INVALID_ARGUMENT if they do not fit.
  static absl::StatusOr<std::unique_ptr<Grammars>> Create(const Tokenizer& tokenizer, int32_t vocab,
                                                          std::span<const int32_t> end_ids);

  // INVALID_ARGUMENT: what cannot be compiled, and why.
  absl::StatusOr<std::unique_ptr<TokenConstraint>> Compile(const GrammarSource& source) const;

 private:
  struct Free {
    void operator()(LkGrammars* grammars) const;
  };
  explicit Grammars(LkGrammars* grammars) : grammars_(grammars) {}

  std::unique_ptr<LkGrammars, Free> grammars_;
};

}  // namespace lorikeet
