// Whether GCC's sanitizers watch memory: they keep what is freed for a while, and more beside what is not, so
// that measures of memory mean nothing.
#pragma once

namespace lorikeet {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace lorikeet
