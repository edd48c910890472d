// The CPU backend: float32 activations, one thread pool, weights in their file's precision.
// Needs AVX2, FMA and F16C; uses AVX-512 VNNI where there is one.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/base/aligned_buffer.h"
#include "engine/kernels/backend.h"
#include "engine/kernels/cpu/quant_weight.h"
#include "engine/kernels/cpu/thread_pool.h"

namespace lorikeet {

class CpuBackend final : public Backend {
 public:
  struct Features {
    bool avx512_vnni = false;
  };

  CpuBackend(const BackendOptions& options, int32_t threads, Features features);

  std::string Describe() const override;
  DType kv_dtype() const override;
  std::unique_ptr<LinearWeight> LoadLinear(const TensorView& weight,
                                           const TensorView* bias) override;
  void Embed(const TensorView& table, std::span<const int32_t> tokens, Matrix out) override;
  void AddRmsNorm(Matrix x, Matrix delta, const float* weight, float eps, Matrix out) override;
  void LinearProducts(const LinearGroup& group) override;
  void RopeStore(const RopeStoreArgs& args, const KvView& kv) override;
  void Attention(const AttentionArgs& args, const KvView& kv) override;
  void SwiGlu(Matrix gate, Matrix up) override;
  void ParallelFor(int32_t n, const std::function<void(int32_t, int32_t)>& fn) override;
  int32_t threads() const override { return pool_.threads(); }

 private:
  // Rows split over the pool when they are worth a fork.
  template <typename Fn>
  void ForRows(int32_t rows, const Fn& fn) {
    constexpr int32_t kRowsPerTask = 4;
    pool_.ParallelFor((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int32_t task, int32_t) {
      const int32_t end = std::min(rows, (task + 1) * kRowsPerTask);
      for (int32_t r = task * kRowsPerTask; r < end; ++r) fn(r);
    });
  }

  static constexpr int32_t kMaxOutputs = 3;

  // How one LinearProducts call is split into tasks.
  struct GroupPlan {
    bool quantize = false;
    int32_t quant_tasks = 0;
    std::vector<AdapterSegment> shrinks;          // pieces of segments that have a low-rank part
    int32_t t_stride = 0;                         // widest rank among them
    int32_t chunk_columns[kMaxOutputs] = {};      // by output
    int32_t chunk_begin[kMaxOutputs + 1] = {};    // first chunk of each output; last: their count
  };
  void PlanInputs(const LinearGroup& group);
  void PlanChunks(const LinearGroup& group);
  void GrowScratch(const LinearGroup& group);
  void PrepareInputs(const LinearGroup& group);
  void MultiplyChunk(const LinearGroup& group, int32_t task, int32_t thread);
  void ApplyDeltas(const LinearGroup& group, const LinearOutput& output, int32_t output_index,
                   int32_t column_begin, int32_t column_end);

  const BackendOptions options_;
  const Features features_;
  ThreadPool pool_;

  GroupPlan plan_;
  // Scratch of LinearProducts, grown to the largest step seen.
  QuantRows quant_rows_;
  AlignedBuffer quant_storage_;
  AlignedBuffer even_odd_;  // rows of x in even/odd order
  AlignedBuffer shrunk_;    // [outputs][T][t_stride]
  std::vector<std::vector<float>> panels_;              // [threads] widened weights

  // Rows [row, row + a few) of one sequence against one KV head.
  struct AttentionTask {
    int32_t sequence;
    int32_t row;
    int32_t kv_head;
  };
  std::vector<AttentionTask> attention_tasks_;
  std::vector<std::vector<float>> attention_scratch_;  // [threads]
};

}  // namespace lorikeet
