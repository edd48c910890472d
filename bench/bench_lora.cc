// Low-rank products alone: one linear's shrink and expand for a batch of rows over adapters, on
// 16 layers' factors in rotation, cache flushed, recorded. Prints a line a case: time of one
// linear, bytes of the distinct factors in it and of x and y, their share of the read bandwidth
// measured in the same run, and the time beside the base product; of long segments whose deltas can
// extend that product also the time of the extended one, and of what makes the extension.
//   bench_lora [--quick]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "bench/device.h"
#include "engine/kernels/cuda/extension.h"
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

// More rows than decoding steps have: the kernels of prompts.
bool IsLong(const Mix& mix) { return mix.rows[0] > 256; }

int64_t FactorBytes(const Site& site, int32_t rank) {
  return int64_t{2} * rank * (int64_t{site.in} * static_cast<int64_t>(site.out.size()) + site.width());
}

int32_t Tiles(int32_t rank) { return (rank + cuda::kTileRanks - 1) / cuda::kTileRanks; }

// One layer's weight and adapters, as the engine has them on the device.
struct Layer {
  DeviceBytes weight;
  DeviceBytes factors;  // of all adapters
  DeviceBytes tiles;
  std::vector<int64_t> first_tile;  // [adapters]
  std::vector<DeviceSegment> segments;
  DeviceBytes shrinks, expands, list;
  cuda::LowRankArgs args;
  Matrix rows;  // over `weight`
  // Where the segments' deltas can extend the product:
  DeviceBytes extended_rows, gathers;
  cuda::Extension extension;
};

// Adapters' factors, one after the other, and the tables that point to them.
void MakeAdapters(const Site& site, const std::vector<int32_t>& ranks, uint32_t seed, Layer* layer) {
  int64_t bytes = 0;
  for (const int32_t rank : ranks) bytes += FactorBytes(site, rank);
  layer->factors = DeviceBytes(bytes);
  FillRandom(layer->factors, 0.05f, seed);
  std::vector<RankTile> tiles;
  const std::byte* at = layer->factors.data();
  for (const int32_t rank : ranks) {
    layer->first_tile.push_back(static_cast<int64_t>(tiles.size()));
    for (const int32_t out : site.out) {
      for (int32_t k = 0; k < rank; k += cuda::kTileRanks) {
        RankTile& tile = tiles.emplace_back();
        tile.module_tiles = static_cast<int16_t>(Tiles(rank));
        tile.ranks = static_cast<uint16_t>(std::min(cuda::kTileRanks, rank - k));
        tile.a_first = tile.b_first = tile.ranks;
        tile.scale = 1;
        tile.a_pitch = static_cast<uint16_t>(site.in / 8);
        tile.b_pitch = static_cast<uint16_t>(out / 8);
        tile.a[0] = at;
        at += int64_t{2} * tile.ranks * site.in;
        tile.b[0] = at;
        at += int64_t{2} * tile.ranks * out;
      }
    }
  }
  layer->tiles = Upload(tiles);
}

void MakeWork(const Site& site, const Mix& mix, const std::vector<int32_t>& ranks, Layer* layer) {
  int32_t row = 0;
  for (size_t i = 0; i < mix.rows.size(); ++i) {
    layer->segments.push_back({row, row + mix.rows[i], layer->tiles.as<RankTile>() + layer->first_tile[i],
                               Tiles(ranks[i])});
    row += mix.rows[i];
  }
  cuda::LowRankWork work;
  PlanLowRank(layer->segments, IsLong(mix) ? cuda::kPromptTileRows : cuda::kDecodeTileRows, &work);
  layer->shrinks = Upload(work.shrinks);
  layer->expands = Upload(work.expands);
  const cuda::LowRankList list{static_cast<int32_t>(work.shrinks.size()),
                               static_cast<int32_t>(work.expands.size()),
                               layer->shrinks.as<cuda::ShrinkItem>(),
                               layer->expands.as<cuda::ExpandItem>()};
  layer->list = Upload(std::vector{list});
  layer->args.list = layer->list.as<cuda::LowRankList>();
  layer->args.tile_rows = work.tile_rows;
  layer->args.max_tiles = work.max_tiles;
  layer->args.expected_shrinks = list.shrink_count;
  layer->args.expected_expands = list.expand_count;
  layer->args.parts = static_cast<int32_t>(site.out.size());
  std::copy(site.out.begin(), site.out.end(), layer->args.out);
}

// As the engine makes it of the layer's segments; the layer's x, y and rows are there.
void MakeExtension(int32_t columns, Layer* layer) {
  cuda::ExtensionPlan plan;
  PlanExtension(layer->segments, &plan);
  std::vector<cuda::ExtendedRow> rows(layer->args.x.rows);
  DescribeRows(plan, rows);
  layer->extended_rows = Upload(rows);
  layer->gathers = Upload(plan.gathers);
  layer->extension = {.values = layer->args.x.Columns(layer->rows.width, columns),
                      .factors = layer->rows.Columns(layer->rows.width, columns),
                      .rows = layer->extended_rows.as<cuda::ExtendedRow>(),
                      .gathers = layer->gathers.as<cuda::GatherItem>(),
                      .gather_count = static_cast<int32_t>(plan.gathers.size())};
}

// All layers and what they share.
struct Layers {
  std::vector<Layer> all;
  DeviceBytes x, y, y2, slots;

  Layers(const Site& site, const Mix& mix, const std::vector<int32_t>& ranks) {
    const int32_t rows = std::accumulate(mix.rows.begin(), mix.rows.end(), 0);
    const int32_t room = cuda::ExtensionRoom(site.in);
    x = DeviceBytes(int64_t{2} * rows * (site.in + room));
    y = DeviceBytes(int64_t{2} * rows * site.width());
    y2 = DeviceBytes(y.size());
    FillRandom(x, 1, 7);
    FillRandom(y, 1, 8);
    for (int l = 0; l < kLayers; ++l) {
      Layer& layer = all.emplace_back();
      layer.weight = DeviceBytes(int64_t{2} * (site.in + room) * site.width());
      FillRandom(layer.weight, 0.02f, 100 + l);
      MakeAdapters(site, ranks, l + 1, &layer);
      MakeWork(site, mix, ranks, &layer);
    }
    const cuda::LowRankArgs& first = all[0].args;
    slots = DeviceBytes(4 * cuda::SlotFloats(first.expected_shrinks, first.parts, site.in,
                                             first.tile_rows));
    for (Layer& layer : all) {
      layer.args.slots = slots.as<float>();
      layer.args.x = Matrix(x.data(), rows, site.in, DType::kBF16);
      layer.args.x.stride += room;
      layer.rows = Matrix(layer.weight.data(), site.width(), site.in, DType::kBF16);
      layer.rows.stride += room;
      layer.args.y = Matrix(y.data(), rows, site.width(), DType::kBF16);
    }
  }
};

struct Result {
  double seconds = 0;       // low rank alone
  double base_seconds = 0;  // the product alone
  double both_seconds = 0;  // both side by side, as the engine runs them
  double extended_seconds = 0;   // the product with its extension, and making that
  double extension_seconds = 0;  // making it alone
  int64_t factor_bytes = 0;
  int64_t row_bytes = 0;    // x once, y read and written
};

// The base product with the low-rank ones beside it on a stream of their own.
class SideBySide {
 public:
  SideBySide() {
    Check(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "a stream");
    Check(cudaEventCreateWithFlags(&fork_, cudaEventDisableTiming), "an event");
    Check(cudaEventCreateWithFlags(&join_, cudaEventDisableTiming), "an event");
  }
  ~SideBySide() {
    cudaEventDestroy(join_);
    cudaEventDestroy(fork_);
    cudaStreamDestroy(side_);
  }

  void Launch(cuda::LowRankArgs args, void* y2, cudaStream_t stream,
              const std::function<void()>& product) {
    args.y.data = y2;
    args.add = false;
    Check(cudaEventRecord(fork_, stream), "an event");
    Check(cudaStreamWaitEvent(side_, fork_), "an event");
    Check(LaunchShrink(args, side_), "shrink");
    Check(LaunchExpand(args, side_), "expand");
    Check(cudaEventRecord(join_, side_), "an event");
    product();
    Check(cudaStreamWaitEvent(stream, join_), "an event");
  }

 private:
  cudaStream_t side_;
  cudaEvent_t fork_, join_;
};

Result Measure(const Site& site, const Mix& mix, const std::vector<int32_t>& rank_turns) {
  std::vector<int32_t> ranks;
  for (size_t i = 0; i < mix.rows.size(); ++i) ranks.push_back(rank_turns[i % rank_turns.size()]);
  Layers layers(site, mix, ranks);
  cuda::FirstError errors;
  cuda::Gemm gemm(&errors);
  const auto product = [&](const Layer& layer, cudaStream_t stream) {
    gemm.Multiply(layer.rows, layer.args.x, layer.args.y, stream);
  };
  Result result;
  result.seconds = MedianReplay([&](cudaStream_t stream) {
    for (const Layer& layer : layers.all) {
      Check(LaunchShrink(layer.args, stream), "shrink");
      Check(LaunchExpand(layer.args, stream), "expand");
    }
  }) / kLayers;
  result.base_seconds = MedianReplay([&](cudaStream_t stream) {
    for (const Layer& layer : layers.all) product(layer, stream);
  }) / kLayers;
  SideBySide both;
  result.both_seconds = MedianReplay([&](cudaStream_t stream) {
    for (const Layer& layer : layers.all) {
      both.Launch(layer.args, layers.y2.data(), stream, [&] { product(layer, stream); });
    }
  }) / kLayers;
  const int32_t columns = cuda::ExtensionColumns(layers.all[0].segments, layers.all[0].args.parts);
  if (IsLong(mix) && columns <= cuda::ExtensionRoom(site.in)) {
    for (Layer& layer : layers.all) MakeExtension(columns, &layer);
    const auto extend = [&](const Layer& layer, cudaStream_t stream) {
      Check(LaunchExtend(layer.args, layer.extension, stream), "an extension");
    };
    result.extension_seconds = MedianReplay([&](cudaStream_t stream) {
      for (const Layer& layer : layers.all) extend(layer, stream);
    }) / kLayers;
    result.extended_seconds = MedianReplay([&](cudaStream_t stream) {
      for (const Layer& layer : layers.all) {
        extend(layer, stream);
        gemm.MultiplyExtended(layer.rows, layer.args.x, layer.args.y, columns, stream);
      }
    }) / kLayers;
  }
  if (!errors.status().ok()) {
    std::fprintf(stderr, "%s\n", errors.status().ToString().c_str());
    std::exit(1);
  }
  for (const int32_t rank : ranks) result.factor_bytes += FactorBytes(site, rank);
  result.row_bytes = int64_t{2} * layers.all[0].args.x.rows * (site.in + 2 * site.width());
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
  if (r.extended_seconds > 0) {
    std::printf("%-44s extended %8.1f us  added %7.1f us  making it %7.1f us\n", "", r.extended_seconds * 1e6,
                (r.extended_seconds - r.base_seconds) * 1e6, r.extension_seconds * 1e6);
  }
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
      std::vector<Mix> mixes = {One(128), One(256), One(768), Prompts(2, 384), Prompts(8, 512)};
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
