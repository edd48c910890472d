// Owned, 64-byte aligned, zero-initialised memory. Move-only. Large buffers come straight from the
// kernel: untouched pages cost nothing, and huge pages are asked for.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "engine/base/check.h"

namespace lorikeet {

class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kMapBytes = 1 << 20;  // from here on mapped, not allocated

  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    data_ = bytes >= kMapBytes ? Map(bytes) : Allocate(bytes);
  }

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }
  template <typename T>
  T* as() { return reinterpret_cast<T*>(data_.get()); }
  template <typename T>
  const T* as() const { return reinterpret_cast<const T*>(data_.get()); }

 private:
  struct Release {
    Release() : mapped(0) {}
    explicit Release(size_t mapped_bytes) : mapped(mapped_bytes) {}
    size_t mapped;  // 0: allocated
    void operator()(std::byte* p) const {
      if (mapped > 0) munmap(p, mapped);
      else std::free(p);
    }
  };
  using Memory = std::unique_ptr<std::byte, Release>;

  static Memory Map(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    LK_CHECK_MSG(p != MAP_FAILED, "out of host memory");
    madvise(p, bytes, MADV_HUGEPAGE);  // a hint: refusal changes nothing
    return Memory(static_cast<std::byte*>(p), Release(bytes));
  }

  static Memory Allocate(size_t bytes) {
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* p = std::aligned_alloc(kAlignment, rounded);
    LK_CHECK_MSG(p != nullptr, "out of host memory");
    std::memset(p, 0, rounded);
    return Memory(static_cast<std::byte*>(p), Release());
  }

  Memory data_;
  size_t size_ = 0;
};

}  // namespace lorikeet
