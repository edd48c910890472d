// A decoder-only transformer on a backend: weights and one forward pass for all families.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/base/aligned_buffer.h"
#include "engine/kernels/backend.h"
#include "engine/model/model_source.h"

namespace lorikeet {

// One step's inputs. T rows, S sequences, L rows whose logits are wanted.
struct StepInput {
  std::span<const int32_t> tokens;     // [T]
  std::span<const int32_t> positions;  // [T]
  std::span<const int32_t> logit_rows;  // [L] ascending rows
  std::span<const AdapterSegment> segments;
  KvView kv;
};

class Model {
 public:
  // `backend` outlives the model. INVALID_ARGUMENT: a width the backend has no kernels for.
  static absl::StatusOr<std::unique_ptr<Model>> Load(std::shared_ptr<const ModelSource> source,
                                                     Backend* backend, int32_t max_rows);

  // Runs all layers, writes K and V of every row, keeps the final hidden states of `logit_rows`.
  // REQUIRES: T <= max_rows.
  void Forward(const StepInput& input);

  // Logits of logit rows [begin, begin + rows) of the last Forward: [rows, vocab], valid until the
  // next call. REQUIRES: rows <= kHeadRows.
  Matrix Logits(int32_t begin, int32_t rows);

  static constexpr int32_t kHeadRows = 32;

 private:
  struct Layer {
    std::unique_ptr<LinearWeight> linear[kLinearsPerLayer];
    std::vector<float> input_norm;      // [D]
    std::vector<float> attention_norm;  // [D]
    std::vector<float> q_norm;          // [head_dim] or empty
    std::vector<float> k_norm;
  };

  Model(std::shared_ptr<const ModelSource> source, Backend* backend, int32_t max_rows);
  absl::Status LoadWeights();
  void Rotate(std::span<const int32_t> positions);
  void RunLayer(const StepInput& input, int32_t index, Matrix pending);
  void KeepLogitRows(const StepInput& input, Matrix pending);
  // The first `rows` rows of an activation buffer.
  Matrix Rows(const AlignedBuffer& buffer, int32_t rows, int32_t width) const;
  void Multiply(Matrix x, std::span<const AdapterSegment> segments,
                std::span<const LinearOutput> outputs);

  const std::shared_ptr<const ModelSource> source_;
  const ModelConfig& config_;
  Backend* const backend_;
  const int32_t max_rows_;

  std::vector<Layer> layers_;
  std::unique_ptr<LinearWeight> head_;
  std::vector<float> final_norm_;  // [D]

  // Activations, max_rows each.
  AlignedBuffer hidden_, normed_, q_, k_, v_, attended_, projected_, gate_, up_;
  AlignedBuffer cos_, sin_;  // [max_rows, head_dim / 2]
  AlignedBuffer final_;      // [max_rows, D] final hidden states of the logit rows
  AlignedBuffer logits_;     // [kHeadRows, vocab]
  std::vector<AdapterSegment> head_segments_;  // in logit rows
};

}  // namespace lorikeet
