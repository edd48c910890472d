// LinearProducts on the CPU: two loops over the pool.
//   1. inputs: rows quantised to int8 where a weight is quantised; adapter segments put in even/odd
//      order and shrunk to their rank;
//   2. column chunks: base product, adapters' expansion, scales and biases while they are in cache.
#include <algorithm>
#include <optional>

#include "engine/kernels/cpu/cpu_backend.h"
#include "engine/kernels/cpu/float_gemm.h"
#include "engine/kernels/cpu/lora.h"
#include "engine/kernels/cpu/widen.h"

namespace lorikeet {
namespace {

// Columns of a chunk start at multiples of this, so that LoRA's 16-column blocks align.
constexpr int32_t kColumnUnit = 16;
constexpr int64_t kChunkBytes = 24 << 10;  // of packed weight: stays in the first-level cache
constexpr int64_t kChunksPerThread = 4;
constexpr int32_t kQuantRows = 4;    // rows a task quantises
constexpr int32_t kShrinkRows = 12;  // rows of a segment a task shrinks

class CpuLinearWeight final : public LinearWeight {
 public:
  std::optional<QuantWeight> quant;  // integer product, else float32 from `view`
  TensorView view;

  int64_t column_bytes() const {
    return quant ? quant->tile_bytes() / quant->lanes : view.row_bytes();
  }
};

const CpuLinearWeight& Cpu(const LinearWeight* weight) {
  return *static_cast<const CpuLinearWeight*>(weight);
}

}  // namespace

std::unique_ptr<LinearWeight> CpuBackend::LoadLinear(const TensorView& weight,
                                                     const TensorView* bias) {
  auto linear = std::make_unique<CpuLinearWeight>();
  linear->in = static_cast<int32_t>(weight.row_elements());
  linear->out = static_cast<int32_t>(weight.rows());
  linear->view = weight;
  if (options_.precision == Precision::kFast && IsQuantized(weight.dtype)) {
    linear->quant = PackQuantWeight(weight, features_.avx512_vnni ? 16 : 8);
  }
  if (bias) {
    linear->bias.resize(linear->out);
    Widen(bias->dtype, bias->bytes.data(), linear->out, linear->bias.data());
  }
  return linear;
}

void CpuBackend::PrepareInputs(const LinearGroup& group) {
  const Matrix x = group.x;
  const int32_t width = EvenOddWidth(x.width);
  const int32_t tasks = plan_.quant_tasks + static_cast<int32_t>(plan_.shrinks.size());
  pool_.ParallelFor(tasks, [&](int32_t task, int32_t) {
    if (task < plan_.quant_tasks) {
      const int32_t end = std::min(x.rows, (task + 1) * kQuantRows);
      for (int32_t r = task * kQuantRows; r < end; ++r) QuantizeRow(x.row(r), r, quant_rows_);
      return;
    }
    const AdapterSegment& rows = plan_.shrinks[task - plan_.quant_tasks];
    float* x_pairs = even_odd_.as<float>() + int64_t{rows.row_begin} * width;
    for (int32_t r = rows.row_begin; r < rows.row_end; ++r) {
      ToEvenOdd(x.row(r), x.width, even_odd_.as<float>() + int64_t{r} * width);
    }
    for (size_t o = 0; o < group.outputs.size(); ++o) {
      const LowRank& pair = rows.adapter->modules[group.outputs[o].module].low_rank;
      if (pair.rank == 0) continue;
      float* t = shrunk_.as<float>() + (int64_t(o) * x.rows + rows.row_begin) * plan_.t_stride;
      LoraShrink(pair, x.width, x_pairs, width, rows.row_end - rows.row_begin, t, plan_.t_stride);
    }
  });
}

void CpuBackend::ApplyDeltas(const LinearGroup& group,
                             const LinearOutput& output, int32_t output_index,
                             int32_t column_begin, int32_t column_end) {
  const Matrix y = output.y;
  for (const AdapterSegment& segment : group.segments) {
    const ModuleDelta& delta = segment.adapter->modules[output.module];
    if (delta.low_rank.rank > 0) {
      const float* t = shrunk_.as<float>() +
                       (int64_t{output_index} * y.rows + segment.row_begin) * plan_.t_stride;
      LoraExpand(delta.low_rank, t, plan_.t_stride, segment.row_end - segment.row_begin,
                 column_begin, column_end, y.row(segment.row_begin), y.width);
    }
    if (!delta.out_scale) continue;
    for (int32_t r = segment.row_begin; r < segment.row_end; ++r) {
      float* row = y.row(r);
      for (int32_t c = column_begin; c < column_end; ++c) row[c] *= delta.out_scale[c];
    }
  }
  const std::vector<float>& bias = output.weight->bias;
  for (int32_t r = 0; !bias.empty() && r < y.rows; ++r) {
    for (int32_t c = column_begin; c < column_end; ++c) y.row(r)[c] += bias[c];
  }
  for (const AdapterSegment& segment : group.segments) {
    const float* extra = segment.adapter->modules[output.module].bias;
    for (int32_t r = segment.row_begin; extra && r < segment.row_end; ++r) {
      for (int32_t c = column_begin; c < column_end; ++c) y.row(r)[c] += extra[c];
    }
  }
}

void CpuBackend::MultiplyChunk(const LinearGroup& group, int32_t task,
                               int32_t thread) {
  int32_t o = 0;
  while (task >= plan_.chunk_begin[o + 1]) ++o;
  const LinearOutput& output = group.outputs[o];
  const CpuLinearWeight& weight = Cpu(output.weight);
  const int32_t begin = (task - plan_.chunk_begin[o]) * plan_.chunk_columns[o];
  const int32_t end = std::min(weight.out, begin + plan_.chunk_columns[o]);
  if (weight.quant) {
    const int32_t lanes = weight.quant->lanes;
    const QuantGemmFn gemm = features_.avx512_vnni ? QuantGemmAvx512 : QuantGemmAvx2;
    gemm(*weight.quant, quant_rows_, 0, group.x.rows, begin / lanes, (end + lanes - 1) / lanes,
         output.y);
  } else {
    for (int32_t c = begin; c < end; c += kFloatPanelColumns) {
      FloatGemm(weight.view, group.x, c, std::min(end, c + kFloatPanelColumns), &panels_[thread],
                output.y);
    }
  }
  ApplyDeltas(group, output, o, begin, end);
}

void CpuBackend::PlanInputs(const LinearGroup& group) {
  plan_.quantize = false;
  for (const LinearOutput& output : group.outputs) {
    if (Cpu(output.weight).quant) plan_.quantize = true;
  }
  plan_.quant_tasks = plan_.quantize ? (group.x.rows + kQuantRows - 1) / kQuantRows : 0;
  plan_.shrinks.clear();
  plan_.t_stride = 0;
  for (const AdapterSegment& segment : group.segments) {
    int32_t rank = 0;
    for (const LinearOutput& output : group.outputs) {
      rank = std::max(rank, segment.adapter->modules[output.module].low_rank.rank);
    }
    if (rank == 0) continue;
    plan_.t_stride = std::max(plan_.t_stride, rank);
    for (int32_t r = segment.row_begin; r < segment.row_end; r += kShrinkRows) {
      const int32_t end = std::min(segment.row_end, r + kShrinkRows);
      plan_.shrinks.push_back({r, end, segment.adapter});
    }
  }
}

void CpuBackend::PlanChunks(const LinearGroup& group) {
  int64_t bytes = 0;
  for (const LinearOutput& output : group.outputs) {
    bytes += Cpu(output.weight).column_bytes() * output.weight->out;
  }
  // Enough chunks to share out evenly, none larger than the cache it is meant to stay in.
  const int64_t chunk_bytes = std::min(kChunkBytes, bytes / (kChunksPerThread * pool_.threads()));
  int32_t chunks = 0;
  for (size_t o = 0; o < group.outputs.size(); ++o) {
    const CpuLinearWeight& weight = Cpu(group.outputs[o].weight);
    const int64_t columns = chunk_bytes / weight.column_bytes() / kColumnUnit * kColumnUnit;
    plan_.chunk_columns[o] = static_cast<int32_t>(std::max<int64_t>(columns, kColumnUnit));
    plan_.chunk_begin[o] = chunks;
    chunks += (weight.out + plan_.chunk_columns[o] - 1) / plan_.chunk_columns[o];
  }
  plan_.chunk_begin[group.outputs.size()] = chunks;
}

void CpuBackend::GrowScratch(const LinearGroup& group) {
  const int64_t rows = group.x.rows;
  const int64_t width = group.x.width;
  const auto grow = [](AlignedBuffer* buffer, int64_t bytes) {
    if (static_cast<int64_t>(buffer->size()) < bytes) *buffer = AlignedBuffer(bytes);
  };
  if (plan_.quantize) {
    const int64_t groups = width / QuantRows::kGroup;
    grow(&quant_storage_, rows * (width + 16 * groups));
    float* floats = quant_storage_.as<float>();
    quant_rows_.rows = rows;
    quant_rows_.width = width;
    quant_rows_.scales = floats;
    quant_rows_.sums32 = floats + rows * groups;
    quant_rows_.sums16 = floats + 2 * rows * groups;
    quant_rows_.codes = reinterpret_cast<int8_t*>(floats + 4 * rows * groups);
  }
  if (!plan_.shrinks.empty()) {
    grow(&even_odd_, rows * EvenOddWidth(width) * sizeof(float));
    grow(&shrunk_, group.outputs.size() * rows * plan_.t_stride * sizeof(float));
  }
}

void CpuBackend::LinearProducts(const LinearGroup& group) {
  LK_CHECK(group.outputs.size() <= kMaxOutputs);
  PlanInputs(group);
  PlanChunks(group);
  GrowScratch(group);
  PrepareInputs(group);
  pool_.ParallelFor(plan_.chunk_begin[group.outputs.size()], [&](int32_t task, int32_t thread) {
    MultiplyChunk(group, task, thread);
  });
}

}  // namespace lorikeet
