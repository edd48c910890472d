// Layers with experts on the CPU: rows are dealt out, then each expert multiplies its rows at once. And
// MLPs with LoRAs among which rows are dealt out, whose product is one.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/base/dot.h"
#include "engine/kernels/cpu/cpu_backend.h"

namespace lorikeet {
namespace {

// fn(expert, weight) for the `chosen` experts that a row of scores chooses.
template <typename Fn>
void ForChosen(std::span<const float> scores, int32_t chosen, bool normalise,
               std::vector<int32_t>* order, const Fn& fn) {
  order->resize(scores.size());
  std::iota(order->begin(), order->end(), 0);
  const auto end = order->begin() + chosen;
  std::partial_sort(order->begin(), end, order->end(), [scores](int32_t a, int32_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  const float top = scores[order->front()];
  float sum = 0;
  for (auto e = order->begin(); e != (normalise ? end : order->end()); ++e) {
    sum += std::exp(scores[*e] - top);
  }
  for (auto e = order->begin(); e != end; ++e) fn(*e, std::exp(scores[*e] - top) / sum);
}

}  // namespace

void CpuBackend::Route(const ExpertsArgs& args) {
  routed_.assign(args.experts.size(), {});
  std::vector<int32_t> order;
  for (int32_t r = 0; r < args.x.rows; ++r) {
    ForChosen(std::span(args.scores.row(r), args.experts.size()), args.chosen, args.normalise, &order,
              [&](int32_t expert, float weight) { routed_[expert].Add(r, weight); });
  }
}

void CpuBackend::ApplyExpert(const Expert& weights, Matrix from, const Routed& routed,
                             std::span<const AdapterSegment> segments, Matrix to) {
  const auto rows = static_cast<int32_t>(routed.rows.size());
  const auto scratch = [rows](AlignedBuffer* buffer, int32_t width) {
    Grow(buffer, int64_t{rows} * width * static_cast<int64_t>(sizeof(float)));
    return Matrix(buffer->data(), rows, width);
  };
  const Matrix x = scratch(&expert_in_, weights.gate_up->in);
  const Matrix gate_up = scratch(&expert_gate_up_, weights.gate_up->width());
  const Matrix gated = scratch(&expert_gated_, weights.down->in);
  const Matrix out = scratch(&expert_out_, weights.down->width());
  ForRows(rows, [&](int32_t i) { std::copy_n(from.row(routed.rows[i]), x.width, x.row(i)); });
  Multiply({.weight = weights.gate_up, .x = x, .y = gate_up}, segments, routed.rows);
  SwiGlu(gate_up, gated);
  Multiply({.weight = weights.down, .x = gated, .y = out}, segments, routed.rows);
  // By columns: a row may be there several times.
  constexpr int32_t kColumns = 256;
  pool_.ParallelFor((out.width + kColumns - 1) / kColumns, [&](int32_t task, int32_t) {
    const int32_t end = std::min(out.width, (task + 1) * kColumns);
    for (int32_t i = 0; i < rows; ++i) {
      float* sum = to.row(routed.rows[i]);
      for (int32_t c = task * kColumns; c < end; ++c) sum[c] += routed.weights[i] * out.row(i)[c];
    }
  });
}

void CpuBackend::Experts(const ExpertsArgs& args) {
  Route(args);
  ForRows(args.out.rows, [&](int32_t r) { std::fill_n(args.out.row(r), args.out.width, 0.0f); });
  for (size_t e = 0; e < args.experts.size(); ++e) {
    const Routed& routed = routed_[e];
    if (routed.rows.empty()) continue;
    ApplyExpert(args.experts[e], args.x, routed, SegmentsOf(routed.rows), args.out);
  }
}

// The segment's rows by the LoRA that is chosen for them, each a segment of its own, behind `dealt`.
void CpuBackend::DealOut(const AdapterSegment& segment, const MlpMixtureArgs& args, Routed* dealt,
                         std::vector<AdapterSegment>* segments) {
  const MlpMixture& mixture = segment.adapter->mlp_mixture;
  const std::vector<float>& router = mixture.routers[args.layer];
  const auto experts = static_cast<int32_t>(mixture.experts.size());
  const int32_t rows = segment.row_end - segment.row_begin;
  std::vector<float> scores(int64_t{rows} * experts);
  ForRows(rows, [&](int32_t i) {
    const float* x = args.x.row(segment.row_begin + i);
    for (int32_t e = 0; e < experts; ++e) {
      scores[int64_t{i} * experts + e] = Dot(x, &router[int64_t{e} * args.x.width], args.x.width);
    }
  });
  routed_.assign(experts, {});
  std::vector<int32_t> order;
  for (int32_t i = 0; i < rows; ++i) {
    ForChosen(std::span(scores).subspan(int64_t{i} * experts, experts), mixture.chosen, true, &order,
              [&](int32_t e, float weight) { routed_[e].Add(segment.row_begin + i, weight); });
  }
  for (int32_t e = 0; e < experts; ++e) {
    const auto begin = static_cast<int32_t>(dealt->rows.size());
    for (size_t k = 0; k < routed_[e].rows.size(); ++k) dealt->Add(routed_[e].rows[k], routed_[e].weights[k]);
    const auto end = static_cast<int32_t>(dealt->rows.size());
    if (begin < end) segments->push_back({begin, end, mixture.experts[e].get()});
  }
}

// All rows of all adapters with mixtures in one product, in which a row is there for each of its LoRAs.
void CpuBackend::MlpMixtures(const MlpMixtureArgs& args) {
  Routed dealt;
  std::vector<AdapterSegment> segments;
  for (const AdapterSegment& segment : step_.segments) {
    if (segment.adapter->mlp_mixture.experts.empty()) continue;
    DealOut(segment, args, &dealt, &segments);
    for (int32_t r = segment.row_begin; r < segment.row_end; ++r) {
      std::fill_n(args.out.row(r), args.out.width, 0.0f);
    }
  }
  if (!segments.empty()) ApplyExpert(args.mlp, args.x, dealt, segments, args.out);
}

}  // namespace lorikeet
