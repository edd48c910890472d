// Loops whose index is a constant in every turn. Arrays of vectors indexed by it become registers;
// with an ordinary loop GCC keeps them in memory even after unrolling.
#pragma once

#include <utility>

#define LK_INLINE __attribute__((always_inline))

namespace lorikeet {

template <int kCount, typename Fn>
LK_INLINE inline void Unroll(const Fn& fn) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) LK_INLINE {
    (fn(std::integral_constant<int, kIndex>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

}  // namespace lorikeet
