// LK_CHECK: an invariant of our own code. It stays on in release builds: a broken invariant prints
// one line with file, line and message and aborts. Bad input never reaches a check; it gets an
// absl::Status at the door.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace lorikeet {

[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition,
                                     const std::string& message) {
  std::fprintf(stderr, "%s:%d: check failed: %s %s\n", file, line, condition, message.c_str());
  std::abort();
}

}  // namespace lorikeet

#define LK_CHECK(condition)                                                      \
  do {                                                                           \
    if (!(condition)) [[unlikely]]                                               \
      ::lorikeet::CheckFailed(__FILE__, __LINE__, #condition, std::string());    \
  } while (0)

// `message` is evaluated only on failure.
#define LK_CHECK_MSG(condition, message)                                         \
  do {                                                                           \
    if (!(condition)) [[unlikely]]                                               \
      ::lorikeet::CheckFailed(__FILE__, __LINE__, #condition, (message));        \
  } while (0)
