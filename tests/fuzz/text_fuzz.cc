#include <cstdint>

#include "tests/fuzz/texts.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lorikeet::testing::FuzzText({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
