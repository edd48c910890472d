// Low-rank products of one adapter segment: t = scale · x Aᵀ, then y += t Bᵀ, at the adapter's own
// rank. Kernels read 16 inputs as two vectors of even and odd elements, the cheapest way to widen
// bfloat16, so x comes in that order.
#pragma once

#include <cstdint>

#include "engine/api/adapter.h"
#include "engine/kernels/args.h"

namespace lorikeet {

// Width of a row in even/odd order: padded with zeros to a multiple of 16.
constexpr int32_t EvenOddWidth(int32_t width) { return (width + 15) / 16 * 16; }

// Every 16 elements of x become 8 even ones, then 8 odd ones. out: [EvenOddWidth(width)].
void ToEvenOdd(const float* x, int32_t width, float* out);

// t[r, k] = scale · Σ_i x[r, i] A[k, i], then t = rank_scale ∘ (rank_mix · t).
// x: `rows` rows in even/odd order, stride x_stride floats; t: stride t_stride floats.
void LoraShrink(const LowRank& pair, int32_t in, const float* x, int64_t x_stride, int32_t rows,
                float* t, int64_t t_stride);

// y[r, c] += delta_scale[c] · Σ_k t[r, k] B[k, c] for columns [column_begin, column_end).
// REQUIRES: column_begin is a multiple of 16. y: row 0 is the segment's first row.
void LoraExpand(const LowRank& pair, const float* t, int64_t t_stride, int32_t rows,
                int32_t column_begin, int32_t column_end, float* y, int64_t y_stride);

}  // namespace lorikeet
