// write_seeds DIR: the goldens as libFuzzer takes them, DIR/TARGET/NAME.
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "tests/fuzz/seeds.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "write_seeds DIR\n");
    return 2;
  }
  for (const auto& [target, inputs] : lorikeet::testing::GoldenSeeds()) {
    const std::filesystem::path directory = std::filesystem::path(argv[1]) / target;
    std::filesystem::create_directories(directory);
    for (const auto& [name, input] : inputs) {
      std::ofstream file(directory / name, std::ios::binary);
      if (!(file << input)) {
        std::fprintf(stderr, "write_seeds: cannot write %s\n", (directory / name).c_str());
        return 1;
      }
    }
  }
}
