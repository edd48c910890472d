// Low-rank products alone: one linear's shrink and expand for a batch of rows over adapters, on
// 16 layers' factors in rotation, cache flushed, recorded. Prints a line a case: time of one
// linear, bytes of the distinct factors in it and of x and y, their share of the read bandwidth
// measured in the same run, and the time beside the base product.
//   bench_lora [--quick]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "bench/device.h"
#include "engine/kernels/cuda/gemm.h"
#include "engine/kernels/cuda/low_rank.h"

namespace lorikeet::bench {
namespace {

using cuda::DeviceSegment;
using cuda::RankTile;

constexpr int kLayers = 16;

struct Site {
  const char* name;
  int32_t in;
  std::vector<int32_t> out;

  int32_t width() const { return std::accumulate(out.begin(), out.end(), 0); }
};
const Site kSites[] = {
    {"o 4096->4096", 4096, {4096}},
    {"qkv 4096->6144", 4096, {4096, 1024, 1024}},
    {"gate-up 4096->28672", 4096, {14336, 14336}},
    {"down 14336->4096", 14336, {4096}},
};

// Rows to adapters. Ranks are taken in turn.
struct Mix {
  std::string name;
  std::vector<int32_t> rows;  // of each adapter
};

Mix Distinct(int32_t batch) { return {"distinct", std::vector<int32_t>(batch, 1)}; }
Mix Quarter(int32_t batch) {
  return {"quarter", std::vector<int32_t>(std::max(1, batch / 4), std::min(batch, 4))};
}
Mix One(int32_t batch) { return {"one", {batch}}; }
Mix Zipf(int32_t batch) {
  Mix mix{"zipf", {}};
  double total = 0;
  for (int32_t i = 1; i <= batch; ++i) total += 1.0 / i;
  for (int32_t i = 1, left = batch; left > 0; ++i) {
    const int32_t rows = std::min(left, std::max(1, static_cast<int32_t>(batch / (i * total))));
    mix.rows.push_back(rows);
    left -= rows;
  }
  return mix;
}
Mix Prompts(int32_t count, int32_t rows) {
  return {"prompts", std::vector<int32_t>(count, rows)};
}

// One layer's adapters: factors in one block of device memory and their tiles.
struct Layer {
  DeviceBytes factors;
  DeviceBytes tiles;
};

int64_t FactorBytes(const Site& site, int32_t rank) {
  return int64_t{2} * rank * (int64_t{site.in} * static_cast<int64_t>(site.out.size()) + site.width());
}

Layer MakeLayer(const Site& site, const std::vector<int32_t>& ranks, int32_t tiles_per_module,
                uint32_t seed) {
  int64_t bytes = 0;
  for (const int32_t rank : ranks) bytes += FactorBytes(site, rank);
  Layer layer;
  layer.factors = DeviceBytes(bytes);
  FillRandom(layer.factors, 0.05f, seed);
  std::vector<RankTile> tiles(ranks.size() * site.out.size() * tiles_per_module);
  const std::byte* at = layer.factors.data();
  for (size_t i = 0; i < ranks.size(); ++i) {
    for (size_t p = 0; p < site.out.size(); ++p) {
      RankTile* first = &tiles[(i * site.out.size() + p) * tiles_per_module];
      first->module_tiles = static_cast<int16_t>((ranks[i] + 15) / 16);
      for (int32_t k = 0; k < ranks[i]; k += cuda::kTileRanks) {
        RankTile& tile = first[k / cuda::kTileRanks];
        tile.ranks = tile.a_first = tile.b_first =
            static_cast<int16_t>(std::min(cuda::kTileRanks, ranks[i] - k));
        tile.scale = 1;
        tile.a[0] = at;
        at += int64_t{2} * tile.ranks * site.in;
        tile.b[0] = at;
        at += int64_t{2} * tile.ranks * site.out[p];
      }
    }
  }
  layer.tiles = Upload(tiles);
  return layer;
}

struct Result {
  double seconds = 0;       // low rank alone
  double base_seconds = 0;  // the product alone
  double both_seconds = 0;  // both side by side, as the engine runs them
  int64_t factor_bytes = 0;
  int64_t row_bytes = 0;    // x once, y read and written
};

Result Measure(const Site& site, const Mix& mix, const std::vector<int32_t>& rank_turns) {
  std::vector<int32_t> ranks;
  for (size_t i = 0; i < mix.rows.size(); ++i) ranks.push_back(rank_turns[i % rank_turns.size()]);
  const int32_t tiles_per_module =
      (*std::max_element(ranks.begin(), ranks.end()) + cuda::kTileRanks - 1) / cuda::kTileRanks;
  const int32_t rows = std::accumulate(mix.rows.begin(), mix.rows.end(), 0);
  std::vector<Layer> layers;
  std::vector<DeviceBytes> lists, weights, items;
  for (int l = 0; l < kLayers; ++l) {
    layers.push_back(MakeLayer(site, ranks, tiles_per_module, l + 1));
    weights.emplace_back(int64_t{2} * site.in * site.width());
    FillRandom(weights.back(), 0.02f, 100 + l);
  }
  const DeviceBytes x(int64_t{2} * rows * site.in), y(int64_t{2} * rows * site.width());
  const DeviceBytes y2(y.size());
  FillRandom(x, 1, 7);
  FillRandom(y, 1, 8);
  cuda::LowRankWork work;
  std::vector<cuda::LowRankArgs> args(kLayers);
  int64_t slot_floats = 0;
  for (int l = 0; l < kLayers; ++l) {
    std::vector<DeviceSegment> segments;
    int32_t row = 0;
    for (size_t i = 0; i < mix.rows.size(); ++i) {
      segments.push_back({row, row + mix.rows[i],
                          layers[l].tiles.as<RankTile>() + i * site.out.size() * tiles_per_module,
                          tiles_per_module});
      // As the engine's tables, which stop at the adapter's own largest rank.
      row += mix.rows[i];
    }
    const bool prompts = mix.name == "prompts";
    PlanLowRank(segments, prompts ? cuda::kPromptTileRows : cuda::kDecodeTileRows, &work);
    std::vector<cuda::ShrinkItem> shrinks;
    // Items of tiles an adapter does not have would be skipped by the kernel; the engine's tables
    // have none, so neither do these.
    for (cuda::ExpandItem& expand : work.expands) {
      const size_t adapter = std::find_if(segments.begin(), segments.end(), [&](const auto& s) {
                               return s.tiles == expand.tiles;
                             }) - segments.begin();
      const int32_t tiles = (ranks[adapter] + 15) / 16, first = expand.first_shrink;
      expand.first_shrink = static_cast<int32_t>(shrinks.size());
      shrinks.insert(shrinks.end(), work.shrinks.begin() + first,
                     work.shrinks.begin() + first + tiles);
    }
    items.push_back(Upload(shrinks));
    items.push_back(Upload(work.expands));
    const cuda::LowRankList list{static_cast<int32_t>(shrinks.size()),
                                 static_cast<int32_t>(work.expands.size()),
                                 items[2 * l].as<cuda::ShrinkItem>(),
                                 items[2 * l + 1].as<cuda::ExpandItem>()};
    lists.push_back(Upload(std::vector{list}));
    cuda::LowRankArgs& a = args[l];
    a.list = lists.back().as<cuda::LowRankList>();
    a.tile_rows = work.tile_rows;
    a.max_tiles = tiles_per_module;
    a.expected_shrinks = list.shrink_count;
    a.expected_expands = list.expand_count;
    a.parts = static_cast<int32_t>(site.out.size());
    std::copy(site.out.begin(), site.out.end(), a.out);
    a.x = Matrix(x.data(), rows, site.in, DType::kBF16);
    a.y = Matrix(y.data(), rows, site.width(), DType::kBF16);
    slot_floats = std::max(
        slot_floats, cuda::SlotFloats(list.shrink_count, a.parts, site.in, a.tile_rows));
  }
  const DeviceBytes slots(slot_floats * 4);
  const DeviceBytes arrived(int64_t{4} * args[0].expected_shrinks * args[0].parts);
  Check(cudaMemset(arrived.data(), 0, arrived.size()), "clearing");
  for (cuda::LowRankArgs& a : args) {
    a.slots = slots.as<float>();
    a.arrived = arrived.as<int32_t>();
  }
  cuda::FirstError errors;
  cuda::Gemm gemm(&errors);
  const auto product = [&](int l, cudaStream_t stream) {
    gemm.Multiply(weights[l].data(), args[l].x, args[l].y, stream);
  };
  Result result;
  result.seconds = MedianReplay([&](cudaStream_t stream) {
    for (const cuda::LowRankArgs& a : args) {
      Check(LaunchShrink(a, stream), "shrink");
      Check(LaunchExpand(a, stream), "expand");
    }
  }) / kLayers;
  result.base_seconds = MedianReplay([&](cudaStream_t stream) {
    for (int l = 0; l < kLayers; ++l) product(l, stream);
  }) / kLayers;
  cudaStream_t side;
  cudaEvent_t fork, join;
  Check(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "a stream");
  Check(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming), "an event");
  Check(cudaEventCreateWithFlags(&join, cudaEventDisableTiming), "an event");
  result.both_seconds = MedianReplay([&](cudaStream_t stream) {
    for (int l = 0; l < kLayers; ++l) {
      Check(cudaEventRecord(fork, stream), "an event");
      Check(cudaStreamWaitEvent(side, fork), "an event");
      cuda::LowRankArgs apart = args[l];
      apart.y.data = y2.data();
      apart.add = false;
      Check(LaunchShrink(apart, side), "shrink");
      Check(LaunchExpand(apart, side), "expand");
      Check(cudaEventRecord(join, side), "an event");
      product(l, stream);
      Check(cudaStreamWaitEvent(stream, join), "an event");
    }
  }) / kLayers;
  if (!errors.status().ok()) {
    std::fprintf(stderr, "%s\n", errors.status().ToString().c_str());
    std::exit(1);
  }
  for (const int32_t rank : ranks) result.factor_bytes += FactorBytes(site, rank);
  result.row_bytes = int64_t{2} * rows * (site.in + 2 * site.width());
  return result;
}

void Print(const Site& site, const std::string& rank, const Mix& mix, const Result& r,
           double bandwidth) {
  const int32_t rows = std::accumulate(mix.rows.begin(), mix.rows.end(), 0);
  const double bytes = static_cast<double>(r.factor_bytes + r.row_bytes);
  // The target: launches and latency, then the factors at 0.92 of the bandwidth.
  const double bound = 5e-6 + static_cast<double>(r.factor_bytes) / (0.92 * bandwidth);
  std::printf("%-20s %-12s %-9s %4d  %8.1f us  %8.2f MB  %5.0f GB/s  %3.0f %%  bound %7.1f us  "
              "base %8.1f us  both %8.1f us  added %7.1f us\n",
              site.name, rank.c_str(), mix.name.c_str(), rows, r.seconds * 1e6, bytes / 1e6,
              bytes / r.seconds / 1e9, 100 * bytes / r.seconds / bandwidth, bound * 1e6,
              r.base_seconds * 1e6, r.both_seconds * 1e6, (r.both_seconds - r.base_seconds) * 1e6);
  std::fflush(stdout);
}

int Run(bool quick) {
  const double bandwidth = ReadBandwidth();
  std::printf("%s, read bandwidth %.0f GB/s\n", DeviceName().c_str(), bandwidth / 1e9);
  const std::map<std::string, std::vector<int32_t>> ranks = {
      {"r8", {8}}, {"r16", {16}}, {"r64", {64}}, {"r8/16/32/64/256", {8, 16, 32, 64, 256}}};
  const std::vector<int32_t> batches =
      quick ? std::vector<int32_t>{1, 32, 128} : std::vector<int32_t>{1, 8, 32, 64, 128, 256};
  for (const Site& site : kSites) {
    for (const auto& [name, turns] : ranks) {
      if (quick && name != "r16" && name != "r64") continue;
      for (const int32_t batch : batches) {
        Print(site, name, Distinct(batch), Measure(site, Distinct(batch), turns), bandwidth);
      }
      const int32_t widest = batches.back();
      std::vector<Mix> mixes = {One(128), One(256), Prompts(8, 512)};
      if (!quick) mixes.insert(mixes.end(), {One(1), Quarter(widest), Zipf(widest)});
      for (const Mix& mix : mixes) {
        if (turns.size() == 1) Print(site, name, mix, Measure(site, mix, turns), bandwidth);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  return lorikeet::bench::Run(argc > 1 && std::strcmp(argv[1], "--quick") == 0);
}
