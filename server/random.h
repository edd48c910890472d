// Random numbers of the server.
#pragma once

#include <cstdint>
#include <string>

namespace lorikeet {

uint64_t RandomSeed();                // good enough to sample with
std::string RandomHex(int digits);  // nobody can foresee it: straight from the operating system

}  // namespace lorikeet
