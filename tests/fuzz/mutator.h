// Damages copies of valid files, the same way for the same seed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <random>
#include <string>

#include "tests/support/checkpoint_bytes.h"

namespace lorikeet::testing {

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  std::string Mutate(std::string file) {
    const int edits = 1 + Below(4);
    for (int i = 0; i < edits && !file.empty(); ++i) Edit(file);
    return file;
  }

 private:
  uint32_t Below(size_t bound) { return static_cast<uint32_t>(random_() % bound); }

  void Edit(std::string& file) {
    const size_t at = Below(file.size());
    const size_t length = std::min<size_t>(1 + Below(16), file.size() - at);
    switch (Below(7)) {
      case 0:
        file[at] ^= static_cast<char>(1 << Below(8));
        break;
      case 1:
        file[at] = static_cast<char>(Below(256));
        break;
      case 2:
        file.resize(at);
        break;
      case 3:
        file.erase(at, length);
        break;
      case 4:
        file.insert(at, file.substr(Below(file.size()), length));
        break;
      case 5:
        file.replace(at, std::min<size_t>(8, file.size() - at), Extreme());
        break;
      default:
        file[at] = "0123456789[]{},:\"-.e"[Below(20)];
        break;
    }
  }

  std::string Extreme() {
    static constexpr uint64_t kValues[] = {0,          1,          0x7fffffff, 0xffffffff,
                                           1ull << 32, 1ull << 61, 1ull << 62, ~0ull >> 1,
                                           1ull << 63, ~0ull,      ~0ull - 31, 13};
    return Raw(kValues[Below(std::size(kValues))]);
  }

  std::mt19937 random_;
};

}  // namespace lorikeet::testing
