// What an adapter changes beyond low-rank pairs, output scales and biases of linears, as kernels read
// it: the parts of engine/api/adapter.h by the same names, their matrices in pages of the pool.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/api/adapter.h"
#include "engine/api/module.h"

namespace lorikeet::cuda {

// Rows of one width and type in an image's pages, packed, none across two pages. Where a row is a
// multiple of 16 bytes it is aligned to 16.
struct PagedRows {
  const void* first = nullptr;         // row 0; nullptr: no rows
  const void* const* pages = nullptr;  // of the rows behind the first page's
  uint32_t first_rows = 0;             // in the first page
  uint32_t page_rows = 1;              // that every page behind it holds
  uint32_t pitch = 0;                  // bytes from row to row
  int32_t rows = 0;

  template <typename T>
  constexpr const T* row(uint32_t k) const {
    const void* page = first;
    if (k >= first_rows) {
      page = pages[(k - first_rows) / page_rows];
      k = (k - first_rows) % page_rows;
    }
    return static_cast<const T*>(static_cast<const void*>(
        static_cast<const std::byte*>(page) + uint64_t{k} * pitch));
  }
  // Rows from row k on that lie one behind the other.
  constexpr uint32_t together(uint32_t k) const {
    return k < first_rows ? first_rows - k : page_rows - (k - first_rows) % page_rows;
  }
};

// T: the activation type, which matrices are kept in; vectors are one row of float32.
struct ReplacedParts {
  PagedRows rows;   // [rows, width] T
  PagedRows index;  // [rows, 1] int32, ascending; without rows: 0, 1, 2, ...
};

struct ModuleParts {
  int32_t rotation_block = 0;
  int32_t output_half = 0;
  int32_t in1 = 0, in2 = 0, out1 = 0, out2 = 0;  // of w1 ⊗ w2
  int32_t circulant_block = 0;
  PagedRows rotation;                        // [in, rotation_block] T
  PagedRows output_scale, output_cross;      // [out]
  PagedRows w1, w2;                          // [out1, in1], [out2, in2] T
  PagedRows circulant;                       // [out / b * in / b, b] T
  PagedRows row_begin;                       // [out + 1, 1] int32
  PagedRows column, value;                   // [nonzeros, 1] int32, float32
  PagedRows dense;                           // [out, in] T
  PagedRows rank_scale, delta_scale;         // of the low-rank pair: [rank], [out]
  // [rank] int32: which of a row's gates scales a rank, counted from `first_gate` unless there are
  // prototypes, whose shares are the gates.
  PagedRows rank_gate;
  int32_t first_gate = 0;
  PagedRows prototypes;                      // [experts, in] T
  ReplacedParts replaced;                    // of width in
};

struct EmbeddingParts {
  int32_t rank = 0;
  float scale = 0;
  PagedRows a;          // [vocab, rank] T: a row is a token's
  PagedRows b;          // [rank, D] T
  PagedRows out_scale;  // [D]
  ReplacedParts replaced;
};

struct VirtualTokenParts {
  int32_t count = 0;
  PagedRows rows;  // [count, D] T, or
  PagedRows kv;    // [layers * 2 * count, kv_heads * head_dim] T
};

struct PromptAttentionParts {
  int32_t count = 0;
  float gate = 0;
  PagedRows k, v;  // [count, kv_heads * head_dim] T
};

struct BottleneckParts {
  int32_t width = 0;
  Bottleneck::Input input = Bottleneck::Input::kOutput;
  Activation activation = Activation::kRelu;
  float scale = 0;
  PagedRows down, up;            // [width, D], [D, width] T
  PagedRows down_bias, up_bias;  // [width], [D]
};

// The LoRAs' pairs are RankTiles behind the model's modules: FirstMixtureModule.
struct MlpMixtureParts {
  int32_t experts = 0;
  int32_t chosen = 0;
  const PagedRows* routers = nullptr;  // [layers] of [experts, D] T
};

// Of a model of `layers` layers, the number of `linear` in LoRA 0 of an adapter's mixture; LoRAs are
// `layers` * kLinearsPerExpert apart.
constexpr ModuleId FirstMixtureModule(int32_t layers, int32_t layer, Linear linear) {
  return ModuleCount(layers) + layer * kLinearsPerExpert + static_cast<int>(linear) - static_cast<int>(Linear::kGate);
}

struct AdapterParts {
  const ModuleParts* modules = nullptr;  // by ModuleId, or nullptr
  EmbeddingParts embedding;
  const PagedRows* norms = nullptr;      // by NormIndex, or nullptr
  VirtualTokenParts virtual_tokens;
  const PromptAttentionParts* prompt_attention = nullptr;  // [layers] or nullptr
  const BottleneckParts* bottlenecks = nullptr;            // by NormIndex, or nullptr
  PrototypeGates prototype_gates;
  MlpMixtureParts mixture;
};

// What a step must launch kernels for, as bits of a PartSet.
enum class Part : uint32_t {
  kOutScale = 1 << 0,    // of a linear, computed by the low-rank kernels
  // Of linears, LinearSet says of which.
  kInputRotation = 1 << 1,
  kKronecker = 1 << 2,
  kCirculant = 1 << 3,
  kRows = 1 << 4,        // sparse, dense
  kOutputRotation = 1 << 5,
  kReplacedRows = 1 << 6,
  kEmbedding = 1 << 7,   // and virtual tokens
  kNorms = 1 << 8,
  kPrefix = 1 << 9,      // virtual tokens that are keys and values
  kPromptAttention = 1 << 10,
  kBottlenecks = 1 << 11,
  kExperts = 1 << 12,    // low-rank pairs, output scales and biases of experts
  kBias = 1 << 13,       // of a linear, as kOutScale
  kScaledPairs = 1 << 14,  // ranks and deltas of pairs, by vectors or gates, computed by the low-rank kernels
  kPrototypes = 1 << 15,   // gates that linears make of their inputs
  kMixture = 1 << 16,      // LoRAs of MLPs
  kLongRanks = 1 << 17,    // pairs of more than kFewTiles, by the low-rank kernels
};
using PartSet = uint32_t;

constexpr PartSet Bit(Part part) { return static_cast<PartSet>(part); }
PartSet PartsOf(const Adapter& adapter, const ExpertModules& experts);
// Whether the pair's ranks or its delta have scales or gates.
bool IsScaled(const ModuleDelta& delta);
// Whether an AdapterParts is needed for them.
constexpr bool BeyondLowRank(PartSet parts) {
  return (parts & ~(Bit(Part::kOutScale) | Bit(Part::kBias) | Bit(Part::kExperts) | Bit(Part::kLongRanks))) != 0;
}

// Which linears have what in some layer: eight bits a LinearPart, by Linear, the head's last. A router
// counts as the linear of its number; experts do not count.
enum class LinearPart : uint32_t {
  kAny = 0,
  kInputRotation = 8,
  kSum = 16,     // Kronecker, circulant, sparse, dense
  kOutput = 24,  // output rotation, replaced rows
};
using LinearSet = uint32_t;
inline constexpr uint32_t kHeadLinear = 1u << kLinearsPerLayer;
inline constexpr LinearSet kHeadLinears = kHeadLinear * 0x01010101u;
static_assert(kHeadLinear < 1u << 8);

LinearSet LinearsOf(const Adapter& adapter, const ExpertModules& experts);

// The adapters of an operation's rows.
struct RowAdapters {
  const AdapterParts* const* parts = nullptr;  // [T] of the step's rows; nullptr: none of these parts
  const float* const* gates = nullptr;         // [T] as StepInput has them; nullptr: the row has none
  const int32_t* logit_rows = nullptr;         // RowSet::kLogits: the step's row of each
  int32_t first_row = 0;                       // of the row set: row 0 is its row `first_row`

  constexpr const AdapterParts* of(int32_t row) const { return parts[step_row(row)]; }
  constexpr const float* gates_of(int32_t row) const { return gates[step_row(row)]; }

 private:
  constexpr int32_t step_row(int32_t row) const {
    const int32_t at = row + first_row;
    return logit_rows != nullptr ? logit_rows[at] : at;
  }
};

}  // namespace lorikeet::cuda
