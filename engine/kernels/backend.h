// The device as a set of coarse operations. A backend is a folder beside this file that the linker
// picks; everything above speaks only this interface.
//
// A step: BeginStep tells the backend everything about it, then Run is given the operations of the
// forward pass, then Logits' product and Sample. Operations take no host data of their own, so that
// a backend may record them once and replay them.
//
// Threading: one caller thread, except that LoadLinear may be called from ParallelFor. Operations
// run in order. Pointers in arguments are device memory unless they are spans.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/api/adapter_images.h"
#include "engine/api/logit_row.h"
#include "engine/api/module.h"
#include "engine/base/check.h"
#include "engine/kernels/args.h"
#include "engine/memory/kv_layout.h"
#include "engine/memory/memory_use.h"
#include "engine/tensor/tensor_view.h"

namespace lorikeet {

// kExact: float32 arithmetic on the stored weights, whatever their type. kFast on the CPU: inputs
// of quantised products are 8-bit in groups of 32 (16-bit for q, k, v and the head), those of
// bfloat16 products bfloat16 where the processor multiplies that, keys and values float16. kFast on CUDA: bfloat16
// (float16 for float16 models) with float32 sums and residual stream.
enum class Precision : uint8_t { kExact, kFast };

// kFp8: the layers' linears lie on the GPU as codes of 8 bits (e4m3) with a scale a row, made when
// they are loaded; products widen them. Half the memory, and half the bytes of a decode step. kNone
// keeps the codes of files that have them so, where kFp8 would be possible, and rounds them to 16 bits
// elsewhere.
enum class Quantization : uint8_t { kNone, kFp8 };

struct BackendOptions {
  Precision precision = Precision::kFast;
  Quantization quantization = Quantization::kNone;
  DType stored = DType::kBF16;  // of the model's linears, for the choice of activations
  int32_t threads = 0;   // of the host; 0: as many as there are cores
  ExpertModules experts;
  int32_t experts_per_token = 0;
  int32_t max_rows = 0;  // of a step
  int64_t pinned_bytes = 0;  // of host memory, for adapters on their way to a GPU; 0: a quarter
                             // of it, at most 32 GiB
  bool record = true;    // steps, where the backend can replay them
  // A token's results are the same to the bit whatever else its step holds, and however the tokens before it
  // were cut into steps. Costs speed on a GPU, and on the CPU with float32 products.
  bool batch_invariant = false;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu (avx2, 2 threads)": for people.
  virtual std::string Describe() const = 0;
  virtual DType activation_dtype() const = 0;
  // Elements that the backend wants behind each row of a linear's inputs, for its own use in LinearProducts.
  virtual int32_t x_room(int32_t) const { return 0; }
  virtual DType kv_dtype() const = 0;
  // Most rows that Sample and the head's product take at a time.
  virtual int32_t max_logit_rows() const = 0;

  // Numbers of rows, descending, whose first steps take longer than later ones, because products are
  // chosen and steps recorded then: worth running before serving.
  virtual std::vector<int32_t> slow_first_rows() const { return {}; }

  // ---- load time

  virtual DeviceMemory Allocate(int64_t bytes) = 0;
  virtual DeviceMemory Upload(std::span<const float> values) = 0;  // as float32
  // Part i of the weight is module first_module + i.
  virtual std::unique_ptr<LinearWeight> LoadLinear(ModuleId first_module,
                                                   std::span<const LinearSource> parts) = 0;
  // The same weight, its memory shared, as the modules from `first_module` on.
  virtual std::unique_ptr<LinearWeight> ShareLinear(const LinearWeight& weight, ModuleId first_module) = 0;
  virtual void LoadEmbedding(const TensorView& table) = 0;  // [vocab, D]
  // Pages of `layout` in `bytes` of memory, 0 meaning all that can be spared; returns their
  // number. Once, after all weights.
  virtual int32_t AllocatePages(const KvLayout& layout, int64_t bytes) = 0;
  // Bytes a second that this device's memory gives, by trial: a few hundredths of a second's work.
  // After AllocatePages, whose pages it may overwrite; before the first step.
  virtual double MeasureBandwidth() = 0;
  virtual MemoryUse memory_use() const { return {}; }  // any thread
  virtual std::byte* pages() = 0;  // page p at pages() + p * layout.page_bytes()
  // Of adapters, in pages of AllocatePages', which must come first: a step's must be there. nullptr:
  // adapters are used where the host has them.
  virtual AdapterImages* images() = 0;
  // The first failure of anything above: RESOURCE_EXHAUSTED says what did not fit.
  virtual absl::Status status() const = 0;
  // fn(task, thread) for task in [0, n) on the host's threads, thread in [0, threads()).
  virtual void ParallelFor(int32_t n, const std::function<void(int32_t, int32_t)>& fn) = 0;

  // ---- a step

  // `step`'s arrays stay valid and unchanged until the step's last operation. Returns the rows that
  // operations over kAll must take: T, or more, of which those past T are computed for nothing.
  virtual int32_t BeginStep(const StepInput& step) = 0;
  // Runs `operations`, which depend on the step only through the number of rows.
  virtual void Run(const std::function<void()>& operations) = 0;

  virtual void Embed(Matrix out) = 0;  // out[t] = table row tokens[t]; [T, D] float32
  virtual void AddRmsNorm(const NormArgs& args) = 0;
  virtual void LinearProducts(const LinearArgs& args) = 0;
  virtual void RopeStore(const RopeStoreArgs& args) = 0;
  virtual void Attention(const AttentionArgs& args) = 0;
  // Adds the adapters' bottlenecks to a block's output.
  virtual void Bottlenecks(const BottleneckArgs& args) = 0;
  // out = silu(gate) ∘ up (Shazeer 2020, SwiGLU). gate_up: [T, 2 F], gate first; out: [T, F].
  virtual void SwiGlu(Matrix gate_up, Matrix out) = 0;
  // REQUIRES: BackendOptions::experts.
  virtual void Experts(const ExpertsArgs& args) = 0;
  virtual void MlpMixtures(const MlpMixtureArgs& args) = 0;

  // One token a row of `logits` [rows, vocab] float32, as engine/kernels/sampler.h defines it, from
  // the row's own vocabulary, which may reach into what lies between rows; on return `out` is filled. A failure is the device's: nothing can be computed after it.
  virtual absl::Status Sample(Matrix logits, std::span<const LogitRow> rows,
                              std::span<SampledToken> out) = 0;
  // Copies float32 values to the host, after all operations before.
  virtual absl::Status Download(const float* from, std::span<float> to) = 0;
};

// INVALID_ARGUMENT / FAILED_PRECONDITION when this machine cannot run it, saying what is missing.
// The CPU quantises nothing: its weights keep their file's precision.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const BackendOptions& options);
// The same; FAILED_PRECONDITION also when this build has no CUDA backend.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const BackendOptions& options);

}  // namespace lorikeet
