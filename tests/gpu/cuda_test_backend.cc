#include "tests/support/model_harness.h"

namespace lorikeet {

absl::StatusOr<std::unique_ptr<Backend>> MakeTestBackend(const BackendOptions& options) {
  return MakeCudaBackend(options);
}

}  // namespace lorikeet
