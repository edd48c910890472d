#include <cstdint>

#include "tests/fuzz/requests.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lorikeet::testing::FuzzHttp({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
