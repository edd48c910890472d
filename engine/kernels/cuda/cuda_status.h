// CUDA's errors as Status.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

namespace lorikeet::cuda {

// "what: cudaErrorX (its text)"; RESOURCE_EXHAUSTED for memory, else INTERNAL.
absl::Status ToStatus(cudaError_t error, const char* what);

// The first failure of a backend: device calls report here and go on, and whoever needs a result
// asks. After a failure nothing on the device means anything.
class FirstError {
 public:
  void Note(cudaError_t error, const char* what) {
    if (error != cudaSuccess && status_.ok()) status_ = ToStatus(error, what);
  }
  void Note(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  const absl::Status& status() const { return status_; }

 private:
  absl::Status status_;
};

}  // namespace lorikeet::cuda
