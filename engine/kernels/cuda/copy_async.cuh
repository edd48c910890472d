// Copies from device to shared memory that a thread need not wait for.
#pragma once

#include <cstdint>

namespace lorikeet::cuda {

// 16 bytes; zeros if they are not `there`.
__device__ inline void CopyAsync(void* shared, const void* global, bool there) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes));
}
// The same of what is read once; the whole line of 128 bytes comes nearer, for lanes that ask for the rest of it.
__device__ inline void CopyLineAsync(void* shared, const void* global, bool there) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace lorikeet::cuda
