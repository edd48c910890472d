// Layers with experts.
#include <vector>

#include "engine/kernels/cuda/cuda_backend.h"
#include "engine/kernels/cuda/elementwise.h"
#include "engine/kernels/cuda/experts.h"

namespace lorikeet::cuda {

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
    Note(LaunchExpertDeltas(product, {arrays_.row_tiles(), linear.first_module, parts, linear.out[0]},
                            routing, stream_),
         "adapters of experts");
  };
  Note(LaunchRoute(args.scores, args.normalise, routing, stream_), "routing");
  multiply({.weights = weights, .gather = true, .x = args.x, .y = gate_up, .tiles = tiles}, first);
  Note(LaunchSwiGlu(gate_up, Beside(), gated, stream_), "activation");
  multiply({.weights = weights + experts, .x = gated, .y = out, .tiles = tiles}, last);
  Note(LaunchSumExperts(out, args.out, routing, stream_), "the sum of experts");
}

}  // namespace lorikeet::cuda
