// A normalised adapter: what every checkpoint format becomes at load, and all that kernels see.
//
// Per linear, for a row x (width in) of the batch, with base result z = x Wᵀ:
//     y = out_scale ∘ (z + scale · (x Aᵀ) Bᵀ) + base bias + bias
// in that order, each part optional. LoRA and rsLoRA fill the low-rank part; DoRA adds
// out_scale = m / ‖W + s·B·A‖row (Liu et al. 2024). Immutable once loaded; shared by reference
// count through AdapterLease.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/api/module.h"
#include "engine/base/aligned_buffer.h"
#include "engine/base/dtype.h"

namespace lorikeet {

// A rank-r pair. Both factors are stored by rank row, so that a rank is one contiguous run: row k
// of `a` is row k of A, row k of `b` is column k of B. Rows start 64-byte aligned.
struct LowRank {
  int32_t rank = 0;              // 0: no low-rank part
  DType dtype = DType::kBF16;    // of a and b: kF32, kF16 or kBF16
  float scale = 1.0f;            // applied to x Aᵀ in float
  const std::byte* a = nullptr;  // [rank, in],  row stride a_stride elements
  const std::byte* b = nullptr;  // [rank, out], row stride b_stride elements
  int64_t a_stride = 0;
  int64_t b_stride = 0;
};

struct ModuleDelta {
  LowRank low_rank;
  const float* out_scale = nullptr;  // [out] or nullptr
  const float* bias = nullptr;       // [out] or nullptr

  bool empty() const { return low_rank.rank == 0 && !out_scale && !bias; }
};

struct Adapter {
  // Of this object alone, in this process: what copies elsewhere are known by.
  const uint64_t serial = NextSerial();
  std::string version;               // lower-case hex SHA-256 of configuration and tensors
  std::string variant;               // "lora", "rslora", "dora", ...: for people
  // Keys and values depend on nothing but tokens and version: they can be used again.
  bool cacheable = true;
  int32_t max_rank = 0;
  int64_t bytes = 0;                 // of `storage`
  std::vector<ModuleDelta> modules;  // [ModuleCount(layers)], by ModuleId
  AlignedBuffer storage;             // owns everything the deltas point to

 private:
  static uint64_t NextSerial() {
    static std::atomic<uint64_t> next{1};
    return next.fetch_add(1, std::memory_order_relaxed);
  }
};

// Rows [row_begin, row_end) of a step use `adapter`. Base rows have no segment.
struct AdapterSegment {
  int32_t row_begin = 0;
  int32_t row_end = 0;
  const Adapter* adapter = nullptr;
};

}  // namespace lorikeet
