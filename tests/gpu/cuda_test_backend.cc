#include "tests/support/model_harness.h"
#include "tests/support/test_device.h"

namespace lorikeet {

const char* const kTestDevice = "cuda";

absl::StatusOr<std::unique_ptr<Backend>> MakeTestBackend(const BackendOptions& options) {
  return MakeCudaBackend(options);
}

}  // namespace lorikeet
