// Lowered -> ModuleDelta: values in the precision and layout that kernels read, in blocks that the
// adapter owns. Linears may be packed by several threads at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/formats/lowered.h"
#include "adapters_cache/normalise.h"
#include "engine/api/adapter.h"

namespace lorikeet {

bool IsShared(const LoweredPair& pair);
// The pair without anything shared or beside it, which stands beside shared factors alone.
void Fold(LinearShape shape, LoweredPair* pair);

class Packer {
 public:
  Packer(const NormaliseOptions& options, Adapter* adapter) : options_(options), adapter_(adapter) {}

  // INVALID_ARGUMENT: a rank over Limits::kMaxAdapterRank, or a value that is not finite in the
  // precision asked for. `path` begins every message. REQUIRES: of several pairs none is shared.
  absl::Status Module(const std::string& path, Lowered lowered, ModuleDelta* delta);

  // Once, after everything. RESOURCE_EXHAUSTED: dense deltas without allow_dense, with the bytes that
  // all of them take.
  absl::Status Finish() const;

  const float* Floats(const std::vector<float>& values);
  const int32_t* Integers(const std::vector<int32_t>& values);
  absl::Status Rows(const std::string& name, const Matrix2& rows, DenseRows* out);

 private:
  std::byte* Take(int64_t bytes);
  absl::Status Pairs(const std::string& path, std::vector<LoweredPair> pairs, LowRank* out);
  absl::Status Share(const std::string& path, LoweredPair* pair, LowRank* out);
  absl::StatusOr<const std::byte*> Factor(const std::shared_ptr<const Matrix2>& shared, int64_t stride,
                                          const LowRank& pair,
                                          const std::function<absl::Status(std::byte*)>& store);
  absl::Status StoreA(const std::string& path, const Matrix2& a, const LowRank& out, std::byte* to) const;
  absl::Status StoreB(const std::string& path, const Matrix2& b, const LowRank& out, std::byte* to) const;
  float LargestOf(const std::shared_ptr<const Matrix2>& shared);
  const std::byte* Keep(std::shared_ptr<const AlignedBuffer> block, bool shared);
  absl::Status Dense(const std::string& path, const Lowered& lowered, DenseRows* out);
  absl::Status Store(const std::string& name, DType dtype, const float* values, int64_t count,
                     std::byte* to) const;
  DType dtype() const {
    return options_.precision == FactorPrecision::kBF16 ? DType::kBF16 : DType::kF32;
  }

  struct PackedFactor {
    std::mutex mutex;
    std::weak_ptr<const Matrix2> factor;  // while it is there, no other has its address
    const std::byte* data = nullptr;
    float largest = -1;  // magnitude; -1: not known
  };
  PackedFactor& PackedOf(const Matrix2& factor);
  void NoteRank(int32_t rank);

  const NormaliseOptions options_;
  std::mutex mutex_;  // what follows; of the adapter what is not one linear's
  Adapter* const adapter_;
  std::map<const Matrix2*, PackedFactor> packed_;
  int64_t refused_dense_bytes_ = 0;
};

}  // namespace lorikeet
