// A model on the backend under test driven row by row: what tests of the forward pass need and no more.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/api/adapter_store.h"
#include "engine/kernels/backend.h"
#include "engine/memory/kv_layout.h"
#include "engine/model/model.h"
#include "engine/model/model_source.h"

namespace lorikeet {

// One sequence: its tokens so far, how many of them are computed, its adapter.
struct Lane {
  std::vector<int32_t> tokens;
  int32_t computed = 0;
  AdapterLease adapter;  // empty: base
};

// The backend under test: each test program links one definition.
absl::StatusOr<std::unique_ptr<Backend>> MakeTestBackend(const BackendOptions& options);

class ModelHarness {
 public:
  static constexpr int32_t kMaxRows = 512;

  // Pages of all lanes come out of `max_tokens` tokens a lane. Fails the test when the model does
  // not open.
  ModelHarness(const std::filesystem::path& model, Precision precision, int32_t lanes,
               int32_t max_tokens, int32_t threads = 2, bool batch_invariant = false);

  const ModelSource& source() const { return *source_; }
  std::shared_ptr<const ModelSource> shared_source() const { return source_; }
  int64_t weight_bytes() const { return model_->weight_bytes(); }

  // Computes `rows[i]` uncomputed tokens of lanes[i] in one step (0: the lane sits out), adapters'
  // rows adjacent. Returns logits of every row by lane: [lane][row][vocab].
  std::vector<std::vector<std::vector<float>>> Step(std::vector<Lane*> lanes,
                                                    const std::vector<int32_t>& rows);

  // All uncomputed tokens of one lane in one step: [rows][vocab].
  std::vector<std::vector<float>> Run(Lane* lane);

 private:
  void LoadAdapters(const std::vector<Lane*>& lanes);

  std::shared_ptr<const ModelSource> source_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
  KvLayout layout_;
  int32_t lane_blocks_;
  int32_t next_page_ = 0;  // behind the lanes' and the images
  std::map<const Adapter*, AdapterLease> loaded_;
};

// Index of the largest value, the first of equals.
int32_t ArgMax(const std::vector<float>& values);

}  // namespace lorikeet
