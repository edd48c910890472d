// The page at /, part of the binary.
#pragma once

#include <string_view>

namespace lorikeet {

struct WebFile {
  std::string_view path;  // "/web/page.css"
  const char* content_type;
  std::string_view content;
};

extern const WebFile kWebFiles[3];

}  // namespace lorikeet
