// UTF-8 (RFC 3629) at the door and in streams of bytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace lorikeet {

// OK, or INVALID_ARGUMENT: "<what> is not valid UTF-8 at byte <offset>", the offset being that of
// the first byte which begins no character.
absl::Status ValidateUtf8(std::string_view text, std::string_view what);

// Turns bytes that arrive in pieces into valid UTF-8 text. Every maximal invalid part becomes one
// U+FFFD (the Unicode standard's practice, section 3.9); a character is passed on when its last
// byte is there, so the text never ends in the middle of one. Not thread-safe.
class Utf8Repairer {
 public:
  // Appends to *text what `bytes` completes.
  void Append(std::string_view bytes, std::string* text);
  // The end of the stream: an unfinished character becomes U+FFFD.
  void Finish(std::string* text);

 private:
  std::string pending_;  // the beginning of a character
};

}  // namespace lorikeet
