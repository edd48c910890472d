// The CUDA backend: a stream and one beside it, 16-bit activations (float32 for float32 models), float32 residual
// stream and logits. Decode steps are recorded once a number of rows and set of adapters' parts,
// and replayed.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "engine/kernels/backend.h"
#include "engine/kernels/cuda/adapter_images.h"
#include "engine/kernels/cuda/attention.h"
#include "engine/kernels/cuda/coded_gemm.h"
#include "engine/kernels/cuda/cuda_status.h"
#include "engine/kernels/cuda/device_sampler.h"
#include "engine/kernels/cuda/experts.h"
#include "engine/kernels/cuda/gemm.h"
#include "engine/kernels/cuda/step_arrays.h"
#include "engine/kernels/cuda/structured.h"
#include "engine/kernels/sampler.h"
#include "engine/kernels/thread_pool.h"

namespace lorikeet::cuda {

class CudaLinearWeight final : public LinearWeight {
 public:
  DeviceMemory memory;  // what `rows` or `coded` point into
  Matrix rows;          // [width(), in] of the activation type, with room for an extension behind each
  bool is_coded = false;
  CodedWeight coded;
  DeviceMemory bias;  // [width()] float32 or null
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const BackendOptions& options, const cudaDeviceProp& device, cudaStream_t stream);
  ~CudaBackend() override;

  std::string Describe() const override;
  DType activation_dtype() const override { return dtype_; }
  int32_t x_room(int32_t width) const override {
    return dtype_ == DType::kBF16 && !options_.batch_invariant ? ExtensionRoom(width) : 0;
  }
  DType kv_dtype() const override { return dtype_; }
  int32_t max_logit_rows() const override { return 256; }
  std::vector<int32_t> slow_first_rows() const override;

  DeviceMemory Allocate(int64_t bytes) override;
  DeviceMemory Upload(std::span<const float> values) override;
  std::unique_ptr<LinearWeight> LoadLinear(ModuleId first_module,
                                           std::span<const LinearSource> parts) override;
  std::unique_ptr<LinearWeight> ShareLinear(const LinearWeight& weight, ModuleId first_module) override;
  void LoadEmbedding(const TensorView& table) override;
  int32_t AllocatePages(const KvLayout& layout, int64_t bytes) override;
  double MeasureBandwidth() override;
  MemoryUse memory_use() const override;
  std::byte* pages() override { return pages_.get(); }
  AdapterImages* images() override { return &adapters_; }
  absl::Status status() const override { return errors_.status(); }
  void ParallelFor(int32_t n, const std::function<void(int32_t, int32_t)>& fn) override;

  int32_t BeginStep(const StepInput& step) override;
  void Run(const std::function<void()>& operations) override;
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
  // Of a recorded step: rows, adapted linears, adapters' parts.
  using GraphKey = std::tuple<int32_t, LinearSet, PartSet>;

  // The first step of a key runs as it is, which loads what it needs; the second is recorded.
  struct Recorded {
    bool seen = false;
    cudaGraphExec_t graph = nullptr;
  };

  std::byte* AllocateRaw(int64_t bytes, const char* what);
  DeviceMemory AllocateWeight(int64_t bytes);
  // Calls take(first row, rows as `dtype`, 16-bit, float32 or the view's own) until all are taken.
  void ForRows(const TensorView& view, DType dtype,
               const std::function<void(int64_t, std::span<const std::byte>)>& take);
  // Rows of `row_bytes` to rows `pitch` bytes apart.
  void CopyWeight(std::byte* to, int64_t pitch, std::span<const std::byte> from, int64_t row_bytes);
  void ClearWeight(std::byte* memory, int64_t bytes);
  // Rows of views, one after the other, in the activation type, with zeros in the `room` behind each.
  DeviceMemory LoadRows(std::span<const TensorView* const> views, int32_t room);
  DeviceMemory LoadCodes(std::span<const TensorView* const> views, CodedWeight* coded);
  void PlanAdapters(const StepInput& step);
  // Floats of a plan's slots, whichever linear they are of.
  int64_t SlotsOf(const LowRankWork& work) const;
  bool GrowScratch();
  bool Grow(int64_t count, int64_t element_bytes, int64_t* capacity, DeviceMemory* memory);
  cudaGraphExec_t Record(const std::function<void()>& operations);
  void DropGraphs();
  LowRankArgs LowRankOf(const LinearArgs& args, const LowRankWork& work,
                        const LowRankList* list) const;
  enum class Segments : uint8_t { kAll, kShort };
  void MultiplyLowRank(const LinearArgs& args, Matrix y, bool add, Segments segments, cudaStream_t stream);
  void MultiplyApart(const LinearArgs& args, Segments segments);
  // Whether deltas of long segments extend the step's products, as far as there is room.
  bool ExtendsProducts(std::span<const DeviceSegment> long_segments) const;
  // Columns of the product's extension; 0: it has none.
  int32_t ExtensionColumnsOf(const LinearArgs& args) const;
  // Makes the extension: x and the weight then have `columns` more.
  void Extend(const LinearArgs& args, int32_t columns);
  bool Has(Part part) const { return (part_set_ & Bit(part)) != 0; }
  // Of the step's adapters and this product's linears.
  bool Has(LinearPart part, const LinearArgs& args) const;
  RowAdapters AdaptersOf(RowSet rows, int32_t first_row = 0) const;
  StructuredArgs StructuredOf(const LinearArgs& args) const;
  void Multiply(const CudaLinearWeight& weight, Matrix x, Matrix y, bool beside);
  void AddBias(const CudaLinearWeight& weight, Matrix y);
  void MultiplyRotated(const LinearArgs& args);
  // Makes shares_ of the product's input.
  void DealShares(const LinearArgs& args, cudaStream_t stream);
  // Some rows of mixtures, all their pairs.
  void MixRows(const MlpMixtureArgs& args, const int32_t* rows, int32_t count);
  void ReserveExperts();
  Routing RoutingOf(int32_t chosen) const;
  // [2, experts]: where the weights of gate and up lie, then of down.
  const void* const* ExpertWeights(std::span<const Expert> experts);
  // What LinearProducts kept apart of the y at `data`, after it is there. Once.
  Beside TakeBeside(const void* data);
  KvStep KvOf() const;
  void Note(cudaError_t error, const char* what) { errors_.Note(error, what); }

  const BackendOptions options_;
  const std::string device_name_;
  const DType dtype_;
  const cudaStream_t stream_;
  FirstError errors_;
  std::mutex load_mutex_;  // errors_ and the widths while weights load

  mutable std::mutex memory_mutex_;  // the next two
  mutable MemoryUse memory_use_;     // asked of the driver once a second at most: routers scrape often
  mutable std::chrono::steady_clock::time_point memory_asked_;
  ThreadPool threads_;
  Gemm gemm_;
  StepArrays arrays_;
  DeviceSampler sampler_;
  std::vector<float> host_logits_;  // of a row that the host samples
  SamplerScratch host_scratch_;
  DeviceMemory embedding_;
  KvLayout layout_;
  DeviceMemory pages_;
  DeviceImages adapters_;  // whose copies end before their pages go
  int64_t pool_bytes_ = 0;
  int32_t query_group_ = 1;  // query heads that share a KV head
  int32_t widest_input_ = 0;  // of a linear
  int32_t most_room_ = 0;     // behind the rows of one, for an extension
  int32_t slots_per_item_ = 1;  // sums a low-rank item keeps at most: parts · slices of a linear

  StepWork work_;
  LinearSet linears_ = 0;  // of the step's adapters
  PartSet part_set_ = 0;
  bool recordable_ = false;
  int32_t rows_ = 0;
  std::map<GraphKey, Recorded> graphs_;

  cudaStream_t side_ = nullptr;  // low-rank work beside the products
  cudaEvent_t fork_ = nullptr, join_ = nullptr;
  std::map<const void*, DeviceMemory> deltas_;  // room for what is kept apart of the y there
  Beside pending_;                              // of deltas_: not yet added
  const void* pending_y_ = nullptr;             // to the y there
  struct {
    Matrix weight, x, y;
    int32_t more = 0;  // columns
  } held_;  // the product that SwiGlu is to make; y.data is nullptr: none
  DeviceMemory rotated_;  // [max_rows, widest_input_] once an adapter rotates inputs
  DeviceMemory shares_;   // of max_rows rows of kMaxParts linears once an adapter has prototypes
  DeviceMemory inner_;    // [max_rows, D] float32 once one has bottlenecks
  DeviceMemory routing_;  // of max_rows rows: what RoutingOf points into
  struct {
    int32_t gate_up = 0, down_in = 0, down_out = 0;   // widths of the model's
    DeviceMemory rows[3];                             // [max_rows * experts_per_token] of each
    std::map<const Expert*, DeviceMemory> weights;    // by a layer's first
  } experts_;
  DeviceMemory mixture_;  // of kMixturePairs pairs, once an adapter has a mixture
  DeviceMemory slots_;    // of the low-rank sums
  int64_t slot_floats_ = 0;
  DeviceMemory partials_;  // of attention
  int64_t partial_floats_ = 0;
  DeviceMemory arrived_;  // [max_rows, heads]
};

}  // namespace lorikeet::cuda
