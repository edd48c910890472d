#include "server/text/utf8.h"

#include "absl/strings/str_cat.h"

namespace lorikeet {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

enum class Kind { kCharacter, kInvalid, kUnfinished };

struct Step {
  Kind kind;
  size_t size;  // bytes of the character, or of the maximal invalid part, or all that is left
};

// The range of the second byte, by the first one (Unicode standard, table 3-7).
struct SecondByte {
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
};

SecondByte AllowedAfter(uint8_t first) {
  switch (first) {
    case 0xE0:
      return {0xA0, 0xBF};
    case 0xED:
      return {0x80, 0x9F};
    case 0xF0:
      return {0x90, 0xBF};
    case 0xF4:
      return {0x80, 0x8F};
    default:
      return {};
  }
}

size_t CharacterSize(uint8_t first) {
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return 2;
  if (first >= 0xE0 && first <= 0xEF) return 3;
  if (first >= 0xF0 && first <= 0xF4) return 4;
  return 0;  // a continuation byte, or one that never occurs
}

// What `text` begins with. REQUIRES: not empty.
Step Next(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const size_t size = CharacterSize(byte(0));
  if (size == 0) return {Kind::kInvalid, 1};
  for (size_t i = 1; i < size; ++i) {
    if (i == text.size()) return {Kind::kUnfinished, i};
    const SecondByte allowed = i == 1 ? AllowedAfter(byte(0)) : SecondByte{};
    if (byte(i) < allowed.low || byte(i) > allowed.high) return {Kind::kInvalid, i};
  }
  return {Kind::kCharacter, size};
}

}  // namespace

absl::Status ValidateUtf8(std::string_view text, std::string_view what) {
  for (size_t at = 0; at < text.size();) {
    const Step step = Next(text.substr(at));
    if (step.kind != Kind::kCharacter) {
      return absl::InvalidArgumentError(absl::StrCat(absl::string_view(what.data(), what.size()),
                                                     " is not valid UTF-8 at byte ", at));
    }
    at += step.size;
  }
  return absl::OkStatus();
}

void Utf8Repairer::Append(std::string_view bytes, std::string* text) {
  if (!pending_.empty()) {
    pending_.append(bytes);
    bytes = pending_;
  }
  size_t at = 0;
  while (at < bytes.size()) {
    const Step step = Next(bytes.substr(at));
    if (step.kind == Kind::kUnfinished) break;
    text->append(step.kind == Kind::kCharacter ? bytes.substr(at, step.size) : kReplacement);
    at += step.size;
  }
  pending_ = std::string(bytes.substr(at));  // a copy first: `bytes` may be pending_ itself
}

void Utf8Repairer::Finish(std::string* text) {
  if (!pending_.empty()) text->append(kReplacement);
  pending_.clear();
}

}  // namespace lorikeet
