// Layers with experts, and adapters that make some of an MLP.
#include <algorithm>
#include <vector>

#include "engine/kernels/cuda/cuda_backend.h"
#include "engine/kernels/cuda/elementwise.h"
#include "engine/kernels/cuda/experts.h"
#include "engine/kernels/cuda/mlp_mixture.h"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kMixturePairs = 512;  // that are computed at a time

}  // namespace

void CudaBackend::ReserveExperts() {
  const int64_t pairs = int64_t{options_.max_rows} * options_.experts_per_token;
  const int32_t widths[] = {experts_.gate_up, experts_.down_in, experts_.down_out};
  for (int i = 0; i < 3; ++i) experts_.rows[i] = Allocate(ByteSize(dtype_, pairs * widths[i]));
  const int64_t tiles = Routing{.chosen = options_.experts_per_token}.MostTiles(
      options_.max_rows, options_.experts.experts);
  const int64_t values = 4 * pairs + 1;  // experts, weights, places, rows and the count of tiles
  routing_ = Allocate(values * int64_t{sizeof(int32_t)} + tiles * int64_t{sizeof(ExpertTile)});
}

Routing CudaBackend::RoutingOf(int32_t chosen) const {
  const int64_t pairs = int64_t{options_.max_rows} * chosen;
  auto* const values = reinterpret_cast<int32_t*>(routing_.get());
  return {.chosen = chosen,
          .experts = values,
          .weights = reinterpret_cast<float*>(values + pairs),
          .places = values + 2 * pairs,
          .rows = values + 3 * pairs,
          .tile_count = values + 4 * pairs,
          .tiles = reinterpret_cast<ExpertTile*>(values + 4 * pairs + 1)};
}

// Made by a layer's first step, which is never recorded.
const void* const* CudaBackend::ExpertWeights(std::span<const Expert> experts) {
  DeviceMemory& memory = experts_.weights[experts.data()];
  if (memory == nullptr) {
    std::vector<const void*> table;
    const auto add = [&](const LinearWeight* linear) {
      table.push_back(static_cast<const CudaLinearWeight*>(linear)->memory.get());
    };
    for (const Expert& e : experts) add(e.gate_up);
    for (const Expert& e : experts) add(e.down);
    const auto bytes = static_cast<int64_t>(table.size() * sizeof(table[0]));
    memory = Allocate(bytes);
    Note(cudaMemcpyAsync(memory.get(), table.data(), bytes, cudaMemcpyHostToDevice, stream_),
         "the table of experts");
    Note(cudaStreamSynchronize(stream_), "the table of experts");
  }
  return reinterpret_cast<const void* const*>(memory.get());
}

void CudaBackend::Experts(const ExpertsArgs& args) {
  const auto experts = static_cast<int32_t>(args.experts.size());
  const LinearWeight& first = *args.experts[0].gate_up;
  const LinearWeight& last = *args.experts[0].down;
  const Routing routing = RoutingOf(args.chosen);
  const auto matrix = [&](const DeviceMemory& memory, int32_t width) {
    return Matrix(memory.get(), args.x.rows * args.chosen, width, dtype_);
  };
  const Matrix gate_up = matrix(experts_.rows[0], first.width());
  const Matrix gated = matrix(experts_.rows[1], last.in);
  const Matrix out = matrix(experts_.rows[2], last.width());
  const void* const* weights = ExpertWeights(args.experts);
  const int32_t tiles = routing.MostTiles(args.x.rows, experts);
  const auto multiply = [&](const ExpertProduct& product, const LinearWeight& linear) {
    Note(LaunchExpertProduct(product, routing, stream_), "a product of experts");
    if (!Has(Part::kExperts)) return;
    const auto parts = static_cast<int32_t>(linear.out.size());
    Note(LaunchExpertDeltas(product, {.adapters = arrays_.row_tiles(),
                                      .first_module = linear.first_module,
                                      .parts = parts,
                                      .out = linear.out[0]},
                            routing, stream_),
         "adapters of experts");
  };
  Note(LaunchRoute(args.scores, args.normalise, routing, stream_), "routing");
  multiply({.weights = weights, .gather = true, .x = args.x, .y = gate_up, .tiles = tiles}, first);
  Note(LaunchSwiGlu(gate_up, Beside(), gated, stream_), "activation");
  multiply({.weights = weights + experts, .x = gated, .y = out, .tiles = tiles}, last);
  Note(LaunchSumExperts(out, args.out, routing, stream_), "the sum of experts");
}

// Scratch for a part of the rows at a time.
void CudaBackend::MlpMixtures(const MlpMixtureArgs& args) {
  const auto rows = static_cast<int32_t>(work_.mixed_rows.size());
  const int32_t most = std::max(1, kMixturePairs / std::max(1, work_.mixture_chosen));
  for (int32_t begin = 0; begin < rows; begin += most) {
    MixRows(args, arrays_.mixed_rows() + begin, std::min(most, rows - begin));
  }
}

void CudaBackend::MixRows(const MlpMixtureArgs& args, const int32_t* rows, int32_t count) {
  const auto& gate_up = static_cast<const CudaLinearWeight&>(*args.mlp.gate_up);
  const auto& down = static_cast<const CudaLinearWeight&>(*args.mlp.down);
  const int32_t widths[] = {args.x.width, gate_up.width(), down.in, down.width()};
  constexpr int64_t kRoutingBytes = 3 * kMixturePairs * int64_t{sizeof(int32_t)};
  if (mixture_ == nullptr) {
    int64_t row = 0;
    for (const int32_t width : widths) row += width;
    mixture_ = Allocate(kRoutingBytes + ByteSize(dtype_, kMixturePairs * row));
  }
  auto* const values = reinterpret_cast<int32_t*>(mixture_.get());
  const Routing routing{.chosen = work_.mixture_chosen,
                        .experts = values,
                        .weights = reinterpret_cast<float*>(values + kMixturePairs),
                        .rows = values + 2 * kMixturePairs};
  std::byte* at = mixture_.get() + kRoutingBytes;
  Matrix scratch[4];
  for (int i = 0; i < 4; ++i) {
    scratch[i] = Matrix(at, count * routing.chosen, widths[i], dtype_);
    at += ByteSize(dtype_, int64_t{kMixturePairs} * widths[i]);
  }
  const auto& [x, gate_up_out, gated, out] = scratch;
  const auto multiply = [&](const CudaLinearWeight& weight, Linear first, Matrix from, Matrix to) {
    Multiply(weight, from, to, false);
    const ExpertDeltas deltas{.adapters = arrays_.row_tiles(),
                              .first_module = FirstMixtureModule(layout_.layers, args.layer, first),
                              .expert_modules = layout_.layers * kLinearsPerExpert,
                              .parts = static_cast<int32_t>(weight.out.size()),
                              .out = weight.out[0]};
    Note(LaunchExpertDeltas({.x = from, .y = to}, deltas, routing, stream_), "a mixture's LoRAs");
    AddBias(weight, to);
  };
  Note(LaunchDealToLoras(AdaptersOf(RowSet::kAll), args.layer, rows, count, args.x, routing, x, stream_),
       "routing to LoRAs");
  multiply(gate_up, Linear::kGate, x, gate_up_out);
  Note(LaunchSwiGlu(gate_up_out, Beside(), gated, stream_), "activation");
  multiply(down, Linear::kDown, gated, out);
  Note(LaunchSumLoras(out, count, routing, args.out, stream_), "the sum of LoRAs");
}

}  // namespace lorikeet::cuda
