// A normalised adapter: what every checkpoint format becomes at load, and all that kernels see.
//
// Per linear, for a row x (width in) of the batch, each part optional and in this order:
//     x' = R(x)                                  input_rotation
//     z  = x' Wᵀ                                 the base's product
//     z += scale · (x Aᵀ) Bᵀ                     low_rank
//     z += S(x)                                  kronecker, circulant, sparse, dense
//     y  = out_scale ∘ z + base bias + bias
//     y  = Q(y)                                  output_rotation
//     y[index[k]] = x · rows[k]                  rows
// LoRA and its kin fill the low-rank part; DoRA adds out_scale = m / ‖W + s·B·A‖row (Liu et al.
// 2024). Beyond linears an adapter may change embeddings, norms, the residual stream, attention and
// the tokens in front of a prompt. Immutable once loaded; shared by reference count through
// AdapterLease.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/api/module.h"
#include "engine/base/aligned_buffer.h"
#include "engine/base/dtype.h"

namespace lorikeet {

// A rank-r pair. Both factors are stored by rank row, so that a rank is one contiguous run: row k
// of `a` is row k of A, row k of `b` is column k of B. Rows start 64-byte aligned.
struct LowRank {
  int32_t rank = 0;              // 0: no low-rank part
  DType dtype = DType::kBF16;    // of a and b: kF32, kF16 or kBF16
  float scale = 1.0f;            // applied to x Aᵀ in float
  const std::byte* a = nullptr;  // [rank, in],  row stride a_stride elements
  const std::byte* b = nullptr;  // [rank, out], row stride b_stride elements
  int64_t a_stride = 0;
  int64_t b_stride = 0;
  // What other linears have as well, of which this one may be narrower: a copy serves them all.
  bool shares_a = false;
  bool shares_b = false;
  bool blocks = false;  // rows are zeros but for a part of them, neighbours' the same part
  // What is a linear's own where a and b are shared: its ranks mixed (LoRA-XS, TinyLoRA; on the host
  // alone) or scaled (VeRA), and a scale of what the pair adds. Each nullptr where there is none.
  const float* rank_mix = nullptr;     // [rank, rank]
  const float* rank_scale = nullptr;   // [rank]
  const float* delta_scale = nullptr;  // [out], and on to a multiple of 16
};

// x'_k = x_k R_k, block by block of `block` inputs (OFT, Qiu et al. 2023). Blocks of one input are
// a scale of every input (IA³, Liu et al. 2022).
struct InputRotation {
  int32_t block = 0;         // divides in; 0: none
  const float* r = nullptr;  // [in / block, block, block]
};

// y' = scale ∘ y + cross ∘ rot(y), bias included (RoAd, Liao et al. 2024). In every group of
// 2 · half outputs, rot(y) is the second half negated, then the first. Without cross a scale (IA³).
struct OutputRotation {
  const float* scale = nullptr;  // [out]; nullptr: none
  const float* cross = nullptr;  // [out] or nullptr
  int32_t half = 0;
};

// S(x) = (w1 ⊗ w2) x (LoKr): x as [in1, in2], the result w1 · X · w2ᵀ as [out1, out2].
struct KroneckerDelta {
  int32_t in1 = 0, in2 = 0, out1 = 0, out2 = 0;
  const float* w1 = nullptr;  // [out1, in1]; nullptr: none
  const float* w2 = nullptr;  // [out2, in2]
};

// S(x)[m·b + k] = Σ_n Σ_j kernel[m, n, j] · x[n·b + (k + j) mod b] (C³A, Chen et al. 2024).
struct CirculantDelta {
  int32_t block = 0;              // b, divides in and out; 0: none
  const float* kernel = nullptr;  // [out / b, in / b, b]
};

// S(x)[o] = Σ value[e] · x[column[e]] over e in [row_begin[o], row_begin[o + 1]).
struct SparseDelta {
  const int32_t* row_begin = nullptr;  // [out + 1]; nullptr: none
  const int32_t* column = nullptr;
  const float* value = nullptr;
};

// Rows of a weight of any type: [rows, in], row-major.
struct DenseRows {
  DType dtype = DType::kF32;  // kF32, kF16 or kBF16
  int32_t rows = 0;
  const std::byte* data = nullptr;  // nullptr: none
};

// Rows that replace those of a table or of a weight, or follow its last one.
struct ReplacedRows {
  DenseRows rows;
  const int32_t* index = nullptr;  // [rows] ascending; nullptr: 0, 1, 2, ...
};

struct ModuleDelta {
  LowRank low_rank;
  // [rank] with Adapter::gating or prototype_gates: whose gate scales a rank of x Aᵀ.
  const int32_t* rank_gate = nullptr;
  const float* prototypes = nullptr;  // [experts, in] with Adapter::prototype_gates
  const float* out_scale = nullptr;  // [out] or nullptr
  const float* bias = nullptr;       // [out] or nullptr
  InputRotation input_rotation;
  OutputRotation output_rotation;
  KroneckerDelta kronecker;
  CirculantDelta circulant;
  SparseDelta sparse;
  DenseRows dense;  // [out, in], added to the base's weight
  ReplacedRows rows;

  bool adds() const { return kronecker.w1 || circulant.block || sparse.row_begin || dense.data; }
  bool structured() const {
    return input_rotation.block || output_rotation.scale || adds() || rows.rows.data;
  }
  bool empty() const { return low_rank.rank == 0 && !out_scale && !bias && !structured(); }
};

// e(t) = out_scale ∘ (row of t + scale · A[:, t]ᵀ Bᵀ), the row the base's or a replacing one.
struct EmbeddingDelta {
  LowRank low_rank;                  // a: [rank, tokens], b: [rank, D]
  const float* out_scale = nullptr;  // [D] or nullptr
  ReplacedRows rows;                 // [rows, D]

  bool empty() const { return low_rank.rank == 0 && !out_scale && !rows.rows.data; }
};

// Positions 0 .. count - 1 of every sequence are the adapter's: embedding rows (prompt tuning,
// Lester et al. 2021), or keys and values as the cache has them, without rotary embedding (prefix
// tuning, Li & Liang 2021).
struct VirtualTokens {
  int32_t count = 0;
  const float* rows = nullptr;  // [count, D], or
  const float* kv = nullptr;    // [layers, 2, count, kv_heads * head_dim]
};

// Attention beside the main one (LLaMA-Adapter, Zhang et al. 2023), its own softmax, its queries
// the rotated ones: out += gate · softmax(q Kᵀ · scale) V.
struct PromptAttention {
  int32_t count = 0;  // 0: none
  float gate = 0;
  const float* k = nullptr;  // [count, kv_heads * head_dim], not rotated
  const float* v = nullptr;
};

enum class Activation : uint8_t { kSilu, kRelu, kGelu, kGeluTanh, kTanh, kSigmoid, kIdentity };

// A bottleneck (Houlsby et al. 2019) on a block's output h before it joins the residual stream r:
// h + scale · (act(z Dᵀ + d) Uᵀ + u), with z one of h, h + r, r.
struct Bottleneck {
  enum class Input : uint8_t { kOutput, kSum, kResidual };
  int32_t width = 0;  // 0: none
  Input input = Input::kOutput;
  Activation activation = Activation::kRelu;
  float scale = 1;
  const float* down = nullptr;       // [width, D]
  const float* down_bias = nullptr;  // [width]
  const float* up = nullptr;         // [D, width]
  const float* up_bias = nullptr;    // [D]
};

// Gates, token by token, of an adapter whose pairs are those of several LoRAs one below the other
// (X-LoRA, Buehler & Buehler 2024): a small network on the final hidden state that the base model
// alone gives the token. It needs keys and values of the base beside the adapter's own.
struct Gating {
  struct Layer {
    int32_t in = 0, out = 0;
    std::vector<float> weight;  // [out, in]
    std::vector<float> bias;    // [out]
  };
  int32_t experts = 0;            // 0: no gates
  std::vector<Layer> layers;      // ReLU between them
  int32_t sets = 1;               // of gates: one for all linears, or one for each that is adapted
  std::vector<int32_t> set_of;    // [modules] by ModuleId
  bool softmax = true;
  float temperature = 1;
  int32_t top = 0;                // that many gates of a set are kept, the others 0; 0: all
  bool softmax_of_top = false;

  int32_t width() const { return sets * experts; }
};

// Gates that every linear makes of its own input, of an adapter whose pairs are those of several LoRAs
// one below the other. A LoRA's score is its prototype · x (MoLE, Wu et al. 2024) or the magnitude of that
// (Arrow, Ostapenko et al. 2024); the `chosen` with the largest share 1 by a softmax of score /
// temperature, the others' gates are 0.
struct PrototypeGates {
  int32_t experts = 0;  // 0: no such gates
  int32_t chosen = 0;
  float temperature = 1;
  bool magnitudes = true;
};

struct Adapter;

// LoRAs of each layer's MLP among which a router deals out the tokens (MixLoRA, Li et al. 2024): of a
// token the `chosen` with the largest score, w a softmax of their scores alone.
//     out = Σ over the chosen e of w_e · MLP_e(x), the MLP with the pairs of LoRA e
struct MlpMixture {
  std::vector<std::shared_ptr<const Adapter>> experts;  // [E] with pairs on the MLPs' linears alone
  std::vector<std::vector<float>> routers;              // [layers] of [E, D]
  int32_t chosen = 0;
};

constexpr int NormIndex(int layer, bool attention) { return 2 * layer + (attention ? 1 : 0); }
constexpr int FinalNorm(int layers) { return 2 * layers; }

// What a server keeps with an adapter to read and write its text; nothing to the engine.
class AdapterText {
 public:
  virtual ~AdapterText() = default;
};

// Rows of a factor that adapters have in common, as LowRank has them.
struct SharedRows {
  const std::byte* data = nullptr;
  DType dtype = DType::kBF16;
  int32_t rows = 0;
  int64_t stride = 0;

  bool operator==(const SharedRows&) const = default;
};

struct Adapter {
  // Of this object alone, in this process: what copies elsewhere are known by.
  const uint64_t serial = NextSerial();
  std::string version;               // lower-case hex SHA-256 of configuration and tensors
  std::string variant;               // "lora", "rslora", "dora", ...: for people
  // Keys and values depend on nothing but tokens and version: they can be used again.
  bool cacheable = true;
  // Tokens, where they are not as many as the base's: those behind the base's have rows of their own
  // in `embedding` and in the head's module. 0: as the base's.
  int32_t vocab = 0;
  std::shared_ptr<const AdapterText> text;  // nullptr: the base's
  int32_t max_rank = 0;
  int64_t bytes = 0;                 // of `storage` and of those of `blocks` that are its alone
  // By ModuleId: ModuleCount(layers) of them, and the experts' behind those when any is changed.
  std::vector<ModuleDelta> modules;
  EmbeddingDelta embedding;
  std::vector<const float*> norms;   // [FinalNorm(layers) + 1] of [D] or nullptr; or empty
  VirtualTokens virtual_tokens;
  std::vector<PromptAttention> prompt_attention;  // [layers] or empty
  Gating gating;
  PrototypeGates prototype_gates;
  MlpMixture mlp_mixture;
  std::vector<Bottleneck> bottlenecks;            // by NormIndex of what precedes them; or empty
  // Rows before the last of these sequences in the prompt are the base's (activated LoRA, Greenewald
  // et al. 2025). Empty: all rows are the adapter's.
  std::vector<int32_t> invocation_tokens;
  // Whether gates scale the ranks of a token.
  bool gated() const { return gating.experts > 0 || prototype_gates.experts > 0; }
  // Of keys and values that a sequence has: the adapter's, and the base's where gates need them.
  int32_t kv_sets() const { return gating.experts > 0 ? 2 : 1; }
  const ModuleDelta& module(ModuleId id) const {
    static const ModuleDelta kNone;
    return static_cast<size_t>(id) < modules.size() ? modules[id] : kNone;
  }
  // Where adapters are copied to a device: what holds the factors this one has in common with others,
  // whose image all of them use. nullptr: it has none.
  std::shared_ptr<const Adapter> shared;
  std::vector<SharedRows> shared_rows;  // of such an object, which has nothing else
  AlignedBuffer storage;             // with `blocks` owns everything the deltas point to
  std::vector<std::shared_ptr<const AlignedBuffer>> blocks;

 private:
  static uint64_t NextSerial() {
    static std::atomic<uint64_t> next{1};
    return next.fetch_add(1, std::memory_order_relaxed);
  }
};

// Rows [row_begin, row_end) of a step use `adapter`. Base rows have no segment.
struct AdapterSegment {
  int32_t row_begin = 0;
  int32_t row_end = 0;
  const Adapter* adapter = nullptr;
};

}  // namespace lorikeet
