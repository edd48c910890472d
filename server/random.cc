#include "server/random.h"

#include <random>

namespace lorikeet {

uint64_t RandomSeed() {
  thread_local std::mt19937_64 generator(std::random_device{}());
  return generator();
}

std::string RandomHex(int digits) {
  thread_local std::random_device device;
  std::string text;
  while (static_cast<int>(text.size()) < digits) {
    const uint32_t bits = device();
    for (int shift = 0; shift < 32; shift += 4) text += "0123456789abcdef"[bits >> shift & 15];
  }
  text.resize(digits);
  return text;
}

}  // namespace lorikeet
