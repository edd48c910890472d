// The CUDA backend's operations against plain double-precision loops, with random shapes, types,
// segments and ranks, on poisoned outputs. Seeds are in the failure messages.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "engine/kernels/cuda/skinny_gemm.h"
#include "engine/kernels/cuda/stream_gemm.h"
#include "engine/kernels/cuda/tile_gemm.h"
#include "tests/gpu/device_rows.h"
#include "tests/support/load_images.h"
#include "tests/support/random_adapter.h"

namespace lorikeet {
namespace {

struct LinearCase {
  int32_t in, rows, max_rank;
  std::vector<int32_t> outs;
  std::vector<AdapterSegment> segments;
  std::vector<const RandomAdapter*> row_adapter;  // [rows]
  std::vector<std::unique_ptr<RandomAdapter>> adapters;
  std::vector<std::vector<float>> gate_values;
  std::vector<const float*> gates;  // [rows]
};

struct LinearShape {
  int32_t rows = 0;
  int32_t longest = 0;   // rows of a segment at most
  int32_t widest = 0;    // of inputs and outputs
  int32_t max_rank = 90;
  bool mixed = false;    // every other segment is a few rows
  int32_t in_unit = 8;   // which widths are multiples of
  bool gated = false;    // two linears of one width, whole 64s or not
};

LinearCase RandomLinear(const LinearShape& shape, DType factors, std::mt19937& rng) {
  LinearCase c;
  const int32_t rows = shape.rows, longest = shape.longest;
  c.in = shape.in_unit * (1 + rng() % (shape.widest / shape.in_unit));
  c.rows = rows;
  c.max_rank = 1 + rng() % shape.max_rank;
  c.outs.resize(1 + rng() % 3);
  for (int32_t& out : c.outs) out = 8 * (1 + rng() % (shape.widest / 16));
  if (shape.gated) c.outs.assign(2, rng() % 4 == 0 ? c.outs[0] : (c.outs[0] + 63) / 64 * 64);
  for (int i = 0; i < 5; ++i) {
    c.adapters.push_back(std::make_unique<RandomAdapter>(c.in, c.outs, factors, c.max_rank, rng));
    c.adapters.back()->adapter.modules.resize(ModuleCount(1));
    if (i % 2) c.adapters.back()->Share(c.in, c.outs);
    if (i % 2) c.adapters.back()->StandBeside(c.outs, rng, /*on_host=*/false);
    if (i == 4) c.adapters.back()->MakeBlocks(c.in, c.outs);
    if (i > 1) c.adapters.back()->GateRanks(c.in, /*own=*/i == 3, rng);
  }
  c.row_adapter.assign(rows, nullptr);
  for (int32_t r = rng() % 3; r < rows;) {
    const RandomAdapter* adapter = c.adapters[rng() % c.adapters.size()].get();
    const bool few = shape.mixed && c.segments.size() % 2 == 0;
    const int32_t end = std::min<int32_t>(rows, r + 1 + rng() % (few ? 8 : longest));
    c.segments.push_back({r, end, &adapter->adapter});
    std::fill(c.row_adapter.begin() + r, c.row_adapter.begin() + end, adapter);
    r = end + rng() % 2;
  }
  c.gates.assign(rows, nullptr);
  for (int32_t r = 0; r < rows; ++r) {
    const int32_t width = c.row_adapter[r] ? c.row_adapter[r]->adapter.gating.width() : 0;
    if (width > 0) c.gates[r] = c.gate_values.emplace_back(RandomFloats(width, rng)).data();
  }
  return c;
}

// What e4m3 codes with a scale a row make of rows of `width` values: the largest magnitude is 448
// scales, each value the nearest code's, of two the even one's.
// Returns them as a file has them, blocks of kScaledF8E4M3, where they divide the width.
std::vector<std::byte> RoundToFp8(int32_t width, std::vector<float>* values) {
  std::vector<std::byte> file;
  std::vector<float> codes;  // magnitudes: three bits of mantissa, exponents from -6 on
  for (int32_t code = 0; code < 127; ++code) {
    const int32_t exponent = code / 8, mantissa = code % 8;
    codes.push_back(exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10));
  }
  for (size_t row = 0; row < values->size(); row += width) {
    const std::span<float> of_row(&(*values)[row], width);
    float largest = 0;
    for (const float v : of_row) largest = std::max(largest, std::abs(v));
    const float scale = largest > 0 ? largest / codes.back() : 1;
    for (size_t i = 0; i < of_row.size(); ++i) {
      float& v = of_row[i];
      const float wanted = std::abs(v) / scale;
      size_t at = std::lower_bound(codes.begin(), codes.end(), wanted) - codes.begin();
      at = std::min(at, codes.size() - 1);
      if (at > 0) {
        const float below = wanted - codes[at - 1], above = codes[at] - wanted;
        if (below < above || (below == above && at % 2 == 1)) --at;
      }
      const bool negative = std::signbit(v);
      v = std::copysign(codes[at] * scale, v);
      if (i % 64 == 0) {
        const auto bytes = std::as_bytes(std::span(&scale, 1));
        file.insert(file.end(), bytes.begin(), bytes.end());
      }
      file.push_back(static_cast<std::byte>(at + (negative ? 128 : 0)));
    }
  }
  return file;
}

// What AddRmsNorm adds to zeros for `delta`.
std::vector<float> AddedByNorm(Backend* backend, Matrix delta) {
  DeviceRows x(backend, delta.rows, delta.width, DType::kF32);
  x.Write(std::vector<float>(int64_t{delta.rows} * delta.width));
  DeviceRows out(backend, delta.rows, delta.width, delta.dtype);
  const DeviceMemory weight = backend->Upload(std::vector<float>(delta.width, 1));
  backend->AddRmsNorm({.x = x.matrix, .delta = delta,
                       .weight = reinterpret_cast<const float*>(weight.get()), .out = out.matrix});
  return x.Read();
}

enum class Weights : uint8_t {
  kPlain,
  kEncoded,     // to codes, when they are loaded
  kCodesOfFile
};

// Decoding, prompts of middling size, and more rows than the kernels of short segments take.
LinearShape ShapeFor(uint32_t seed, Weights weights, std::mt19937& rng) {
  const int32_t unit = weights == Weights::kCodesOfFile ? 64 : 8;
  const auto below = [&rng](int32_t n) { return static_cast<int32_t>(rng() % n); };
  switch (seed % 3) {
    case 0: return {.rows = 1 + below(40), .longest = static_cast<int32_t>(1 + seed % 4), .widest = 2400,
                    .max_rank = seed % 2 == 0 ? 90 : 700, .in_unit = unit};
    case 1: return {.rows = 1 + below(300), .longest = 90, .widest = 2400, .in_unit = unit};
    default: return {.rows = 1100 + below(500), .longest = 400, .widest = 1200, .in_unit = unit};
  }
}

// Deltas of long segments extend the product (engine/kernels/cuda/extension.h), short ones do not.
LinearShape ExtendedShape(bool mixed, std::mt19937& rng) {
  return {.rows = static_cast<int32_t>(600 + rng() % 200), .longest = 500, .widest = 4096, .max_rank = 16,
          .mixed = mixed, .in_unit = 4096};
}

// What `reader` makes of y: AddRmsNorm adds it to zeros.
std::vector<float> ReadBy(Reader reader, Backend* backend, const DeviceRows& y) {
  if (reader == Reader::kAny) return y.Read();
  if (reader == Reader::kAddRmsNorm) return AddedByNorm(backend, y.matrix);
  DeviceRows gated(backend, y.matrix.rows, y.matrix.width / 2, y.matrix.dtype);
  backend->SwiGlu(y.matrix, gated.matrix);
  return gated.Read();
}

// A value, and how far from it what the device computes may be.
struct Wanted {
  double value, tolerance;
};

// silu(gate) · up, with the step of its type: the slope of silu is at most 1.1.
Wanted Gated(const Wanted& gate, const Wanted& up, double step) {
  const double silu = gate.value / (1 + std::exp(-gate.value)), value = silu * up.value;
  const double of_silu = 1.1 * gate.tolerance + 2e-6 * std::abs(silu);
  return {value, of_silu * (std::abs(up.value) + up.tolerance) + std::abs(silu) * up.tolerance +
                     step * std::abs(value) + 1e-6};
}

// Row r of the product, all linears' columns.
std::vector<Wanted> WantedRow(const LinearCase& c, int32_t r, const float* x, const std::vector<std::vector<float>>& w,
                              const std::vector<std::vector<float>>& bias, double step) {
  std::vector<Wanted> row;
  std::vector<double> expected, magnitude;
  for (size_t m = 0; m < c.outs.size(); ++m) {
    ReferenceRow(x, c.in, c.outs[m], w[m], bias[m], c.row_adapter[r], m, &expected, &magnitude, c.gates[r]);
    for (int32_t n = 0; n < c.outs[m]; ++n) {
      // Rounded to the type: the product, the rank's sums, the result of each of up to three
      // steps, all about the size that random signs leave of the magnitude. Then float32 sums
      // of n terms: n roundings, each of a partial sum of magnitude / sqrt(n), add up to about
      // 2^-25 of the magnitude; eight times that holds over the ten million values here.
      row.push_back({expected[n], step * (4 * std::abs(expected[n]) + 8 * magnitude[n] / std::sqrt(c.in)) +
                                      0x1p-22 * magnitude[n]});
    }
  }
  return row;
}

// Whether the row above or below is another segment's.
bool IsEdge(const LinearCase& c, int32_t r) {
  return std::any_of(c.segments.begin(), c.segments.end(), [r](const AdapterSegment& s) {
    return r == s.row_begin - 1 || r == s.row_begin || r == s.row_end - 1 || r == s.row_end;
  });
}

// What the product leaves to its reader is added by that; an output scale would take the result as a
// whole. `extended`: nothing keeps deltas from extending the product.
void CheckLinears(const TypeCase& type, Weights weights, Reader reader, bool extended = false) {
  const bool gated = reader == Reader::kSwiGlu;
  const std::unique_ptr<Backend> backend =
      CudaBackendFor(type, /*record=*/true,
                     weights == Weights::kEncoded ? Quantization::kFp8 : Quantization::kNone);
  for (uint32_t seed = 0; seed < (extended ? 5 : 30); ++seed) {
    std::mt19937 rng(seed);
    LinearShape shape = extended ? ExtendedShape(!gated, rng) : ShapeFor(seed, weights, rng);
    shape.gated = gated;
    const LinearCase c = RandomLinear(shape, type.dtype, rng);
    for (const auto& random : c.adapters) {
      for (ModuleDelta& delta : random->adapter.modules) {
        if (reader != Reader::kAny) delta.out_scale = nullptr;
        if (!extended) continue;
        delta.out_scale = delta.bias = nullptr;
        delta.low_rank.rank_scale = delta.low_rank.delta_scale = nullptr;
        delta.rank_gate = nullptr;
        delta.prototypes = nullptr;
      }
    }
    std::vector<std::vector<std::byte>> stored;
    std::vector<std::vector<float>> w, bias(c.outs.size());
    std::vector<TensorView> views(2 * c.outs.size());
    std::vector<LinearSource> sources;
    for (size_t m = 0; m < c.outs.size(); ++m) {
      w.push_back(RandomFloats(int64_t{c.outs[m]} * c.in, rng));
      RoundTo(type.dtype, &w[m]);
      stored.push_back(Encode(type.dtype, w[m]));
      if (weights == Weights::kPlain) continue;
      std::vector<std::byte> file = RoundToFp8(c.in, &w[m]);
      if (weights == Weights::kCodesOfFile) stored[m] = std::move(file);
    }
    for (size_t m = 0; m < c.outs.size(); ++m) {
      const DType dtype = weights == Weights::kCodesOfFile ? DType::kScaledF8E4M3 : type.dtype;
      views[2 * m] = {dtype, {c.outs[m], c.in}, stored[m]};
      if (rng() % (gated ? 8 : 2) == 0) bias[m] = RandomFloats(c.outs[m], rng);
      views[2 * m + 1] = {DType::kF32, {c.outs[m]}, std::as_bytes(std::span(bias[m]))};
      sources.push_back({&views[2 * m], bias[m].empty() ? nullptr : &views[2 * m + 1]});
    }
    const std::unique_ptr<LinearWeight> weight = backend->LoadLinear(0, sources);
    // Pages that hold fewer than sixteen rank rows of the widest linears.
    if (seed == 0) backend->AllocatePages(KvLayout::Make(8, 2, 64, DType::kBF16), 128 << 20);
    std::vector<std::shared_ptr<const Adapter>> adapters;
    for (const auto& random : c.adapters) {  // not owned
      adapters.emplace_back(std::shared_ptr<const Adapter>(), &random->adapter);
    }
    LoadImages(backend->images(), adapters, seed % 5);
    std::vector<float> x = RandomFloats(int64_t{c.rows} * c.in, rng);
    for (float& v : x) v /= gated ? 64 : 1;  // float16 holds what one product by another is
    RoundTo(type.dtype, &x);
    const std::vector<int32_t> tokens(c.rows), positions(c.rows), begin = {0, c.rows};
    const std::vector<int32_t> page_begin = {0, 0};
    const int32_t rows = backend->BeginStep({.tokens = tokens,
                                             .positions = positions,
                                             .sequence_begin = begin,
                                             .page_begin = page_begin,
                                             .segments = c.segments,
                                             .gates = c.gates});
    const int32_t room = backend->x_room(c.in);
    DeviceRows dx(backend.get(), rows, c.in, type.dtype, room);
    x.resize(int64_t{rows} * c.in, NAN);  // rows computed for nothing must touch no other
    dx.Write(x);
    DeviceRows dy(backend.get(), rows, weight->width(), type.dtype);
    const auto multiply = [&] {
      backend->LinearProducts({.weight = weight.get(), .x = dx.matrix, .y = dy.matrix, .x_room = room,
                               .reader = reader});
      return ReadBy(reader, backend.get(), dy);
    };
    const std::vector<float> y = multiply();
    const int32_t width = weight->width() / (gated ? 2 : 1);
    // What runs beside the product must not meet it.
    for (int i = 0; extended && i < 30; ++i) {
      const std::vector<float> again = multiply();
      ASSERT_TRUE(std::equal(y.begin(), y.begin() + int64_t{c.rows} * width, again.begin()))
          << "seed " << seed << " pass " << i;
    }
    ASSERT_TRUE(backend->status().ok()) << backend->status();
    for (int32_t r = 0; r < c.rows; ++r) {
      if (extended && !IsEdge(c, r) && rng() % 8 > 0) continue;  // the definition takes long
      const std::vector<Wanted> row = WantedRow(c, r, &x[int64_t{r} * c.in], w, bias, type.step);
      for (int32_t n = 0; n < width; ++n) {
        const Wanted wanted = gated ? Gated(row[n], row[width + n], type.step) : row[n];
        ASSERT_NEAR(y[int64_t{r} * width + n], wanted.value, wanted.tolerance)
            << Info(type.dtype).name << " seed " << seed << " in " << c.in << " rows " << c.rows
            << " max rank " << c.max_rank << " row " << r << " column " << n;
      }
    }
    AdapterMoves end;
    for (const auto& adapter : adapters) end.drops.push_back(adapter->serial);
    backend->images()->Move(std::move(end));
  }
}

TEST(CudaLinear, RaggedSegmentsOfAnyRankMatchTheDefinition) {
  for (const TypeCase& type : kTypes) CheckLinears(type, Weights::kPlain, Reader::kAny);
}

TEST(CudaLinear, WhatIsLeftToTheReaderIsAdded) {
  for (const TypeCase& type : kTypes) CheckLinears(type, Weights::kPlain, Reader::kAddRmsNorm);
}

TEST(CudaLinear, DeltasOfLongSegmentsExtendTheProduct) {
  for (const Reader reader : {Reader::kAny, Reader::kAddRmsNorm, Reader::kSwiGlu}) {
    CheckLinears(kTypes[0], Weights::kPlain, reader, true);
  }
}

TEST(CudaLinear, WhatIsLeftToTheActivationIsItsProduct) {
  for (const TypeCase& type : kTypes) CheckLinears(type, Weights::kPlain, Reader::kSwiGlu);
}

// A product's operands, random, with NaN behind each row; and what becomes of them.
struct Operands {
  const TypeCase& type;
  const int32_t rows, in, width;
  std::vector<float> x, w;
  DeviceRows dx, dw, dy;

  // The weight has `halves` times as many rows as y has columns.
  Operands(Backend* backend, const TypeCase& type, DType y, int32_t rows, int32_t in, int32_t width, int32_t halves,
           std::mt19937& rng)
      : type(type), rows(rows), in(in), width(width), x(RandomFloats(int64_t{rows} * in, rng)),
        w(RandomFloats(int64_t{halves} * width * in, rng)), dx(backend, rows, in, type.dtype, 16),
        dw(backend, halves * width, in, type.dtype, 8), dy(backend, rows, width, y, 24) {
    RoundTo(type.dtype, &w);
    RoundTo(type.dtype, &x);
    dw.Write(w);
    dx.Write(x);
  }

  // In float32, not yet rounded to a type.
  Wanted Product(int32_t row, int32_t of) const {
    Wanted sum{};
    double magnitude = 0;
    for (int32_t k = 0; k < in; ++k) {
      const double term = double{x[int64_t{row} * in + k]} * w[int64_t{of} * in + k];
      sum.value += term, magnitude += std::abs(term);
    }
    sum.tolerance = 0x1p-22 * magnitude;
    return sum;
  }
  template <typename WantedAt>
  void ExpectAll(const WantedAt& wanted_at) const {
    const std::vector<float> y = dy.Read();
    for (int32_t r = 0; r < rows; ++r) {
      for (int32_t n = 0; n < width; ++n) {
        const Wanted wanted = wanted_at(r, n);
        ASSERT_NEAR(y[int64_t{r} * width + n], wanted.value, wanted.tolerance)
            << Info(type.dtype).name << " in " << in << " width " << width << " rows " << rows << " row " << r
            << " column " << n;
      }
    }
  }
  void ExpectGated() const {
    ExpectAll([&](int32_t r, int32_t n) { return Gated(Product(r, n), Product(r, width + n), type.step); });
  }
};

TEST(CudaLinear, GatedTilesMatchTheDefinition) {
  std::mt19937 rng(11);
  for (const TypeCase& type : {kTypes[0], kTypes[1]}) {
    const std::unique_ptr<Backend> backend = CudaBackendFor(type);
    for (const int32_t rows : {1, 33, 130, 200, 341, 700}) {
      const int32_t in = 8 * (1 + rng() % 70), width = 64 * (1 + rng() % 7);
      const Operands of(backend.get(), type, type.dtype, rows, in, width, 2, rng);
      if (!cuda::CanTileGated(of.dw.matrix, of.dx.matrix, of.dy.matrix)) GTEST_SKIP() << "not for this GPU";
      ASSERT_EQ(cuda::LaunchGatedTileGemm(of.dw.matrix, of.dx.matrix, of.dy.matrix, nullptr), cudaSuccess);
      of.ExpectGated();
    }
  }
}

TEST(CudaLinear, GatedProductsOfFewRowsMatchTheDefinition) {
  std::mt19937 rng(12);
  for (const TypeCase& type : {kTypes[0], kTypes[1]}) {
    const std::unique_ptr<Backend> backend = CudaBackendFor(type);
    for (const int32_t rows : {1, 7, 8, 13, 16, 27, 32, 50, 64}) {
      const int32_t in = 8 * (1 + rng() % 120), width = 4 * (1 + rng() % 120);
      const Operands of(backend.get(), type, type.dtype, rows, in, width, 2, rng);
      if (!cuda::CanStream(of.dw.matrix, of.dx.matrix)) GTEST_SKIP() << "not for this GPU";
      ASSERT_EQ(cuda::LaunchGatedStreamGemm(of.dw.matrix, of.dx.matrix, of.dy.matrix, nullptr), cudaSuccess);
      of.ExpectGated();
    }
  }
}

TEST(CudaLinear, ProductsOfAHandfulOfRowsMatchTheDefinition) {
  std::mt19937 rng(13);
  for (const TypeCase& type : {kTypes[0], kTypes[1]}) {
    const std::unique_ptr<Backend> backend = CudaBackendFor(type);
    for (const DType y : {type.dtype, DType::kF32}) {
      for (const auto& [in, width] : {std::pair(8, 1), {72, 31}, {64, 4096}, {1016, 4100}, {1400, 5}, {4096, 4300},
                                      {576, 6144}, {14336, 129}}) {
        const int32_t rows = 1 + rng() % 8;
        const Operands of(backend.get(), type, y, rows, in, width, 1, rng);
        ASSERT_TRUE(cuda::IsSkinny(of.dw.matrix, of.dx.matrix, of.dy.matrix));
        ASSERT_EQ(cuda::LaunchSkinnyGemm(of.dw.matrix, of.dx.matrix, of.dy.matrix, nullptr), cudaSuccess);
        const double step = y == DType::kF32 ? 0 : type.step;
        of.ExpectAll([&](int32_t r, int32_t n) {
          Wanted wanted = of.Product(r, n);
          wanted.tolerance += step * std::abs(wanted.value) + 1e-7;
          return wanted;
        });
      }
    }
  }
}

TEST(CudaLinear, CodedWeightsMatchTheValuesOfTheirCodes) {
  for (const TypeCase& type : kTypes) {
    if (type.dtype != DType::kF32) CheckLinears(type, Weights::kEncoded, Reader::kAny);
  }
}

TEST(CudaLinear, CodesOfFilesAreKept) {
  for (const TypeCase& type : kTypes) CheckLinears(type, Weights::kCodesOfFile, Reader::kAny);
}

// y and norms of `rows` rows of x from `first` on, [rows, width] and [rows, in], one behind the other.
std::vector<float> ProductAndNorm(const LinearWeight& weight, const TypeCase& type, const std::vector<float>& x,
                                  int32_t first, int32_t rows, Backend* backend) {
  const std::vector<int32_t> tokens(rows), begin = {0, rows}, page_begin = {0, 0};
  const int32_t padded = backend->BeginStep(
      {.tokens = tokens, .positions = tokens, .sequence_begin = begin, .page_begin = page_begin});
  std::vector<float> mine(x.begin() + int64_t{first} * weight.in, x.begin() + int64_t{first + rows} * weight.in);
  mine.resize(int64_t{padded} * weight.in, 1);
  DeviceRows dx(backend, padded, weight.in, type.dtype), sums(backend, padded, weight.in, DType::kF32);
  dx.Write(mine);
  sums.Write(mine);
  DeviceRows dy(backend, padded, weight.width(), type.dtype), wide(backend, padded, weight.width(), DType::kF32);
  DeviceRows norms(backend, padded, weight.in, type.dtype);
  backend->LinearProducts({.weight = &weight, .x = dx.matrix, .y = dy.matrix});
  backend->LinearProducts({.weight = &weight, .x = dx.matrix, .y = wide.matrix});
  const DeviceMemory ones = backend->Upload(std::vector<float>(weight.in, 1));
  backend->AddRmsNorm({.x = sums.matrix, .delta = Matrix(nullptr, padded, weight.in, type.dtype),
                       .weight = reinterpret_cast<const float*>(ones.get()), .out = norms.matrix});
  LK_CHECK_MSG(backend->status().ok(), backend->status().ToString());
  std::vector<float> all;
  for (const DeviceRows* part : {&dy, &wide, &norms}) {
    const std::vector<float> values = part->Read();
    all.insert(all.end(), values.begin(), values.begin() + int64_t{rows} * part->matrix.width);
  }
  return all;
}

// Rows [first, first + rows) of what ProductAndNorm gave for `of` rows.
std::vector<float> RowsOf(const std::vector<float>& all, const LinearWeight& weight, int32_t of, int32_t first,
                          int32_t rows) {
  std::vector<float> some;
  int64_t at = 0;
  for (const int32_t width : {weight.width(), weight.width(), weight.in}) {
    some.insert(some.end(), all.begin() + at + int64_t{first} * width, all.begin() + at + int64_t{first + rows} * width);
    at += int64_t{of} * width;
  }
  return some;
}

TEST(CudaBatchInvariance, RowsDoNotDependOnTheirNumber) {
  constexpr int32_t kRows = 700;
  for (const TypeCase& type : {kTypes[0], kTypes[1]}) {
    for (const Quantization quantization : {Quantization::kNone, Quantization::kFp8}) {
      const std::unique_ptr<Backend> backend = CudaBackendFor(type, true, quantization, /*batch_invariant=*/true);
      std::mt19937 rng(7);
      for (const auto& [in, out] : {std::pair(4096, 1024), {14336, 256}, {1024, 5120}, {264, 1048}, {72, 40}}) {
        const std::vector<std::byte> stored = Encode(type.dtype, RandomFloats(int64_t{in} * out, rng));
        const TensorView view{type.dtype, {out, in}, stored};
        const LinearSource source[] = {{&view}};
        const auto weight = backend->LoadLinear(0, source);
        const std::vector<float> x = RandomFloats(int64_t{kRows} * in, rng);
        const std::vector<float> all = ProductAndNorm(*weight, type, x, 0, kRows, backend.get());
        for (const int32_t rows : {1, 7, 16, 33, 64, 65, 130, 256, 300, 513}) {
          const int32_t first = static_cast<int32_t>(rng() % (kRows - rows));
          ASSERT_EQ(ProductAndNorm(*weight, type, x, first, rows, backend.get()),
                    RowsOf(all, *weight, kRows, first, rows))
              << Info(type.dtype).name << (quantization == Quantization::kFp8 ? " fp8" : "") << " in " << in
              << " out " << out << " rows " << rows;
        }
      }
    }
  }
}

TEST(CudaElementwise, NormAndActivationMatchTheirFormulas) {
  for (const TypeCase& type : kTypes) {
    std::mt19937 rng(3);
    const std::unique_ptr<Backend> backend = CudaBackendFor(type);
    for (const auto& [rows, width] : {std::pair(5, 8), {5, 72}, {5, 4096}, {5, 14336}, {300, 4096}, {5, 20000}}) {
      const std::vector<float> x = RandomFloats(rows * width, rng), w = RandomFloats(width, rng);
      std::vector<float> delta = RandomFloats(rows * width, rng);
      RoundTo(type.dtype, &delta);
      DeviceRows dx(backend.get(), rows, width, DType::kF32),
          dd(backend.get(), rows, width, type.dtype), out(backend.get(), rows, width, type.dtype);
      dx.Write(x);
      dd.Write(delta);
      const DeviceMemory weight = backend->Upload(w);
      backend->AddRmsNorm({.x = dx.matrix,
                           .delta = dd.matrix,
                           .weight = reinterpret_cast<const float*>(weight.get()),
                           .eps = 1e-5f,
                           .out = out.matrix});
      const std::vector<float> got = out.Read(), sums = dx.Read();
      for (int32_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (int32_t i = 0; i < width; ++i) {
          EXPECT_EQ(sums[r * width + i], x[r * width + i] + delta[r * width + i]);
          squares += double{sums[r * width + i]} * sums[r * width + i];
        }
        for (int32_t i = 0; i < width; ++i) {
          const double expected = sums[r * width + i] / std::sqrt(squares / width + 1e-5) * w[i];
          ASSERT_NEAR(got[r * width + i], expected, (type.step + 2e-6) * std::abs(expected) + 1e-7);
        }
      }
      std::vector<float> gate_up = RandomFloats(2 * rows * width, rng);
      for (int32_t i = 0; i < width; ++i) gate_up[i] = (i % 40 - 20) * 5.0f;  // far tails too
      RoundTo(type.dtype, &gate_up);
      DeviceRows dg(backend.get(), rows, 2 * width, type.dtype);
      dg.Write(gate_up);
      backend->SwiGlu(dg.matrix, out.matrix);
      const std::vector<float> activated = out.Read();
      for (int32_t r = 0; r < rows; ++r) {
        for (int32_t i = 0; i < width; ++i) {
          const double gate = gate_up[2 * r * width + i];
          const double expected = gate / (1 + std::exp(-gate)) * gate_up[(2 * r + 1) * width + i];
          ASSERT_NEAR(activated[r * width + i], expected, (type.step + 2e-6) * std::abs(expected) + 1e-6);
        }
      }
    }
    ASSERT_TRUE(backend->status().ok()) << backend->status();
  }
}

TEST(CudaSample, GreedyTakesTheLowestOfEqualsAndRefusesNaN) {
  const std::unique_ptr<Backend> backend = CudaBackendFor(kTypes[0]);
  const int32_t vocab = 50001, rows = 5;
  std::mt19937 rng(5);
  std::vector<float> logits = RandomFloats(rows * vocab, rng);
  logits[0 * vocab + 777] = logits[0 * vocab + 40123] = 9;
  logits[1 * vocab + vocab - 1] = 11;
  logits[2 * vocab + 31000] = NAN;
  logits[3 * vocab + 5] = INFINITY;
  std::fill_n(logits.begin() + 4 * vocab, vocab, -INFINITY);
  DeviceRows device(backend.get(), rows, vocab, DType::kF32);
  device.Write(logits);
  SamplingParams params;
  params.temperature = 0;
  params.top_logprobs = 0;
  const std::vector<int32_t> history = {1};
  std::vector<LogitRow> wanted(rows);
  for (LogitRow& row : wanted) row.sampling = &params, row.history = history, row.prompt_tokens = 1;
  std::vector<SampledToken> out(rows);
  ASSERT_TRUE(backend->Sample(device.matrix, wanted, out).ok());
  EXPECT_EQ(out[0].token, 777);
  EXPECT_EQ(out[1].token, vocab - 1);
  for (int32_t r = 2; r < rows; ++r) EXPECT_EQ(out[r].token, SampledToken::kNoToken) << r;
  for (int32_t r = 0; r < 2; ++r) {
    double total = 0;
    for (int32_t i = 0; i < vocab; ++i) total += std::exp(double{logits[r * vocab + i]});
    EXPECT_NEAR(out[r].logprobs.logprob, logits[r * vocab + out[r].token] - std::log(total), 1e-5);
  }
}

}  // namespace
}  // namespace lorikeet
