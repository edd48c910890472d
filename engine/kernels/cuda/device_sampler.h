// One token a row of logits, on the device: engine/kernels/sampler.h's results but for what the
// order of a sum's terms can move. One copy there, two launches (five with penalties), one copy
// back.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "engine/kernels/args.h"
#include "engine/kernels/cuda/cuda_status.h"
#include "engine/kernels/cuda/sample.h"
#include "engine/kernels/cuda/sample_plan.h"

namespace lorikeet::cuda {

class DeviceSampler {
 public:
  DeviceSampler(FirstError* errors, cudaStream_t stream) : errors_(errors), stream_(stream) {}
  ~DeviceSampler();
  DeviceSampler(const DeviceSampler&) = delete;
  DeviceSampler& operator=(const DeviceSampler&) = delete;

  // Takes memory for batches of `rows` now, while there is some; histories under penalties may still
  // need more.
  void Prepare(int64_t rows, int64_t vocab);

  // Row i of `logits` [rows, vocab] float32 belongs to rows[i]. Fills `out` and returns when all
  // before it on the stream is done. The logits are left as they were, but penalties change them
  // meanwhile. Nothing is filled after an error. REQUIRES: vocab <= kChunk * kMaxChunks.
  void Sample(Matrix logits, std::span<const LogitRow> rows, std::span<SampledToken> out);

  // Sample in parts, for measurements. Launch works on the rows sent last.
  void Send(Matrix logits, std::span<const LogitRow> rows);
  void Launch(Matrix logits, cudaStream_t stream);
  void Receive(std::span<const LogitRow> rows, std::span<SampledToken> out);

 private:
  // Grows with what is asked of it; contents are lost then.
  struct Block {
    std::byte* data = nullptr;
    int64_t bytes = 0;
  };

  void Reserve(int64_t bytes, Block* device, Block* host);
  void PlaceArrays(int64_t rows, int64_t vocab);

  FirstError* const errors_;
  const cudaStream_t stream_;
  SamplePlan plan_;
  Block input_, host_input_;    // raw jobs, penalised jobs, seen tokens
  Block output_, host_output_;  // results, tops
  Block work_;                  // chunks, saved logits
  SampleChunks chunks_;
  SampleOutput out_;
  const SampleJob* raw_ = nullptr;
  const SampleJob* penalized_ = nullptr;
  const SeenToken* seen_ = nullptr;
  float* saved_ = nullptr;
};

}  // namespace lorikeet::cuda
