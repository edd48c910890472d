// How full a device's memory is.
#pragma once

#include <cstdint>

namespace lorikeet {

struct MemoryUse {
  int64_t used = 0;   // bytes, whoever uses them
  int64_t total = 0;  // 0: the device has no memory of its own
};

}  // namespace lorikeet
