#include "server/say.h"

#include <cstdio>

namespace lorikeet {

void Say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

}  // namespace lorikeet
