#include "tests/support/model_harness.h"
#include "tests/support/test_device.h"

namespace lorikeet {

const char* const kTestDevice = "cpu";

absl::StatusOr<std::unique_ptr<Backend>> MakeTestBackend(const BackendOptions& options) {
  return MakeCpuBackend(options);
}

}  // namespace lorikeet
