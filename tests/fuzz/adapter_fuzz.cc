#include <cstdint>

#include "tests/fuzz/adapters.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lorikeet::testing::FuzzAdapterFiles({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
