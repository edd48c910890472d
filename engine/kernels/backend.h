// The device as a set of coarse operations. A backend is a folder beside this file that the linker
// picks; everything above speaks only this interface.
//
// Threading: one caller thread. Operations run in order; a caller reads results on the host after
// the operation that made them returned (CPU).
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "engine/kernels/args.h"
#include "engine/tensor/tensor_view.h"

namespace lorikeet {

// kExact: float32 arithmetic on the stored weights, whatever their type. kFast: activations of
// quantised products are 8-bit in groups of 32 and keys and values are float16.
enum class Precision : uint8_t { kExact, kFast };

struct BackendOptions {
  Precision precision = Precision::kFast;
  int32_t threads = 0;  // 0: as many as there are cores
};

class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu (avx2, 2 threads)": for people.
  virtual std::string Describe() const = 0;
  virtual DType kv_dtype() const = 0;

  // Load time. The weight's bytes may be referenced for the life of the result: `weight` outlives it.
  virtual std::unique_ptr<LinearWeight> LoadLinear(const TensorView& weight,
                                                   const TensorView* bias) = 0;

  // out[t] = table row tokens[t]. out: [T, D]; table: [vocab, D].
  virtual void Embed(const TensorView& table, std::span<const int32_t> tokens, Matrix out) = 0;

  // x += delta (delta.data may be nullptr: nothing added); out = RMSNorm(x) ∘ weight.
  // x, delta, out: [T, D]; weight: [D] (Zhang & Sennrich 2019).
  virtual void AddRmsNorm(Matrix x, Matrix delta, const float* weight, float eps, Matrix out) = 0;

  virtual void LinearProducts(const LinearGroup& group) = 0;
  virtual void RopeStore(const RopeStoreArgs& args, const KvView& kv) = 0;
  virtual void Attention(const AttentionArgs& args, const KvView& kv) = 0;

  // gate = silu(gate) ∘ up. Both [T, F] (Shazeer 2020, SwiGLU).
  virtual void SwiGlu(Matrix gate, Matrix up) = 0;

  // fn(task, thread) for task in [0, n) on the backend's host threads, thread in [0, threads()):
  // host work between steps (sampling).
  virtual void ParallelFor(int32_t n, const std::function<void(int32_t, int32_t)>& fn) = 0;
  virtual int32_t threads() const = 0;
};

// INVALID_ARGUMENT / FAILED_PRECONDITION when this machine cannot run it, saying what is missing.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const BackendOptions& options);

}  // namespace lorikeet
