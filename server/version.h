// The release this source tree is.
#pragma once

namespace lorikeet {

inline constexpr char kVersion[] = LORIKEET_VERSION;  // from the project's CMake version

}  // namespace lorikeet
