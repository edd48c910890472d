#include "server/text/grammar.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/text/rust/lorikeet_text.h"
#include "server/text/rust_bytes.h"

namespace lorikeet {
namespace {

std::string_view KindName(GrammarSource::Kind kind) {
  switch (kind) {
    case GrammarSource::Kind::kJsonSchema:
      return "json_schema";
    case GrammarSource::Kind::kJsonObject:
      return "json_object";
    case GrammarSource::Kind::kRegex:
      return "regex";
    case GrammarSource::Kind::kLark:
      return "lark";
  }
  return "";
}

class GrammarConstraint final : public TokenConstraint {
 public:
  explicit GrammarConstraint(LkMatcher* matcher) : matcher_(matcher) {}

  std::unique_ptr<TokenConstraint> Clone() const override {
    return std::make_unique<GrammarConstraint>(lk_matcher_clone(matcher_.get()));
  }

  absl::Status Allowed(std::span<uint32_t> allowed) override {
    LkBytes error;
    if (lk_matcher_mask(matcher_.get(), allowed.data(), allowed.size(), &error)) {
      return absl::OkStatus();
    }
    return CannotGoOn(error);
  }

  absl::Status Accept(int32_t token) override {
    LkBytes error;
    if (lk_matcher_accept(matcher_.get(), static_cast<uint32_t>(token), &error)) {
      return absl::OkStatus();
    }
    return CannotGoOn(error);
  }

  bool finished() const override { return lk_matcher_stopped(matcher_.get()); }

 private:
  // A form that takes more work at some token than one may.
  static absl::Status CannotGoOn(const LkBytes& error) {
    return absl::InvalidArgumentError(
        absl::StrCat("the answer's form: ", rust::TakeString(error)));
  }
  struct Free {
    void operator()(LkMatcher* matcher) const { lk_matcher_free(matcher); }
  };
  std::unique_ptr<LkMatcher, Free> matcher_;
};

}  // namespace

GrammarSource ChoiceGrammar(std::span<const std::string> choices) {
  std::string pattern;
  for (const std::string& choice : choices) {
    absl::StrAppend(&pattern, pattern.empty() ? "" : "|");
    for (const char c : choice) {
      if (std::string_view("\\.+*?()|[]{}^$#&-~/").find(c) != std::string_view::npos) pattern += '\\';
      pattern += c;
    }
  }
  return {GrammarSource::Kind::kRegex, pattern};
}

void Grammars::Free::operator()(LkGrammars* grammars) const { lk_grammars_free(grammars); }

absl::StatusOr<std::unique_ptr<Grammars>> Grammars::Create(const Tokenizer& tokenizer,
                                                           int32_t vocab,
                                                           std::span<const int32_t> end_ids) {
  const TokenPieces& pieces = tokenizer.pieces();
  if (vocab < pieces.count()) {
    return absl::InvalidArgumentError(absl::StrCat("the model has ", vocab,
                                                   " rows of logits for a vocabulary of ",
                                                   pieces.count(), " tokens"));
  }
  const std::vector<uint32_t> ends(end_ids.begin(), end_ids.end());
  LkGrammars* grammars = nullptr;
  LkBytes error;
  if (!lk_grammars_create(rust::Data(pieces.bytes), pieces.begin.data(), pieces.flags.data(),
                          pieces.flags.size(), static_cast<size_t>(vocab), ends.data(), ends.size(),
                          &grammars, &error)) {
    return absl::InvalidArgumentError(rust::TakeString(error));
  }
  return std::unique_ptr<Grammars>(new Grammars(grammars));
}

absl::StatusOr<std::unique_ptr<TokenConstraint>> Grammars::Compile(
    const GrammarSource& source) const {
  const std::string_view kind = KindName(source.kind);
  LkMatcher* matcher = nullptr;
  LkBytes error;
  if (!lk_matcher_create(grammars_.get(), rust::Data(kind), kind.size(), rust::Data(source.text),
                         source.text.size(), &matcher, &error)) {
    return absl::InvalidArgumentError(rust::TakeString(error));
  }
  return std::make_unique<GrammarConstraint>(matcher);
}

}  // namespace lorikeet
