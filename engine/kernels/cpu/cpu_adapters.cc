// What adapters change beyond low-rank pairs and vectors of linears, row by row.
#include <algorithm>

#include "engine/kernels/cpu/cpu_backend.h"
#include "engine/kernels/cpu/structured.h"
#include "engine/kernels/cpu/widen.h"

namespace lorikeet {

void CpuBackend::AdaptEmbedding(const Adapter& adapter, int32_t token, float* row, int32_t width) {
  const auto widen = [&](const LowRank& pair, const std::byte* data, int64_t index) {
    float value;
    Widen(pair.dtype, data + ByteSize(pair.dtype, index), 1, &value);
    return value;
  };
  const EmbeddingDelta& delta = adapter.embedding;
  const LowRank& pair = delta.low_rank;
  for (int32_t k = 0; k < pair.rank; ++k) {
    const float weight = pair.scale * widen(pair, pair.a, k * pair.a_stride + token);
    for (int32_t i = 0; i < width; ++i) row[i] += weight * widen(pair, pair.b, k * pair.b_stride + i);
  }
  for (int32_t i = 0; delta.out_scale && i < width; ++i) row[i] *= delta.out_scale[i];
}

// A token below zero is a virtual one: -1 - k is the adapter's k-th.
void CpuBackend::EmbedRow(const Adapter* adapter, int32_t token, float* row, int32_t width) {
  if (token < 0) {
    const float* rows = adapter->virtual_tokens.rows;
    if (rows) std::copy_n(rows + int64_t{-1 - token} * width, width, row);
    else std::fill_n(row, width, 0.0f);
    return;
  }
  const int32_t replaced = adapter ? FindReplaced(adapter->embedding.rows, token) : -1;
  if (replaced >= 0) {
    ReadDenseRow(adapter->embedding.rows.rows, replaced, width, row);
  } else {
    Widen(embedding_.dtype, embedding_.row(token), width, row);
  }
  if (adapter) AdaptEmbedding(*adapter, token, row, width);
}

void CpuBackend::Embed(Matrix out) {
  ForRows(static_cast<int32_t>(step_.tokens.size()), [&](int32_t t) {
    EmbedRow(AdapterOf(t), step_.tokens[t], out.row(t), out.width);
  });
}

void CpuBackend::Bottlenecks(const BottleneckArgs& args) {
  ForAdapterRows([&](const Adapter& adapter, int32_t row) {
    if (adapter.bottlenecks.empty()) return;
    const Bottleneck& bottleneck = adapter.bottlenecks[args.block];
    if (bottleneck.width == 0) return;
    AddBottleneck(bottleneck, args.x.row(row), args.delta.width, args.delta.row(row));
  });
}

void CpuBackend::AttendPrompts(const AttentionArgs& args) {
  ForAdapterRows([&](const Adapter& adapter, int32_t row) {
    if (adapter.prompt_attention.empty()) return;
    const PromptAttention& prompt = adapter.prompt_attention[args.layer];
    if (prompt.count == 0) return;
    AddPromptAttention(prompt, args.q.row(row), args.heads, kv_.layout.kv_heads,
                       kv_.layout.head_dim, args.scale, args.out.row(row));
  });
}

// A virtual token's keys and values are what its adapter stores for it.
void CpuBackend::StorePrefix(const RopeStoreArgs& args, int32_t row) {
  if (step_.tokens[row] >= 0) return;
  const VirtualTokens& tokens = AdapterOf(row)->virtual_tokens;
  if (!tokens.kv) return;
  const int64_t width = args.k.width;
  const int64_t k = (int64_t{2} * args.layer * tokens.count + (-1 - step_.tokens[row])) * width;
  std::copy_n(tokens.kv + k, width, args.k.row(row));
  std::copy_n(tokens.kv + k + tokens.count * width, width, args.v.row(row));
}

void CpuBackend::PlanStructured(const LinearArgs& args) {
  plan_.rotated = false;
  plan_.structured = false;
  for (const AdapterSegment& segment : plan_.segments) {
    for (size_t i = 0; i < args.weight->out.size(); ++i) {
      const ModuleDelta& delta = segment.adapter->module(args.weight->first_module + i);
      plan_.rotated |= delta.input_rotation.block > 0;
      plan_.structured |= delta.structured();
    }
  }
}

void CpuBackend::ApplyStructured(const LinearArgs& args) {
  if (!plan_.structured) return;
  for (const AdapterSegment& segment : plan_.segments) {
    pool_.ParallelFor(segment.row_end - segment.row_begin, [&](int32_t i, int32_t) {
      const int32_t row = segment.row_begin + i;
      const float* x = args.x.row(row);
      int32_t column = 0;
      for (size_t part = 0; part < args.weight->out.size(); ++part) {
        const int32_t out = args.weight->out[part];
        const ModuleDelta& delta = segment.adapter->module(args.weight->first_module + part);
        float* y = args.y.row(row) + column;
        if (delta.adds()) AddStructured(delta, x, args.x.width, out, y);
        if (delta.output_rotation.scale) RotateOutput(delta.output_rotation, out, y);
        if (delta.rows.rows.data) ReplaceOutputs(delta.rows, x, args.x.width, y);
        column += out;
      }
    });
  }
}

}  // namespace lorikeet
