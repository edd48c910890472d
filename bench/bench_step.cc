// One step of Llama-3.1-8B's shapes with random weights: decoding at several batch sizes and
// contexts, base alone and with as many adapters as rows; then prompts. Prints a step's wall time,
// sampling included, and the floor: bytes of weights, adapters and keys and values over the read
// bandwidth measured in the same run; for prompts, the model's floating-point rate beside that of
// one large product.
//   bench_step [--quick | --profile SEQUENCES CONTEXT ROWS ADAPTERS] [--fp8]
// --fp8: with the layers' weights in 8 bits.
// --profile runs one kind of step unrecorded on a model of four layers: short, for a profiler.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "bench/device.h"
#include "bench/model_steps.h"
#include "bench/synthetic.h"
#include "engine/base/check.h"
#include "engine/kernels/backend.h"
#include "engine/kernels/cuda/gemm.h"
#include "engine/model/model.h"
#include "tests/support/load_images.h"

namespace lorikeet::bench {
namespace {

constexpr int32_t kMaxRows = 4096;
constexpr int64_t kKvBytes = int64_t{20} << 30;  // and as much for adapters

// Operations a second of one product of 8192 rows with the widest linear.
double ProductRate() {
  const int32_t rows = 8192, in = 4096, out = 14336;
  const DeviceBytes x(int64_t{2} * rows * in), w(int64_t{2} * in * out), y(int64_t{2} * rows * out);
  FillRandom(x, 1, 1);
  FillRandom(w, 0.02f, 2);
  cuda::FirstError errors;
  cuda::Gemm gemm(&errors);
  const double seconds = MedianReplay([&](cudaStream_t stream) {
    gemm.Multiply(Matrix(w.data(), out, in, DType::kBF16), Matrix(x.data(), rows, in, DType::kBF16),
                  Matrix(y.data(), rows, out, DType::kBF16), stream);
  });
  return 2.0 * rows * in * out / seconds;
}

struct Row {
  int32_t batch, context, distinct;
};

int Profile(int32_t sequences, int32_t context, int32_t rows, int32_t distinct,
            Quantization quantization) {
  ModelConfig config = Llama8B();
  config.layers = 4;
  const auto source = std::make_shared<SyntheticModel>(config);
  auto backend = MakeCudaBackend(
      {.quantization = quantization, .max_rows = kMaxRows, .record = false});
  LK_CHECK_MSG(backend.ok(), backend.status().ToString());
  auto model = Model::Load(source, backend->get(), kMaxRows);
  LK_CHECK_MSG(model.ok(), model.status().ToString());
  const KvLayout layout =
      KvLayout::Make(config.layers, config.kv_heads, config.head_dim, (*backend)->kv_dtype());
  (*backend)->AllocatePages(layout, 2 * kKvBytes);
  const int32_t pages = static_cast<int32_t>(kKvBytes / layout.page_bytes());
  const auto adapters = SyntheticAdapters(*source, distinct, {16});
  LoadImages((*backend)->images(), adapters, pages);
  ModelSteps steps(backend->get(), model->get(), layout, pages);
  const double seconds =
      steps.Measure(sequences, context, rows, adapters, 1);
  std::printf("%.3f ms\n", seconds * 1e3);
  return 0;
}

void LoadAll(AdapterImages* images, std::span<const std::shared_ptr<const Adapter>> adapters,
             int32_t first_page, int64_t page_bytes, double adapter_bytes) {
  const double start = Now();
  const int32_t pages = LoadImages(images, adapters, first_page) - first_page;
  const double bytes = static_cast<double>(pages) * static_cast<double>(page_bytes);
  const double used = adapter_bytes * static_cast<double>(adapters.size());
  std::printf("%zu adapters packed and copied at %.1f GB/s, %.1f %% of their pages unused\n",
              adapters.size(), bytes / (Now() - start) * 1e-9, 100 - 100 * used / bytes);
}

int Run(bool quick, Quantization quantization) {
  const double bandwidth = ReadBandwidth();
  const double rate = ProductRate();
  std::printf("%s, read bandwidth %.0f GB/s, bf16 product %.0f TFLOP/s\n", DeviceName().c_str(),
              bandwidth / 1e9, rate / 1e12);
  const auto source = std::make_shared<SyntheticModel>(Llama8B());
  const ModelConfig& config = source->config();
  absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCudaBackend({.quantization = quantization, .max_rows = kMaxRows});
  LK_CHECK_MSG(backend.ok(), backend.status().ToString());
  const double start = Now();
  absl::StatusOr<std::unique_ptr<Model>> model = Model::Load(source, backend->get(), kMaxRows);
  LK_CHECK_MSG(model.ok(), model.status().ToString());
  std::printf("weights loaded in %.1f s\n", Now() - start);
  const KvLayout layout =
      KvLayout::Make(config.layers, config.kv_heads, config.head_dim, (*backend)->kv_dtype());
  (*backend)->AllocatePages(layout, 2 * kKvBytes + (int64_t{4} << 30));
  const int32_t pages = static_cast<int32_t>(kKvBytes / layout.page_bytes());
  ModelSteps steps(backend->get(), model->get(), layout, pages);
  const double kv_token_bytes = static_cast<double>(layout.layer_bytes()) * config.layers /
                                KvLayout::kPageTokens;
  const auto adapters = SyntheticAdapters(*source, 256, {16});
  const double adapter_bytes = static_cast<double>(AdapterBytes(*source, 16));
  LoadAll((*backend)->images(), adapters, pages, layout.page_bytes(), adapter_bytes);

  std::printf("\n%5s %8s %9s %10s %10s %7s\n", "rows", "context", "adapters", "step ms", "floor ms",
              "ratio");
  std::vector<Row> rows;
  for (const int32_t context : {512, 4096}) {
    for (const int32_t batch : quick ? std::vector{1, 32, 256} : std::vector{1, 8, 16, 32, 64, 128, 256}) {
      for (const int32_t distinct : {0, 1, batch}) rows.push_back({batch, context, distinct});
    }
  }
  for (const Row& r : rows) {
    if (!steps.Fits(r.batch, r.context) || (r.batch == 1 && r.distinct == 1 && r.context > 512)) continue;
    const std::vector<std::shared_ptr<const Adapter>> used(adapters.begin(),
                                                           adapters.begin() + r.distinct);
    const double seconds = steps.Measure(r.batch, r.context, 1, used);
    const double floor = (static_cast<double>((*model)->weight_bytes()) + r.distinct * adapter_bytes +
                          kv_token_bytes * r.batch * r.context) / bandwidth;
    std::printf("%5d %8d %9d %10.3f %10.3f %7.2f\n", r.batch, r.context, r.distinct, seconds * 1e3,
                floor * 1e3, seconds / floor);
    std::fflush(stdout);
  }

  std::printf("\n%22s %9s %10s %10s %9s\n", "prompts", "adapters", "step ms", "TFLOP/s", "of bf16");
  double parameters = 0;  // in layers; the head runs for one row a sequence
  for (ModuleId m = 0; m + 1 < ModuleCount(config.layers); ++m) {
    parameters += static_cast<double>(source->weight(m).elements());
  }
  for (const int32_t sequences : {1, 4, 8}) {
    for (const int32_t distinct : {0, 1, sequences}) {
      const int32_t tokens = 512;
      const std::vector<std::shared_ptr<const Adapter>> used(adapters.begin(),
                                                             adapters.begin() + distinct);
      const double seconds = steps.Measure(sequences, tokens, tokens, used, 6);
      const double attention = 2.0 * tokens * tokens * config.heads * config.head_dim * config.layers;
      const double flops = sequences * (2 * parameters * tokens + attention);
      std::printf("%10d x %4d tokens %9d %10.3f %10.0f %8.0f%%\n", sequences, tokens, distinct,
                  seconds * 1e3, flops / seconds / 1e12, 100 * flops / seconds / rate);
      std::fflush(stdout);
    }
  }
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  const auto has = [&](const char* flag) {
    return std::any_of(argv + 1, argv + argc, [&](const char* a) { return !std::strcmp(a, flag); });
  };
  const auto quantization =
      has("--fp8") ? lorikeet::Quantization::kFp8 : lorikeet::Quantization::kNone;
  if (argc >= 6 && std::strcmp(argv[1], "--profile") == 0) {
    return lorikeet::bench::Profile(std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]),
                                    std::atoi(argv[5]), quantization);
  }
  return lorikeet::bench::Run(has("--quick"), quantization);
}
