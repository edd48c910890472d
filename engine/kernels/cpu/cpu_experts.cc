// Layers with experts on the CPU: rows are dealt out, then each expert multiplies its rows at once.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/kernels/cpu/cpu_backend.h"

namespace lorikeet {
namespace {

// fn(expert, weight) for the experts that a row of scores chooses.
template <typename Fn>
void ForChosen(const ExpertsArgs& args, const float* scores, std::vector<int32_t>* order,
               const Fn& fn) {
  const auto experts = static_cast<int32_t>(args.experts.size());
  order->resize(experts);
  std::iota(order->begin(), order->end(), 0);
  const auto chosen = order->begin() + args.chosen;
  std::partial_sort(order->begin(), chosen, order->end(), [scores](int32_t a, int32_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  const float top = scores[order->front()];
  float sum = 0;
  for (auto e = order->begin(); e != (args.normalise ? chosen : order->end()); ++e) {
    sum += std::exp(scores[*e] - top);
  }
  for (auto e = order->begin(); e != chosen; ++e) fn(*e, std::exp(scores[*e] - top) / sum);
}

}  // namespace

void CpuBackend::Route(const ExpertsArgs& args) {
  routed_.resize(args.experts.size());
  for (Routed& routed : routed_) {
    routed.rows.clear();
    routed.weights.clear();
  }
  std::vector<int32_t> order;
  for (int32_t r = 0; r < args.x.rows; ++r) {
    ForChosen(args, args.scores.row(r), &order, [&](int32_t expert, float weight) {
      routed_[expert].rows.push_back(r);
      routed_[expert].weights.push_back(weight);
    });
  }
}

void CpuBackend::ApplyExpert(const ExpertsArgs& args, int32_t expert) {
  const Routed& routed = routed_[expert];
  const Expert& weights = args.experts[expert];
  const auto rows = static_cast<int32_t>(routed.rows.size());
  const auto scratch = [rows](AlignedBuffer* buffer, int32_t width) {
    Grow(buffer, int64_t{rows} * width * static_cast<int64_t>(sizeof(float)));
    return Matrix(buffer->data(), rows, width);
  };
  const Matrix x = scratch(&expert_in_, weights.gate_up->in);
  const Matrix gate_up = scratch(&expert_gate_up_, weights.gate_up->width());
  const Matrix gated = scratch(&expert_gated_, weights.down->in);
  const Matrix out = scratch(&expert_out_, weights.down->width());
  const std::vector<AdapterSegment> segments = SegmentsOf(routed.rows);
  ForRows(rows, [&](int32_t i) { std::copy_n(args.x.row(routed.rows[i]), x.width, x.row(i)); });
  Multiply({.weight = weights.gate_up, .x = x, .y = gate_up}, segments, routed.rows);
  SwiGlu(gate_up, gated);
  Multiply({.weight = weights.down, .x = gated, .y = out}, segments, routed.rows);
  ForRows(rows, [&](int32_t i) {
    float* sum = args.out.row(routed.rows[i]);
    for (int32_t c = 0; c < out.width; ++c) sum[c] += routed.weights[i] * out.row(i)[c];
  });
}

void CpuBackend::Experts(const ExpertsArgs& args) {
  Route(args);
  ForRows(args.out.rows, [&](int32_t r) { std::fill_n(args.out.row(r), args.out.width, 0.0f); });
  for (size_t e = 0; e < args.experts.size(); ++e) {
    if (!routed_[e].rows.empty()) ApplyExpert(args, static_cast<int32_t>(e));
  }
}

}  // namespace lorikeet
