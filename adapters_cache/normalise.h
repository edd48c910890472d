// RawAdapter + BaseModel -> Adapter: the one form that kernels see.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "adapters_cache/formats/raw_adapter.h"
#include "adapters_cache/shared_blobs.h"
#include "engine/api/adapter.h"
#include "engine/api/base_model.h"

namespace lorikeet {

// What the factors of a low-rank pair are stored in.
enum class FactorPrecision : uint8_t {
  kFile,  // as in the file: results differ from PEFT in fp32 by summation order alone
  kBF16,  // bfloat16, rounded once: half the bytes of an fp32 file
};

struct NormaliseOptions {
  FactorPrecision precision = FactorPrecision::kFile;
  bool allow_dense = false;  // deltas as large as the base's weights
  // Adapters are used where the host has them, which is to say on the CPU: with gates or routers, and
  // with ranks of shared factors mixed.
  bool on_host = true;
  std::shared_ptr<const AdapterText> text = nullptr;  // Adapter::text
  SharedBlobs* blobs = nullptr;  // of what adapters have in common; nullptr: each has its own
  std::vector<std::string>* warnings = nullptr;  // gets what a load has to say of values; nullptr: nobody asks
};

// Loader thread: copies every factor and, for DoRA, reads each adapted weight of `base` once.
//
// NOT_FOUND: modules of the file that the base does not have, or modules the configuration targets
// that have no tensors, listed. INVALID_ARGUMENT: a shape that does not fit (module, tensor, found,
// expected), a rank over Limits::kMaxAdapterRank, a value that is not finite (tensor and index) or
// that overflows in the precision asked for, a tensor that the variant does not use.
// RESOURCE_EXHAUSTED: a dense delta without allow_dense.
absl::StatusOr<std::shared_ptr<const Adapter>> Normalise(const RawAdapter& raw,
                                                         const BaseModel& base,
                                                         const NormaliseOptions& options);

}  // namespace lorikeet
