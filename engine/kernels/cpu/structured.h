// The parts of an adapted linear that are neither low-rank nor vectors, row by row
// (engine/api/adapter.h defines them). All rows are float32.
#pragma once

#include <cstdint>

#include "engine/api/adapter.h"

namespace lorikeet {

// out = R(x). Rows [in]; out and x differ.
void RotateInput(const InputRotation& rotation, const float* x, int32_t in, float* out);

// y += out_scale ∘ S(x): all of kronecker, circulant, sparse and dense.
void AddStructured(const ModuleDelta& delta, const float* x, int32_t in, int32_t out, float* y);

// y = Q(y), in place.
void RotateOutput(const OutputRotation& rotation, int32_t out, float* y);

// y[index[k]] = x · rows[k]; y holds at least every index.
void ReplaceOutputs(const ReplacedRows& rows, const float* x, int32_t in, float* y);

// Row k of `rows`, [width] floats.
void ReadDenseRow(const DenseRows& rows, int32_t k, int32_t width, float* out);

// Where `id` stands in the replaced rows, or -1.
int32_t FindReplaced(const ReplacedRows& rows, int32_t id);

// h += what the bottleneck makes of h and the residual r. Rows [width].
void AddBottleneck(const Bottleneck& bottleneck, const float* r, int32_t width, float* h);

// out += gate · softmax(q Kᵀ · scale) V for all heads of one row.
void AddPromptAttention(const PromptAttention& prompt, const float* q, int32_t heads,
                        int32_t kv_heads, int32_t head_dim, float scale, float* out);

// shares: [gates.experts], of a row of a linear whose prototypes these are.
void ShareByPrototypes(const PrototypeGates& gates, const float* prototypes, const float* x, int32_t in,
                       float* shares);

}  // namespace lorikeet
