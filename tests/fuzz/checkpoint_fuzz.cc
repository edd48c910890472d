#include <cstdint>

#include "tests/fuzz/parsers.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lorikeet::testing::FuzzCheckpoint({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
