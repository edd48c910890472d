// Stands in for the folder cuda/ in a build without it.
#include "absl/status/status.h"
#include "engine/kernels/backend.h"

namespace lorikeet {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const BackendOptions&) {
  return absl::FailedPreconditionError("this build has no CUDA backend; the preset cuda makes one that has");
}

}  // namespace lorikeet
