// Products of many rows: our kernel beside cuBLASLt's best proposal, over Llama-3.1-8B's linears and
// the numbers of rows that steps with prompts have; 8 layers' weights in rotation, recorded. Prints
// microseconds of one product, its rate, and the ratio of the two times (under 1: ours is faster).
//   bench_gemm [ROWS...]
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "bench/device.h"
#include "engine/kernels/cuda/gemm.h"
#include "engine/kernels/cuda/tile_gemm.h"

namespace lorikeet::bench {
namespace {

constexpr int kLayers = 8;

struct Site {
  const char* name;
  int32_t in, out;
};
constexpr Site kSites[] = {{"o", 4096, 4096},
                           {"qkv", 4096, 6144},
                           {"gate-up", 4096, 28672},
                           {"down", 14336, 4096}};

class Products {
 public:
  Products(const Site& site, int32_t rows)
      : site_(site),
        x_(int64_t{2} * rows * site.in),
        y_(int64_t{2} * rows * site.out),
        gemm_(&errors_) {
    FillRandom(x_, 1, 1);
    for (int i = 0; i < kLayers; ++i) {
      weights_.emplace_back(int64_t{2} * site.in * site.out);
      FillRandom(weights_.back(), 0.02f, i);
    }
    x_matrix_ = Matrix(x_.data(), rows, site.in, DType::kBF16);
    y_matrix_ = Matrix(y_.data(), rows, site.out, DType::kBF16);
  }

  double Library() {
    return Measure([&](const DeviceBytes& weight, cudaStream_t stream) {
      gemm_.MultiplyByLibrary(MatrixOf(weight), x_matrix_, y_matrix_, stream);
    });
  }
  double Ours() {
    return Measure([&](const DeviceBytes& weight, cudaStream_t stream) {
      Check(cuda::LaunchTileGemm(MatrixOf(weight), x_matrix_, y_matrix_, stream), "a product");
    });
  }

 private:
  Matrix MatrixOf(const DeviceBytes& weight) const { return {weight.data(), site_.out, site_.in, DType::kBF16}; }
  // Seconds of one product.
  double Measure(const std::function<void(const DeviceBytes&, cudaStream_t)>& product) {
    const double seconds = MedianReplay([&](cudaStream_t stream) {
      for (const DeviceBytes& weight : weights_) product(weight, stream);
    });
    return seconds / kLayers;
  }

  const Site site_;
  DeviceBytes x_, y_;
  Matrix x_matrix_, y_matrix_;
  std::vector<DeviceBytes> weights_;
  cuda::FirstError errors_;
  cuda::Gemm gemm_;
};

void Print(const Site& site, int32_t rows) {
  Products products(site, rows);
  const double library = products.Library(), ours = products.Ours();
  const double flops = 2.0 * rows * site.in * site.out;
  std::printf("%-8s %5d %10.1f %8.0f %10.1f %8.0f %7.3f\n", site.name, rows,
              library * 1e6, flops / library * 1e-12, ours * 1e6, flops / ours * 1e-12, ours / library);
  std::fflush(stdout);
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  using namespace lorikeet::bench;
  std::vector<int32_t> rows;
  for (int i = 1; i < argc; ++i) rows.push_back(std::atoi(argv[i]));
  if (rows.empty()) rows = {128, 256, 512, 768, 1024, 2048, 4096};
  std::printf("%s\n%-8s %5s %10s %8s %10s %8s %7s\n", DeviceName().c_str(), "", "rows", "cuBLASLt",
              "TFLOP/s", "ours", "TFLOP/s", "ratio");
  for (const int32_t r : rows) {
    for (const Site& site : kSites) Print(site, r);
  }
}
