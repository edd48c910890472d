// The Runner that really computes: a model on a backend, its KV pages and the sampler.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/base_model.h"
#include "engine/api/limits.h"
#include "engine/kernels/backend.h"
#include "engine/model/base_model_view.h"
#include "engine/model/model.h"
#include "engine/runner/runner.h"

namespace lorikeet {

struct RunnerOptions {
  std::string device = "auto";     // auto, cpu, cuda
  std::string precision = "auto";  // exact, fast; auto: exact for float32 models, else fast
  std::string quantization = "none";  // fp8: see Quantization; on a GPU alone
  int32_t threads = 0;             // 0: as many as there are cores
  int64_t kv_bytes = 0;      // of the pool; 0: 1 GiB on the CPU, what can be spared on a GPU
  int64_t pinned_bytes = 0;  // see BackendOptions
  bool record = true;        // likewise
  bool batch_invariant = false;  // likewise
  Limits limits;
};

class ModelRunner final : public Runner {
 public:
  // INVALID_ARGUMENT names an option's value and its bound; FAILED_PRECONDITION says what this
  // machine or build lacks.
  static absl::StatusOr<std::unique_ptr<ModelRunner>> Create(
      std::shared_ptr<const ModelSource> source, const RunnerOptions& options);

  absl::StatusOr<StepResult> Run(const Batch& batch) override;

  const KvLayout& kv() const { return kv_; }
  int32_t pages() const { return pages_; }
  AdapterImages* images() override { return backend_->images(); }
  const BaseModel& base_model() const { return base_model_; }
  Precision precision() const { return precision_; }
  MemoryUse memory_use() const override { return backend_->memory_use(); }
  int64_t weight_bytes() const { return model_->weight_bytes(); }
  double MeasureBandwidth() { return backend_->MeasureBandwidth(); }  // see Backend
  std::string Describe() const { return backend_->Describe(); }
  // Why device "auto" came to the CPU; OK where it did not.
  const absl::Status& no_gpu() const { return no_gpu_; }

 private:
  ModelRunner(std::shared_ptr<const ModelSource> source, std::unique_ptr<Backend> backend,
              std::unique_ptr<Model> model, Precision precision, const KvLayout& kv,
              int32_t pages);

  // Runs the steps that are slow the first time, before pages hold anything. Seconds for a model of
  // some billion weights on a GPU, nothing on the CPU.
  absl::Status WarmUp();

  // The base's own pass over the rows of adapters with gates, and their gates from it.
  absl::Status ComputeGates(const Batch& batch);
  void GateRows(const Batch& batch, std::span<const int32_t> rows);
  void FillMasks();
  int32_t RowsOfAKind(int32_t begin) const;
  absl::Status Sample(int32_t begin, std::span<SampledToken> out);
  absl::Status Pool(int32_t begin, int32_t rows);

  const std::unique_ptr<Backend> backend_;
  const std::unique_ptr<Model> model_;
  const BaseModelView base_model_;
  const Precision precision_;
  const KvLayout kv_;
  const int32_t pages_;
  absl::Status no_gpu_;

  std::vector<int32_t> logit_rows_;  // [L] of the step
  std::vector<LogitRow> rows_;       // [L] with what their constraints allow
  std::vector<int32_t> constrained_;  // [C] indices of those that are, in rows_
  std::vector<uint32_t> masks_;       // [C, words]
  std::vector<float> hidden_;        // [rows, D] on their way into embeddings or gates
  std::vector<float> gate_values_;    // of all rows that have any
  std::vector<const float*> gates_;   // [T], or empty: see StepInput
};

}  // namespace lorikeet
