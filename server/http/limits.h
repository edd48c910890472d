// The bounds of the HTTP port.
#pragma once

#include <cstdint>

namespace lorikeet {

struct HttpLimits {
  uint32_t header_bytes = 32 << 10;
  uint64_t body_bytes = 16 << 20;
  int64_t bodies_bytes = 256 << 20;  // of all requests that are being read
  int32_t connections = 16384;
  int32_t handshake_s = 10;  // for TLS; one that is not done has 90 KiB
  int32_t read_s = 60;   // for a whole request, and between two
  int32_t write_s = 60;  // for a piece to leave
};

}  // namespace lorikeet
