// A decoder-only transformer on a backend: weights and one forward pass for all families.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/kernels/backend.h"
#include "engine/model/model_source.h"

namespace lorikeet {

class Model {
 public:
  // `backend` outlives the model. INVALID_ARGUMENT: a width the backend has no kernels for;
  // RESOURCE_EXHAUSTED: the device has too little memory.
  static absl::StatusOr<std::unique_ptr<Model>> Load(std::shared_ptr<const ModelSource> source,
                                                     Backend* backend, int32_t max_rows);

  // Runs all layers, writes K and V of every row, keeps the final hidden states of the step's
  // logit rows. `step`'s arrays stay valid until its last Logits. REQUIRES: T <= max_rows.
  void Forward(const StepInput& step);

  // Logits of logit rows [begin, begin + rows) of the last Forward: [rows, vocab] float32, behind
  // them in each row those of tokens that its adapter adds (Limits::kMaxAddedTokens), valid
  // until the next call. REQUIRES: rows <= backend's max_logit_rows().
  Matrix Logits(int32_t begin, int32_t rows);

  // Final hidden states, after the last norm, of the same rows: [rows, D] into `out`.
  absl::Status Hidden(int32_t begin, int32_t rows, std::vector<float>* out);

  // Of the linears that every step reads once: of experts as many as one row chooses.
  int64_t weight_bytes() const;

 private:
  struct Layer {
    std::unique_ptr<LinearWeight> qkv, o;
    std::unique_ptr<LinearWeight> gate_up, down;  // or a router and experts
    std::unique_ptr<LinearWeight> router;
    std::vector<std::unique_ptr<LinearWeight>> expert_linears;
    std::vector<Expert> experts;                  // of expert_linears
    DeviceMemory input_norm;      // [D]
    DeviceMemory attention_norm;  // [D]
    DeviceMemory q_norm;          // [head_dim] or null
    DeviceMemory k_norm;
  };
  // A buffer of rows on the device.
  struct Rows {
    DeviceMemory memory;
    Matrix all;

    Matrix First(int32_t rows) const { return all.Rows(0, rows); }
  };

  Model(std::shared_ptr<const ModelSource> source, Backend* backend, int32_t max_rows);
  absl::Status LoadWeights();
  std::unique_ptr<LinearWeight> LoadLinear(ModuleId first, int32_t parts, LinearSource how = {});
  void AllocateRows();
  DeviceMemory LoadVector(const TensorView* view);
  void LoadLayer(int32_t index);
  void LoadExperts(int32_t index, Layer* layer);
  void ShareLayer(const Layer& from, int32_t index);
  void RunLayer(int32_t index, int32_t rows);
  void Attend(const Layer& layer, int32_t index, int32_t rows);

  const std::shared_ptr<const ModelSource> source_;
  const ModelConfig& config_;
  Backend* const backend_;
  const int32_t max_rows_;

  std::vector<Layer> layers_;
  std::unique_ptr<LinearWeight> head_;
  DeviceMemory final_norm_;           // [D]
  DeviceMemory inverse_frequencies_;  // [head_dim / 2]

  Rows hidden_;     // [max_rows, D] float32: the residual stream
  Rows normed_;     // [max_rows, D]
  Rows qkv_;        // [max_rows, q, k and v]
  Rows attended_;   // [max_rows, heads * head_dim]
  Rows projected_;  // [max_rows, D] a block's output, not yet added to the residual stream
  Rows gate_up_;    // [max_rows, 2 F]
  Rows gated_;      // [max_rows, F]
  Rows scores_;     // [max_rows, experts] of the router
  Rows final_;      // [max_rows, D] of the logit rows
  Rows logits_;     // [max_logit_rows, vocab] float32, room for added tokens between rows
};

}  // namespace lorikeet
