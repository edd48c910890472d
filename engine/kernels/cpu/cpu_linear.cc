// LinearProducts on the CPU: two loops over the pool.
//   1. inputs: rows quantised to int8 where a weight is quantised, rounded to bfloat16 where it is
//      bfloat16 and the processor multiplies that; adapter segments put in even/odd
//      order and shrunk to their rank;
//   2. column chunks: base product, adapters' expansion, scales and biases while they are in cache.
#include <algorithm>
#include <array>
#include <optional>

#include "engine/api/limits.h"
#include "engine/kernels/cpu/cpu_backend.h"
#include "engine/kernels/cpu/float_gemm.h"
#include "engine/kernels/cpu/half_gemm.h"
#include "engine/kernels/cpu/half_weight.h"
#include "engine/kernels/cpu/lora.h"
#include "engine/kernels/cpu/structured.h"
#include "engine/kernels/cpu/widen.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

// Columns of a chunk start at multiples of this, so that LoRA's 16-column blocks align.
constexpr int32_t kColumnUnit = 16;
constexpr int64_t kChunkBytes = 24 << 10;  // of packed weight: stays in the first-level cache
constexpr int64_t kChunksPerThread = 4;
constexpr int32_t kRoundRows = 4;    // rows a task quantises or rounds
constexpr int32_t kShrinkRows = 12;  // rows of a segment a task shrinks

class CpuLinearWeight final : public LinearWeight {
 public:
  struct Part {
    // An integer product, one from 16-bit weights, else float32 from `view`.
    std::optional<QuantWeight> quant;
    std::optional<HalfWeight> half;
    TensorView view;
    std::vector<float> bias;  // [out] or empty

    int64_t column_bytes() const {
      if (half) return half->tile_bytes() / half->lanes;
      return quant ? quant->tile_bytes() / quant->lanes : view.row_bytes();
    }
    // Columns of a chunk are a multiple of this.
    int32_t column_unit() const { return half ? kHalfColumns : kColumnUnit; }
  };
  std::shared_ptr<std::vector<Part>> parts = std::make_shared<std::vector<Part>>();  // of all who share the weight
  // Of a quantised product's inputs. What feeds a softmax makes most of the change that rounding causes
  // in a model's distributions, for a small part of the work.
  int32_t input_planes = 1;
};

const CpuLinearWeight& Cpu(const LinearWeight* weight) {
  return *static_cast<const CpuLinearWeight*>(weight);
}

// Codes that are no integers have no integer products: they become bfloat16, in which bitsandbytes
// computes too.
AlignedBuffer RoundToBF16(const TensorView& weight) {
  AlignedBuffer rounded(ByteSize(DType::kBF16, weight.elements()));
  std::vector<float> row(weight.row_elements());
  uint16_t* out = rounded.as<uint16_t>();
  for (int64_t r = 0; r < weight.rows(); ++r) {
    Dequantize(weight.dtype, weight.row(r), weight.row_elements(), row.data());
    out = std::transform(row.begin(), row.end(), out, FloatToBF16);
  }
  return rounded;
}

// Into the form of the fastest product there is for its type.
void Pack(const TensorView& weight, CpuBackend::Features features, CpuLinearWeight::Part* part) {
  if (weight.dtype == DType::kNF4 || weight.dtype == DType::kScaledF8E4M3) {
    const AlignedBuffer rounded = RoundToBF16(weight);
    Pack({DType::kBF16, weight.shape, {rounded.data(), rounded.size()}}, features, part);
  } else if (IsQuantized(weight.dtype)) {
    part->quant = PackQuantWeight(weight, features.avx512_vnni ? 16 : 8);
  } else if (weight.dtype != DType::kF32) {
    const bool pairs = weight.dtype == DType::kBF16 && features.avx512_bf16;
    part->half = PackHalfWeight(weight, features.avx512 ? 16 : 8, pairs);
  }
}

}  // namespace

std::unique_ptr<LinearWeight> CpuBackend::LoadLinear(ModuleId first_module,
                                                     std::span<const LinearSource> parts) {
  LK_CHECK(!parts.empty() && parts.size() <= kMaxParts);
  auto linear = std::make_unique<CpuLinearWeight>();
  linear->first_module = first_module;
  linear->in = static_cast<int32_t>(parts[0].weight->row_elements());
  for (const LinearSource& source : parts) {
    const TensorView& weight = *source.weight;
    const int32_t out = static_cast<int32_t>(weight.rows());
    LK_CHECK(weight.row_elements() == linear->in);
    CpuLinearWeight::Part& part = linear->parts->emplace_back();
    linear->out.push_back(out);
    part.view = weight;
    if (options_.precision == Precision::kFast) Pack(weight, features_, &part);
    linear->bytes += static_cast<int64_t>(part.half ? part.half->data.size() : weight.bytes.size());
    if (source.feeds_softmax) linear->input_planes = 2;
    if (source.bias) {
      part.bias.resize(out);
      Widen(source.bias->dtype, source.bias->bytes.data(), out, part.bias.data());
    }
  }
  return linear;
}

std::unique_ptr<LinearWeight> CpuBackend::ShareLinear(const LinearWeight& weight, ModuleId first_module) {
  auto shared = std::make_unique<CpuLinearWeight>(Cpu(&weight));
  shared->first_module = first_module;
  return shared;
}

void CpuBackend::PrepareInputs(const LinearArgs& args) {
  const Matrix x = args.x;
  const int32_t width = EvenOddWidth(x.width);
  const int32_t tasks = plan_.round_tasks + static_cast<int32_t>(plan_.shrinks.size());
  pool_.ParallelFor(tasks, [&](int32_t task, int32_t) {
    if (task < plan_.round_tasks) {
      const int32_t end = std::min(x.rows, (task + 1) * kRoundRows);
      for (int32_t r = task * kRoundRows; r < end; ++r) RoundRow(x.row(r), x.width, r, &rounded_);
      return;
    }
    const AdapterSegment& rows = plan_.shrinks[task - plan_.round_tasks];
    float* x_pairs = even_odd_.as<float>() + int64_t{rows.row_begin} * width;
    for (int32_t r = rows.row_begin; r < rows.row_end; ++r) {
      ToEvenOdd(x.row(r), x.width, even_odd_.as<float>() + int64_t{r} * width);
    }
    for (size_t i = 0; i < args.weight->out.size(); ++i) {
      const LowRank& pair = rows.adapter->module(args.weight->first_module + i).low_rank;
      if (pair.rank == 0) continue;
      float* t = shrunk_.as<float>() + (int64_t(i) * x.rows + rows.row_begin) * plan_.t_stride;
      LoraShrink(pair, x.width, x_pairs, width, rows.row_end - rows.row_begin, t, plan_.t_stride);
      if (rows.adapter->gated()) GateRanks(x, rows, args.weight->first_module + i, t);
    }
  });
}

// t: the ranks of the rows' products with A.
void CpuBackend::GateRanks(Matrix x, const AdapterSegment& rows, ModuleId module, float* t) const {
  const ModuleDelta& delta = rows.adapter->module(module);
  const Gating& gating = rows.adapter->gating;
  std::array<float, Limits::kMaxExperts> shares;
  for (int32_t r = rows.row_begin; r < rows.row_end; ++r, t += plan_.t_stride) {
    const float* gates = shares.data();
    if (delta.prototypes) {
      ShareByPrototypes(rows.adapter->prototype_gates, delta.prototypes, x.row(r), x.width, shares.data());
    } else {
      gates = step_.gates[plan_.step_rows.empty() ? r : plan_.step_rows[r]];
      gates += gating.set_of[module] * gating.experts;
    }
    for (int32_t k = 0; k < delta.low_rank.rank; ++k) t[k] *= gates[delta.rank_gate[k]];
  }
}

// y: the part's columns.
void CpuBackend::ApplyDeltas(const LinearArgs& args, int32_t part, Matrix y, int32_t column_begin,
                             int32_t column_end) {
  const ModuleId module = args.weight->first_module + part;
  for (const AdapterSegment& segment : plan_.segments) {
    const ModuleDelta& delta = segment.adapter->module(module);
    if (delta.low_rank.rank > 0) {
      const float* t =
          shrunk_.as<float>() + (int64_t{part} * y.rows + segment.row_begin) * plan_.t_stride;
      LoraExpand(delta.low_rank, t, plan_.t_stride, segment.row_end - segment.row_begin,
                 column_begin, column_end, y.row(segment.row_begin), y.stride);
    }
    if (!delta.out_scale) continue;
    for (int32_t r = segment.row_begin; r < segment.row_end; ++r) {
      float* row = y.row(r);
      for (int32_t c = column_begin; c < column_end; ++c) row[c] *= delta.out_scale[c];
    }
  }
  const std::vector<float>& bias = (*Cpu(args.weight).parts)[part].bias;
  for (int32_t r = 0; !bias.empty() && r < y.rows; ++r) {
    for (int32_t c = column_begin; c < column_end; ++c) y.row(r)[c] += bias[c];
  }
  for (const AdapterSegment& segment : plan_.segments) {
    const float* extra = segment.adapter->module(module).bias;
    for (int32_t r = segment.row_begin; extra && r < segment.row_end; ++r) {
      for (int32_t c = column_begin; c < column_end; ++c) y.row(r)[c] += extra[c];
    }
  }
}

// Columns [begin, end) of the part for all rows of x, then again for rows with inputs of their own.
void CpuBackend::MultiplyRows(const LinearArgs& args, int32_t part, int32_t begin, int32_t end,
                              int32_t thread, Matrix y) {
  const CpuLinearWeight::Part& weight = (*Cpu(args.weight).parts)[part];
  const auto multiply = [&](Matrix x, const Rounded& rounded, int32_t row_begin, int32_t row_end) {
    if (weight.quant) {
      const int32_t lanes = weight.quant->lanes;
      const QuantGemmFn gemm = features_.avx512_vnni ? QuantGemmAvx512 : QuantGemmAvx2;
      gemm(*weight.quant, rounded.quant, row_begin, row_end, begin / lanes,
           (end + lanes - 1) / lanes, y);
      return;
    }
    const int32_t rows = row_end - row_begin;
    if (weight.half) {
      const HalfWeight& w = *weight.half;
      const HalfGemmFn gemm = w.pairs            ? HalfGemmAvx512Bf16
                              : features_.avx512 ? HalfGemmAvx512
                                                 : HalfGemmAvx2;
      gemm(w, (w.pairs ? rounded.half : x).Rows(row_begin, rows), begin / w.lanes,
           (end + w.lanes - 1) / w.lanes, y.Rows(row_begin, rows));
      return;
    }
    for (int32_t c = begin; c < end; c += kFloatPanelColumns) {
      FloatGemm(weight.view, x.Rows(row_begin, rows), c, std::min(end, c + kFloatPanelColumns),
                options_.batch_invariant, &panels_[thread], y.Rows(row_begin, rows));
    }
  };
  multiply(args.x, rounded_, 0, args.x.rows);
  if (!plan_.rotated) return;
  const Matrix rotated(rotated_[part].data(), args.x.rows, args.x.width);
  for (const AdapterSegment& s : plan_.segments) {
    if (s.adapter->module(args.weight->first_module + part).input_rotation.block == 0) continue;
    multiply(rotated, rounded_rotated_[part], s.row_begin, s.row_end);
  }
}

void CpuBackend::MultiplyChunk(const LinearArgs& args, int32_t task, int32_t thread) {
  int32_t i = 0;
  int32_t first_column = 0;
  while (task >= plan_.chunk_begin[i + 1]) first_column += args.weight->out[i++];
  const int32_t out = args.weight->out[i];
  const Matrix y = args.y.Columns(first_column, out);
  const int32_t begin = (task - plan_.chunk_begin[i]) * plan_.chunk_columns[i];
  const int32_t end = std::min(out, begin + plan_.chunk_columns[i]);
  MultiplyRows(args, i, begin, end, thread, y);
  ApplyDeltas(args, i, y, begin, end);
}

void CpuBackend::PlanInputs(const LinearArgs& args, std::span<const AdapterSegment> segments) {
  plan_.quantize = plan_.round = false;
  for (const CpuLinearWeight::Part& part : *Cpu(args.weight).parts) {
    if (part.quant) plan_.quantize = true;
    if (part.half && part.half->pairs) plan_.round = true;
  }
  plan_.segments.clear();
  for (const AdapterSegment& s : segments) {
    const int32_t begin = std::max(s.row_begin - args.first_row, 0);
    const int32_t end = std::min(s.row_end - args.first_row, args.x.rows);
    if (begin < end) plan_.segments.push_back({begin, end, s.adapter});
  }
  const int32_t rounded_rows = plan_.quantize || plan_.round ? args.x.rows : 0;
  plan_.round_tasks = (rounded_rows + kRoundRows - 1) / kRoundRows;
  plan_.shrinks.clear();
  plan_.t_stride = 0;
  for (const AdapterSegment& segment : plan_.segments) {
    int32_t rank = 0;
    for (size_t i = 0; i < args.weight->out.size(); ++i) {
      rank = std::max(rank, segment.adapter->module(args.weight->first_module + i).low_rank.rank);
    }
    if (rank == 0) continue;
    plan_.t_stride = std::max(plan_.t_stride, rank);
    for (int32_t r = segment.row_begin; r < segment.row_end; r += kShrinkRows) {
      const int32_t end = std::min(segment.row_end, r + kShrinkRows);
      plan_.shrinks.push_back({r, end, segment.adapter});
    }
  }
}

void CpuBackend::PlanChunks(const LinearArgs& args) {
  const std::vector<CpuLinearWeight::Part>& parts = *Cpu(args.weight).parts;
  int64_t bytes = 0;
  for (size_t i = 0; i < parts.size(); ++i) bytes += parts[i].column_bytes() * args.weight->out[i];
  // Enough chunks to share out evenly, none larger than the cache it is meant to stay in.
  const int64_t chunk_bytes = std::min(kChunkBytes, bytes / (kChunksPerThread * pool_.threads()));
  int32_t chunks = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t unit = parts[i].column_unit();
    const int64_t columns = chunk_bytes / parts[i].column_bytes() / unit * unit;
    plan_.chunk_columns[i] = static_cast<int32_t>(std::max(columns, unit));
    plan_.chunk_begin[i] = chunks;
    chunks += (args.weight->out[i] + plan_.chunk_columns[i] - 1) / plan_.chunk_columns[i];
  }
  plan_.chunk_begin[parts.size()] = chunks;
}

void CpuBackend::GrowRounded(const LinearArgs& args, Rounded* rows) {
  const int64_t count = args.x.rows, width = args.x.width;
  if (plan_.quantize) {
    const int64_t groups = width / QuantRows::kGroup;
    const int32_t planes = Cpu(args.weight).input_planes;
    const int64_t plane_groups = planes * count * groups;
    Grow(&rows->quant_storage, plane_groups * (QuantRows::kGroup + 4 * sizeof(float)));
    float* floats = rows->quant_storage.as<float>();
    rows->quant = {.rows = args.x.rows,
                   .width = args.x.width,
                   .codes = reinterpret_cast<int8_t*>(floats + 4 * plane_groups),
                   .scales = floats,
                   .sums32 = floats + plane_groups,
                   .sums16 = floats + 2 * plane_groups,
                   .planes = planes};
  }
  if (plan_.round) {
    const int64_t stride = (width + 1) / 2 * 2;
    Grow(&rows->half_storage, count * stride * sizeof(uint16_t));
    rows->half = {rows->half_storage.data(), args.x.rows, static_cast<int32_t>(stride), DType::kBF16};
  }
}

void CpuBackend::RoundRow(const float* x, int32_t width, int32_t r, Rounded* rows) {
  if (plan_.quantize) QuantizeRow(x, r, rows->quant);
  if (plan_.round) RoundRowToBF16(x, width, rows->half.row<uint16_t>(r));
}

void CpuBackend::GrowScratch(const LinearArgs& args) {
  const int64_t rows = args.x.rows;
  const int64_t width = args.x.width;
  const int64_t parts = args.weight->out.size();
  GrowRounded(args, &rounded_);
  for (int64_t i = 0; plan_.rotated && i < parts; ++i) {
    Grow(&rotated_[i], rows * width * sizeof(float));
    GrowRounded(args, &rounded_rotated_[i]);
  }
  if (!plan_.shrinks.empty()) {
    Grow(&even_odd_, rows * EvenOddWidth(width) * sizeof(float));
    Grow(&shrunk_, parts * rows * plan_.t_stride * sizeof(float));
  }
}

// Rows of segments that rotate their inputs, for each part its own.
void CpuBackend::RotateInputs(const LinearArgs& args) {
  for (const AdapterSegment& segment : plan_.segments) {
    for (size_t i = 0; i < args.weight->out.size(); ++i) {
      const InputRotation& rotation =
          segment.adapter->module(args.weight->first_module + i).input_rotation;
      if (rotation.block == 0) continue;
      pool_.ParallelFor(segment.row_end - segment.row_begin, [&](int32_t n, int32_t) {
        const int32_t row = segment.row_begin + n;
        float* out = rotated_[i].as<float>() + int64_t{row} * args.x.width;
        RotateInput(rotation, args.x.row(row), args.x.width, out);
        RoundRow(out, args.x.width, row, &rounded_rotated_[i]);
      });
    }
  }
}

void CpuBackend::LinearProducts(const LinearArgs& args) {
  const std::span<const AdapterSegment> of_logits = logit_segments_;
  if (args.rows == RowSet::kAll) return Multiply(args, step_.segments, {});
  Multiply(args, of_logits, step_.logit_rows.subspan(args.first_row));
}

void CpuBackend::Multiply(const LinearArgs& args, std::span<const AdapterSegment> segments,
                          std::span<const int32_t> rows) {
  plan_.step_rows = rows;
  PlanInputs(args, segments);
  PlanStructured(args);
  PlanChunks(args);
  GrowScratch(args);
  PrepareInputs(args);
  if (plan_.rotated) RotateInputs(args);
  pool_.ParallelFor(plan_.chunk_begin[args.weight->out.size()], [&](int32_t task, int32_t thread) {
    MultiplyChunk(args, task, thread);
  });
  ApplyStructured(args);
}

}  // namespace lorikeet
