// The CPU backend's operations against plain double-precision loops, on every instruction set this
// machine has, with random shapes, types, segments and ranks. Seeds are in the failure messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "engine/base/aligned_buffer.h"
#include "engine/base/dtype.h"
#include "engine/kernels/backend.h"
#include "engine/kernels/cpu/cpu_backend.h"
#include "engine/kernels/cpu/half_weight.h"
#include "engine/kernels/cpu/quant_weight.h"
#include "engine/kernels/thread_pool.h"
#include "engine/tensor/dequantize.h"
#include "tests/support/random_adapter.h"

namespace lorikeet {
namespace {

constexpr DType kQuantTypes[] = {DType::kQ4_0, DType::kQ4_1, DType::kQ8_0,
                                 DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

std::unique_ptr<Backend> CpuBackendWith(Precision precision, int32_t threads = 2) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCpuBackend({.precision = precision, .threads = threads, .max_rows = 512});
  LK_CHECK_MSG(backend.ok(), backend.status().ToString());
  return *std::move(backend);
}

struct Level {
  const char* name;
  CpuBackend::Features features;
};

// Every choice of instruction sets that this machine can run.
std::vector<Level> Levels() {
  const CpuBackend::Features here = CpuBackend::Features::OfThisMachine();
  std::vector<Level> levels = {{"avx2", {}}};
  if (here.avx512) levels.push_back({"avx512", {.avx512 = true}});
  if (here.avx512_vnni) levels.push_back({"vnni", {.avx512 = true, .avx512_vnni = true}});
  if (here.avx512_bf16) levels.push_back({"bf16", {.avx512 = true, .avx512_bf16 = true}});
  return levels;
}

std::vector<float> RoundedToBF16(std::vector<float> values) {
  for (float& v : values) v = BF16ToFloat(FloatToBF16(v));
  return values;
}

// Random bytes are valid blocks of every type once their float16 scales are finite and small.
std::vector<std::byte> RandomBlocks(DType dtype, int64_t elements, std::mt19937& rng) {
  std::vector<std::byte> bytes(ByteSize(dtype, elements));
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
  std::uniform_real_distribution<float> scale(0.001f, 0.02f);
  const DTypeInfo info = Info(dtype);
  for (int64_t block = 0; block < elements / info.block_elements; ++block) {
    std::byte* p = bytes.data() + block * info.block_bytes;
    const auto put = [&](int offset) {
      const uint16_t half = FloatToF16(scale(rng));
      std::memcpy(p + offset, &half, sizeof half);
    };
    put(dtype == DType::kQ6_K ? 208 : 0);
    if (dtype == DType::kQ4_1 || dtype == DType::kQ4_K || dtype == DType::kQ5_K) put(2);
  }
  return bytes;
}

struct Rows {
  int32_t rows, in;
  std::vector<int8_t> codes;
  std::vector<float> scales, sums32, sums16;
  int32_t planes;
  QuantRows view() {
    return {rows, in, codes.data(), scales.data(), sums32.data(), sums16.data(), planes};
  }
  // What element i of row r stands for.
  double value(int32_t r, int32_t i) const {
    double sum = 0;
    for (int32_t p = 0; p < planes; ++p) {
      const int64_t at = (int64_t{p} * rows + r) * in + i;
      sum += double{scales[at / 32]} * codes[at];
    }
    return sum;
  }
};

Rows Quantized(const std::vector<float>& x, int32_t rows, int32_t in, int32_t planes = 1) {
  const int32_t all = planes * rows * in;
  Rows q{rows, in, std::vector<int8_t>(all), std::vector<float>(all / 32),
         std::vector<float>(all / 32), std::vector<float>(all / 16), planes};
  for (int32_t r = 0; r < rows; ++r) QuantizeRow(x.data() + int64_t{r} * in, r, q.view());
  return q;
}

TEST(QuantizeRow, RoundsToNearestOfItsScaleAndSumsItsHalves) {
  std::mt19937 rng(1);
  const int32_t in = 320;
  std::vector<float> x = RandomFloats(in, rng);
  std::fill(x.begin() + 32, x.begin() + 64, 0.0f);  // a group without a scale
  Rows q = Quantized(x, 1, in);
  for (int32_t g = 0; g < in / 32; ++g) {
    float top = 0;
    for (int32_t i = 0; i < 32; ++i) top = std::max(top, std::abs(x[g * 32 + i]));
    EXPECT_FLOAT_EQ(q.scales[g], top / 127);
    int32_t halves[2] = {};
    for (int32_t i = 0; i < 32; ++i) {
      const int8_t code = q.codes[g * 32 + i];
      // Half a step, and the rounding of the reciprocal.
      EXPECT_LE(std::abs(code * q.scales[g] - x[g * 32 + i]), q.scales[g] * 0.50002f) << g << " " << i;
      halves[i / 16] += code;
    }
    EXPECT_FLOAT_EQ(q.sums16[2 * g], q.scales[g] * halves[0]);
    EXPECT_FLOAT_EQ(q.sums16[2 * g + 1], q.scales[g] * halves[1]);
    EXPECT_FLOAT_EQ(q.sums32[g], q.scales[g] * (halves[0] + halves[1]));
  }
}

TEST(QuantizeRow, TwoPlanesAreGoodTo16Bits) {
  std::mt19937 rng(2);
  const int32_t in = 320, rows = 3;
  const std::vector<float> x = RandomFloats(rows * in, rng);
  const Rows q = Quantized(x, rows, in, 2);
  for (int32_t i = 0; i < rows * in; ++i) {
    // What the first plane leaves is at most half its scale: the second's scale is 1/254 of it.
    EXPECT_NEAR(q.value(i / in, i % in), x[i], q.scales[i / 32] / 254 * 0.501) << i;
  }
}

struct QuantCase {
  const char* name;
  QuantGemmFn gemm;
  int32_t lanes;
};

std::vector<QuantCase> QuantKernels() {
  std::vector<QuantCase> kernels = {{"avx2", QuantGemmAvx2, 8}};
  if (CpuBackend::Features::OfThisMachine().avx512_vnni) kernels.push_back({"avx512", QuantGemmAvx512, 16});
  return kernels;
}

// The integer product is exact but for float32 scaling and summation, given the quantised inputs.
TEST(QuantGemm, MatchesDequantisedProductOfQuantisedRows) {
  for (const QuantCase& kernel : QuantKernels()) {
    for (DType dtype : kQuantTypes) {
      for (uint32_t seed = 0; seed < 12; ++seed) {
        std::mt19937 rng(seed);
        const int32_t in = 256 * (1 + rng() % 3);
        const int32_t out = 1 + rng() % 100;
        const int32_t rows = 1 + rng() % 11;
        TensorView view{dtype, {out, in}, {}};
        const std::vector<std::byte> bytes = RandomBlocks(dtype, int64_t{out} * in, rng);
        view.bytes = bytes;
        const QuantWeight packed = PackQuantWeight(view, kernel.lanes);
        const int32_t planes = 1 + seed % 2;
        Rows x = Quantized(RandomFloats(int64_t{rows} * in, rng), rows, in, planes);
        std::vector<float> y = Poisoned(int64_t{rows} * out);
        kernel.gemm(packed, x.view(), 0, rows, 0, packed.tiles(), {y.data(), rows, out});
        std::vector<float> w(int64_t{out} * in);
        Dequantize(dtype, bytes.data(), w.size(), w.data());
        for (int32_t r = 0; r < rows; ++r) {
          for (int32_t n = 0; n < out; ++n) {
            // Scale and offset parts cancel in part: bound by the sum of their magnitudes, with
            // the largest magnitude a weight of this row takes standing in for each part.
            double sum = 0, magnitude = 0, top = 0;
            for (int32_t k = 0; k < in; ++k) top = std::max<double>(top, std::abs(w[n * in + k]));
            for (int32_t k = 0; k < in; ++k) {
              const double a = x.value(r, k);
              sum += a * w[n * in + k];
              magnitude += std::abs(a) * 2 * top;
            }
            const double tolerance = 0x1p-23 * std::sqrt(in / 16.0) * magnitude;
            ASSERT_NEAR(y[r * out + n], sum, tolerance)
                << kernel.name << " " << Info(dtype).name << " seed " << seed << " [" << rows << ","
                << in << "]x[" << out << "] row " << r << " column " << n;
          }
        }
      }
    }
  }
}

TEST(QuantGemm, RowsDoNotDependOnTheirNeighbours) {
  for (const QuantCase& kernel : QuantKernels()) {
    for (DType dtype : kQuantTypes) {
      std::mt19937 rng(7);
      const int32_t in = 512, out = 70, rows = 13;
      TensorView view{dtype, {out, in}, {}};
      const std::vector<std::byte> bytes = RandomBlocks(dtype, int64_t{out} * in, rng);
      view.bytes = bytes;
      const QuantWeight packed = PackQuantWeight(view, kernel.lanes);
      const std::vector<float> x = RandomFloats(int64_t{rows} * in, rng);
      Rows all = Quantized(x, rows, in);
      std::vector<float> together = Poisoned(int64_t{rows} * out);
      kernel.gemm(packed, all.view(), 0, rows, 0, packed.tiles(), {together.data(), rows, out});
      for (int32_t r = 0; r < rows; ++r) {
        Rows one = Quantized({x.begin() + r * in, x.begin() + (r + 1) * in}, 1, in);
        std::vector<float> alone = Poisoned(out);
        kernel.gemm(packed, one.view(), 0, 1, 0, packed.tiles(), {alone.data(), 1, out});
        EXPECT_EQ(0, std::memcmp(alone.data(), together.data() + r * out, out * sizeof(float)))
            << kernel.name << " " << Info(dtype).name << " row " << r;
      }
    }
  }
}

TEST(RoundRowToBF16, RoundsToNearestEvenAndPadsToPairs) {
  if (!CpuBackend::Features::OfThisMachine().avx512_bf16) GTEST_SKIP() << "no AVX512_BF16 here";
  std::mt19937 rng(11);
  for (const int32_t width : {1, 2, 15, 16, 17, 40, 63}) {
    std::vector<float> x = RandomFloats(width, rng);
    x[0] = 1.0f + 0x1p-8f;  // half way between two: the even one is 1
    std::vector<uint16_t> out(width + 2, 0xabcd);
    RoundRowToBF16(x.data(), width, out.data());
    for (int32_t i = 0; i < width; ++i) EXPECT_EQ(out[i], FloatToBF16(x[i])) << width << " " << i;
    if (width % 2 == 1) {
      EXPECT_EQ(out[width], 0) << width;
    }
    EXPECT_EQ(out[(width + 1) / 2 * 2], 0xabcd) << width;
  }
}

struct HalfCase {
  const char* name;
  HalfGemmFn gemm;
  int32_t lanes;
  bool pairs;
};

std::vector<HalfCase> HalfKernels(DType dtype) {
  const CpuBackend::Features here = CpuBackend::Features::OfThisMachine();
  std::vector<HalfCase> kernels = {{"avx2", HalfGemmAvx2, 8, false}};
  if (here.avx512) kernels.push_back({"avx512", HalfGemmAvx512, 16, false});
  if (here.avx512_bf16 && dtype == DType::kBF16) {
    kernels.push_back({"bf16", HalfGemmAvx512Bf16, 16, true});
  }
  return kernels;
}

std::vector<float> HalfProduct(const HalfCase& kernel, const HalfWeight& w,
                               const std::vector<float>& x, int32_t rows) {
  std::vector<float> y = Poisoned(int64_t{rows} * w.out);
  Matrix input{const_cast<float*>(x.data()), rows, w.in};
  const int32_t width = (w.in + 1) / 2 * 2;
  std::vector<uint16_t> rounded(int64_t{rows} * width);
  if (kernel.pairs) {
    for (int32_t r = 0; r < rows; ++r) {
      RoundRowToBF16(x.data() + r * w.in, w.in, rounded.data() + r * width);
    }
    input = {rounded.data(), rows, width, DType::kBF16};
  }
  kernel.gemm(w, input, 0, w.tiles(), {y.data(), rows, w.out});
  return y;
}

TEST(HalfGemm, OddShapesMatchTheDefinitionAndRowsDoNotDependOnTheirNeighbours) {
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const HalfCase& kernel : HalfKernels(dtype)) {
      for (uint32_t seed = 0; seed < 24; ++seed) {
        std::mt19937 rng(seed);
        const int32_t in = 1 + rng() % 200, out = 1 + rng() % 100, rows = 1 + rng() % 31;
        std::vector<std::byte> stored(ByteSize(dtype, int64_t{out} * in));
        const std::vector<float> w = RandomAdapter::Fill(stored.data(), out, in, in, dtype, rng);
        const HalfWeight packed =
            PackHalfWeight({dtype, {out, in}, stored}, kernel.lanes, kernel.pairs);
        const std::vector<float> x = RoundedToBF16(RandomFloats(int64_t{rows} * in, rng));
        const std::vector<float> y = HalfProduct(kernel, packed, x, rows);
        for (int32_t r = 0; r < rows; ++r) {
          const std::vector<float> alone =
              HalfProduct(kernel, packed, {x.begin() + r * in, x.begin() + (r + 1) * in}, 1);
          for (int32_t n = 0; n < out; ++n) {
            double sum = 0, magnitude = 0;
            for (int32_t k = 0; k < in; ++k) {
              sum += double{x[r * in + k]} * w[n * in + k];
              magnitude += std::abs(double{x[r * in + k]} * w[n * in + k]);
            }
            // in roundings of half an ulp each, at most (Higham 2002, section 3.1); products of
            // bfloat16 and float16 are exact, and the last ulp is for the second order.
            const double tolerance = (in + 1) * 0x1p-24 * magnitude;
            ASSERT_NEAR(y[r * out + n], sum, tolerance)
                << kernel.name << " " << Info(dtype).name << " seed " << seed << " [" << rows << ","
                << in << "]x[" << out << "] row " << r << " column " << n;
            ASSERT_EQ(y[r * out + n], alone[n]) << kernel.name << " seed " << seed << " row " << r;
          }
        }
      }
    }
  }
}

void CheckRaggedSegments(Precision precision, const Level& level, DType weight_type) {
  for (uint32_t seed = 0; seed < 24; ++seed) {
    std::mt19937 rng(seed);
    const int32_t threads = 1 + seed % 3;
    auto backend = std::make_unique<CpuBackend>(
        BackendOptions{.precision = precision, .max_rows = 512}, threads, level.features);
    const int32_t in = 8 * (1 + rng() % 20);
    const int32_t rows = 1 + rng() % 40;
    std::vector<int32_t> outs(1 + rng() % 3);
    for (int32_t& out : outs) out = 1 + rng() % 150;
    const DType factor_type[] = {DType::kF32, DType::kBF16, DType::kF16};
    std::vector<std::unique_ptr<RandomAdapter>> adapters;
    for (int i = 0; i < 4; ++i) {
      adapters.push_back(std::make_unique<RandomAdapter>(in, outs, factor_type[rng() % 3], 40, rng));
      if (i == 3) adapters.back()->Share(in, outs);
      if (i % 2) adapters.back()->StandBeside(outs, rng);
    }
    std::vector<AdapterSegment> segments;
    std::vector<const RandomAdapter*> row_adapter(rows, nullptr);
    for (int32_t r = rng() % 3, i = 0; r < rows && i < 4; ++i) {
      const int32_t end = std::min<int32_t>(rows, r + 1 + rng() % 15);
      segments.push_back({r, end, &adapters[i]->adapter});
      std::fill(row_adapter.begin() + r, row_adapter.begin() + end, adapters[i].get());
      r = end + rng() % 2;
    }
    // Exact in bfloat16, so that every level has the same definition.
    std::vector<float> x = RoundedToBF16(RandomFloats(int64_t{rows} * in, rng));
    std::vector<std::vector<std::byte>> stored(outs.size());
    std::vector<std::vector<float>> w(outs.size()), bias(outs.size());
    std::vector<TensorView> views(2 * outs.size());
    std::vector<LinearSource> sources;
    for (size_t m = 0; m < outs.size(); ++m) {
      const int64_t n = int64_t{outs[m]} * in;
      stored[m].resize(ByteSize(weight_type, n));
      w[m] = RandomAdapter::Fill(stored[m].data(), outs[m], in, in, weight_type, rng);
      views[2 * m] = {weight_type, {outs[m], in}, stored[m]};
      if (rng() % 2) bias[m] = RandomFloats(outs[m], rng);
      views[2 * m + 1] = {DType::kF32, {outs[m]}, std::as_bytes(std::span(bias[m]))};
      sources.push_back({&views[2 * m], bias[m].empty() ? nullptr : &views[2 * m + 1]});
    }
    const std::unique_ptr<LinearWeight> weight = backend->LoadLinear(0, sources);
    const int32_t width = weight->width();
    std::vector<float> y = Poisoned(int64_t{rows} * width);
    const std::vector<int32_t> tokens(rows);
    backend->BeginStep({.tokens = tokens, .segments = segments});
    backend->LinearProducts({.weight = weight.get(),
                             .x = {x.data(), rows, in},
                             .y = {y.data(), rows, width}});
    int32_t first_column = 0;
    std::vector<double> expected, magnitude;
    for (size_t m = 0; m < outs.size(); ++m) {
      for (int32_t r = 0; r < rows; ++r) {
        ReferenceRow(x.data() + r * in, in, outs[m], w[m], bias[m], row_adapter[r], m, &expected,
                     &magnitude);
        for (int32_t n = 0; n < outs[m]; ++n) {
          ASSERT_NEAR(y[r * width + first_column + n], expected[n],
                      0x1p-23 * 16 * magnitude[n])
              << level.name << " " << Info(weight_type).name << " seed " << seed << " output " << m
              << " row " << r << " column " << n;
        }
      }
      first_column += outs[m];
    }
  }
}

TEST(LinearProducts, RaggedSegmentsOfAnyRankMatchTheDefinition) {
  for (const DType weight_type : {DType::kF32, DType::kBF16, DType::kF16}) {
    CheckRaggedSegments(Precision::kExact, Levels().back(), weight_type);
    for (const Level& level : Levels()) CheckRaggedSegments(Precision::kFast, level, weight_type);
  }
}

// The choice of level reaches the kernels: bfloat16 inputs are rounded only where bfloat16 is
// multiplied, and only in `fast`.
TEST(LinearProducts, RoundsInputsOnlyInFastBfloat16Products) {
  const uint16_t one = FloatToBF16(1.0f);
  const std::vector<uint16_t> weights(8 * 8, one);
  const TensorView view{DType::kBF16, {8, 8}, std::as_bytes(std::span(weights))};
  const LinearSource source{&view, nullptr};
  std::vector<float> x(8, 1.0f + 0x1p-10f), y(8);
  const std::vector<int32_t> tokens(1);
  for (const Level& level : Levels()) {
    for (const Precision precision : {Precision::kExact, Precision::kFast}) {
      CpuBackend backend({.precision = precision, .max_rows = 8}, 1, level.features);
      const auto weight = backend.LoadLinear(0, {&source, 1});
      backend.BeginStep({.tokens = tokens});
      backend.LinearProducts(
          {.weight = weight.get(), .x = {x.data(), 1, 8}, .y = {y.data(), 1, 8}});
      const bool rounds = precision == Precision::kFast && level.features.avx512_bf16;
      EXPECT_EQ(y[0], rounds ? 8.0f : 8.0f + 0x1p-7f) << level.name;
    }
  }
}

// Softmax attention written out, over positions in any chunking, with and without a window.
TEST(Attention, ChunkedPagedMatchesTheDefinition) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 rng(seed);
    std::unique_ptr<Backend> backend = CpuBackendWith(Precision::kExact);
    const int32_t head_dim = 8 * (1 + rng() % 9);
    const int32_t kv_heads = 1 + rng() % 3;
    const int32_t heads = kv_heads * (1 + rng() % 3);
    const int32_t tokens = 1 + rng() % 90;
    const int32_t window = seed % 2 ? 1 + rng() % 30 : 0;
    const int32_t layers = 3, layer = rng() % 3;
    const KvLayout layout = KvLayout::Make(layers, kv_heads, head_dim, DType::kF32);
    const int32_t pages = layout.PagesFor(tokens);
    const int64_t bytes = pages * layout.page_bytes();
    ASSERT_EQ(backend->AllocatePages(layout, bytes), pages);
    // Another request's leftovers must not reach this one.
    std::fill_n(reinterpret_cast<float*>(backend->pages()), bytes / sizeof(float), NAN);
    std::vector<int32_t> ids(pages);
    for (int32_t i = 0; i < pages; ++i) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), rng);
    std::vector<float> q = RandomFloats(int64_t{tokens} * heads * head_dim, rng);
    std::vector<float> k = RandomFloats(int64_t{tokens} * kv_heads * head_dim, rng);
    std::vector<float> v = RandomFloats(int64_t{tokens} * kv_heads * head_dim, rng);
    std::vector<float> out = Poisoned(q.size());
    const std::vector<float> q0 = q, k0 = k;
    const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
    for (int32_t at = 0; at < tokens;) {
      const int32_t rows = std::min<int32_t>(tokens - at, 1 + rng() % 40);
      const int32_t begin[] = {0, rows};
      const int32_t page_begin[] = {0, layout.PagesFor(at + rows)};
      std::vector<int32_t> positions(rows);
      std::iota(positions.begin(), positions.end(), at);
      backend->BeginStep({.tokens = positions,
                          .positions = positions,
                          .sequence_begin = begin,
                          .page_begin = page_begin,
                          .page_ids = ids});
      const auto part = [&](std::vector<float>& m, int32_t h) {
        return Matrix{m.data() + int64_t{at} * h * head_dim, rows, h * head_dim};
      };
      RopeStoreArgs store{.q = part(q, heads), .k = part(k, kv_heads), .v = part(v, kv_heads)};
      store.head_dim = head_dim;
      store.layer = layer;
      backend->RopeStore(store);
      backend->Attention({part(q, heads), part(out, heads), heads, layer, window, scale});
      at += rows;
    }
    EXPECT_EQ(q, q0) << "no rotary asked for";
    for (int32_t t = 0; t < tokens; ++t) {
      for (int32_t h = 0; h < heads; ++h) {
        const int32_t kv_head = h / (heads / kv_heads);
        const int32_t from = window > 0 ? std::max(0, t - window + 1) : 0;
        std::vector<double> weight;
        double total = 0;
        for (int32_t s = from; s <= t; ++s) {
          double dot = 0;
          for (int32_t d = 0; d < head_dim; ++d) {
            dot += double{q0[(t * heads + h) * head_dim + d]} *
                   k0[(s * kv_heads + kv_head) * head_dim + d];
          }
          weight.push_back(std::exp(dot * scale));
          total += weight.back();
        }
        for (int32_t d = 0; d < head_dim; ++d) {
          double sum = 0;
          for (int32_t s = from; s <= t; ++s) {
            sum += weight[s - from] / total * v[(s * kv_heads + kv_head) * head_dim + d];
          }
          ASSERT_NEAR(out[(t * heads + h) * head_dim + d], sum, 4e-6 * std::sqrt(head_dim))
              << "seed " << seed << " token " << t << " head " << h << " dim " << d;
        }
      }
    }
  }
}

TEST(Elementwise, AddRmsNormAndSwiGluMatchTheirFormulas) {
  std::mt19937 rng(3);
  std::unique_ptr<Backend> backend = CpuBackendWith(Precision::kExact);
  const int32_t rows = 9, width = 72;
  std::vector<float> x = RandomFloats(rows * width, rng), delta = RandomFloats(rows * width, rng);
  const std::vector<float> weight = RandomFloats(width, rng), x0 = x;
  std::vector<float> out = Poisoned(rows * width);
  backend->AddRmsNorm({.x = {x.data(), rows, width},
                       .delta = {delta.data(), rows, width},
                       .weight = weight.data(),
                       .eps = 1e-5f,
                       .out = {out.data(), rows, width}});
  for (int32_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int32_t i = 0; i < width; ++i) {
      EXPECT_EQ(x[r * width + i], x0[r * width + i] + delta[r * width + i]);
      squares += double{x[r * width + i]} * x[r * width + i];
    }
    for (int32_t i = 0; i < width; ++i) {
      const double expected = x[r * width + i] / std::sqrt(squares / width + 1e-5) * weight[i];
      EXPECT_NEAR(out[r * width + i], expected, 1e-6 * std::max(1.0, std::abs(expected)));
    }
  }
  std::vector<float> gate_up = RandomFloats(2 * rows * width, rng);
  for (int32_t i = 0; i < width; ++i) gate_up[i] = (i - width / 2) * 5.0f;  // far tails too
  backend->SwiGlu({gate_up.data(), rows, 2 * width}, {out.data(), rows, width});
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t i = 0; i < width; ++i) {
      const double gate = gate_up[2 * r * width + i];
      const double expected = gate / (1 + std::exp(-gate)) * gate_up[(2 * r + 1) * width + i];
      EXPECT_NEAR(out[r * width + i], expected, 1e-6 * std::max(1.0, std::abs(expected))) << gate;
    }
  }
}

TEST(ThreadPool, EveryTaskRunsOnceInEveryLoop) {
  for (int32_t threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int32_t loop = 0; loop < 2000; ++loop) {
      const int32_t tasks = loop % 17;
      std::vector<std::atomic<int32_t>> runs(tasks);
      pool.ParallelFor(tasks, [&](int32_t task, int32_t thread) {
        EXPECT_LT(thread, threads);
        runs[task].fetch_add(1);
      });
      for (int32_t t = 0; t < tasks; ++t) ASSERT_EQ(runs[t].load(), 1) << threads << " " << loop;
    }
  }
}

}  // namespace
}  // namespace lorikeet
