// Moving bytes between C++ and the Rust library; for the .cc files of server/text alone.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "server/text/rust/lorikeet_text.h"

namespace lorikeet::rust {

inline const uint8_t* Data(std::string_view text) {
  return reinterpret_cast<const uint8_t*>(text.data());
}

// Copies and frees.
inline std::string TakeString(LkBytes bytes) {
  std::string text(reinterpret_cast<const char*>(bytes.data), bytes.size);
  lk_bytes_free(bytes);
  return text;
}

}  // namespace lorikeet::rust
