// The CPU backend: float32 activations, one thread pool, weights in their file's precision.
// Needs AVX2, FMA and F16C; uses AVX-512, VNNI and BF16 where there are.
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
#include "engine/kernels/sampler.h"
#include "engine/kernels/thread_pool.h"

namespace lorikeet {

inline void Grow(AlignedBuffer* buffer, int64_t bytes) {
  if (static_cast<int64_t>(buffer->size()) < bytes) *buffer = AlignedBuffer(bytes);
}

// Keys and values in host memory.
struct KvPages {
  KvLayout layout;
  AlignedBuffer pages;
};

class CpuBackend final : public Backend {
 public:
  struct Features {
    bool avx512 = false;  // F, BW and VL
    bool avx512_vnni = false;  // implies avx512, as does the next
    bool avx512_bf16 = false;

    static Features OfThisMachine();
  };

  CpuBackend(const BackendOptions& options, int32_t threads, Features features);

  std::string Describe() const override;
  DType activation_dtype() const override { return DType::kF32; }
  DType kv_dtype() const override;
  int32_t max_logit_rows() const override { return 32; }

  DeviceMemory Allocate(int64_t bytes) override;
  DeviceMemory Upload(std::span<const float> values) override;
  std::unique_ptr<LinearWeight> LoadLinear(ModuleId first_module,
                                           std::span<const LinearSource> parts) override;
  std::unique_ptr<LinearWeight> ShareLinear(const LinearWeight& weight, ModuleId first_module) override;
  void LoadEmbedding(const TensorView& table) override { embedding_ = table; }
  int32_t AllocatePages(const KvLayout& layout, int64_t bytes) override;
  double MeasureBandwidth() override;
  std::byte* pages() override { return kv_.pages.data(); }
  AdapterImages* images() override { return nullptr; }
  absl::Status status() const override { return absl::OkStatus(); }
  void ParallelFor(int32_t n, const std::function<void(int32_t, int32_t)>& fn) override;

  int32_t BeginStep(const StepInput& step) override;
  void Run(const std::function<void()>& operations) override { operations(); }
  void Embed(Matrix out) override;
  void AddRmsNorm(const NormArgs& args) override;
  void LinearProducts(const LinearArgs& args) override;
  void RopeStore(const RopeStoreArgs& args) override;
  void Attention(const AttentionArgs& args) override;
  void Bottlenecks(const BottleneckArgs& args) override;
  void SwiGlu(Matrix gate_up, Matrix out) override;
  void Experts(const ExpertsArgs& args) override;
  void MlpMixtures(const MlpMixtureArgs& args) override;
  absl::Status Sample(Matrix logits, std::span<const LogitRow> rows,
                      std::span<SampledToken> out) override;
  absl::Status Download(const float* from, std::span<float> to) override;

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

  // fn(adapter, row) for every row of the step that has an adapter.
  template <typename Fn>
  void ForAdapterRows(const Fn& fn) {
    for (const AdapterSegment& segment : step_.segments) {
      ForRows(segment.row_end - segment.row_begin,
              [&](int32_t i) { fn(*segment.adapter, segment.row_begin + i); });
    }
  }
  // nullptr: a base row.
  const Adapter* AdapterOf(int32_t row) const {
    const auto after = std::upper_bound(
        step_.segments.begin(), step_.segments.end(), row,
        [](int32_t r, const AdapterSegment& segment) { return r < segment.row_begin; });
    if (after == step_.segments.begin()) return nullptr;
    return row < (after - 1)->row_end ? (after - 1)->adapter : nullptr;
  }

  // The step's segments in indices of `rows`, which ascend.
  std::vector<AdapterSegment> SegmentsOf(std::span<const int32_t> rows) const;

  static constexpr int32_t kMaxParts = 3;

  // Rows in the form that products take: int8 with scales, or bfloat16.
  struct Rounded {
    QuantRows quant;
    AlignedBuffer quant_storage;
    Matrix half;
    AlignedBuffer half_storage;
  };

  // How one LinearProducts call is split into tasks.
  struct ProductPlan {
    bool quantize = false;    // inputs to int8
    bool round = false;       // inputs to bfloat16
    bool rotated = false;     // a segment rotates its inputs
    bool structured = false;  // a segment has parts that ApplyStructured adds
    int32_t round_tasks = 0;  // of quantising and rounding
    std::span<const int32_t> step_rows;           // of x's rows; empty: they are the step's
    std::vector<AdapterSegment> segments;         // in rows of x
    std::vector<AdapterSegment> shrinks;          // pieces of segments that have a low-rank part
    int32_t t_stride = 0;                         // widest rank among them
    int32_t chunk_columns[kMaxParts] = {};        // by part
    int32_t chunk_begin[kMaxParts + 1] = {};      // first chunk of each part; last: their count
  };
  // LinearProducts on rows of the step, all or `rows`, whose adapters are `segments`.
  void Multiply(const LinearArgs& args, std::span<const AdapterSegment> segments,
                std::span<const int32_t> rows);
  void PlanInputs(const LinearArgs& args, std::span<const AdapterSegment> segments);
  void GateRanks(Matrix x, const AdapterSegment& rows, ModuleId module, float* t) const;
  void PlanChunks(const LinearArgs& args);
  void GrowRounded(const LinearArgs& args, Rounded* rows);
  void RoundRow(const float* x, int32_t width, int32_t r, Rounded* rows);
  void GrowScratch(const LinearArgs& args);
  void PrepareInputs(const LinearArgs& args);
  void MultiplyChunk(const LinearArgs& args, int32_t task, int32_t thread);
  void ApplyDeltas(const LinearArgs& args, int32_t part, Matrix y, int32_t column_begin,
                   int32_t column_end);
  void PlanStructured(const LinearArgs& args);
  void RotateInputs(const LinearArgs& args);
  void MultiplyRows(const LinearArgs& args, int32_t part, int32_t begin, int32_t end, int32_t thread,
                    Matrix y);
  void ApplyStructured(const LinearArgs& args);
  // The rows that an expert is chosen for, and its weight in each.
  struct Routed {
    std::vector<int32_t> rows;
    std::vector<float> weights;
    void Add(int32_t row, float weight) {
      rows.push_back(row);
      weights.push_back(weight);
    }
  };
  void Route(const ExpertsArgs& args);
  // to[row] += weight · what the expert makes of from[row]. Row i of its product, routed.rows[i], has
  // the adapter of `segments`.
  void ApplyExpert(const Expert& weights, Matrix from, const Routed& routed,
                   std::span<const AdapterSegment> segments, Matrix to);
  void DealOut(const AdapterSegment& segment, const MlpMixtureArgs& args, Routed* dealt,
               std::vector<AdapterSegment>* segments);
  void EmbedRow(const Adapter* adapter, int32_t token, float* row, int32_t width);
  static void AdaptEmbedding(const Adapter& adapter, int32_t token, float* row, int32_t width);
  void StorePrefix(const RopeStoreArgs& args, int32_t row);
  void AttendPrompts(const AttentionArgs& args);
  void Rotate(const float* inverse_frequencies, int32_t half);

  const BackendOptions options_;
  const Features features_;
  ThreadPool pool_;

  TensorView embedding_;
  KvPages kv_;

  StepInput step_;
  std::vector<AdapterSegment> logit_segments_;  // step_.segments in logit rows
  std::vector<float> cos_, sin_;                // [T, head_dim / 2]; empty until a layer rotates

  ProductPlan plan_;
  // Scratch of LinearProducts, grown to the largest step seen.
  Rounded rounded_;                     // x
  AlignedBuffer rotated_[kMaxParts];    // [T, in] rows of segments that rotate, by part
  Rounded rounded_rotated_[kMaxParts];  // the same rows
  AlignedBuffer even_odd_;  // rows of x in even/odd order
  AlignedBuffer shrunk_;    // [parts][T][t_stride]
  std::vector<std::vector<float>> panels_;              // [threads] widened weights

  // By expert, of the last Route or DealOut.
  std::vector<Routed> routed_;
  AlignedBuffer expert_in_, expert_gate_up_, expert_gated_, expert_out_;  // of one expert's rows

  // Rows [row, row + a few) of one sequence against one KV head.
  struct AttentionTask {
    int32_t sequence;
    int32_t row;
    int32_t kv_head;
  };
  std::vector<AttentionTask> attention_tasks_;
  std::vector<std::vector<float>> attention_scratch_;  // [threads]
  std::vector<SamplerScratch> sampler_scratch_;        // [threads]
};

}  // namespace lorikeet
