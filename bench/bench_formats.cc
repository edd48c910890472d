// What a load of each kind of adapter costs on Llama-3.1-8B's shapes: writes a directory of every kind
// as PEFT saves it, with random values, and loads it from the page cache as a server of two bytes an
// activation does. Prints the milliseconds to read and hash it, to normalise it and to pack its image, the
// bytes of its file, on the host and on a device, those over what the method's own parameters take
// there (two bytes a value of a matrix, four one of a vector or an index), and of loads whose bytes are
// copied the speed of `normalise` over memcpy's in this run, to memory written before and to new memory.
//   bench_formats FOLDER [NAME...]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/normalise.h"
#include "bench/formats.h"
#include "bench/synthetic.h"
#include "engine/base/check.h"
#include "engine/base/in_parallel.h"
#include "engine/kernels/cuda/adapter_image.h"
#include "engine/memory/kv_layout.h"
#include "engine/model/base_model_view.h"

namespace lorikeet::bench {
namespace {

namespace fs = std::filesystem;

double Milliseconds(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// The shortest of `runs`.
double Best(int runs, const std::function<void()>& run) {
  double best = Milliseconds(run);
  for (int i = 1; i < runs; ++i) best = std::min(best, Milliseconds(run));
  return best;
}

// Bytes a millisecond that are copied, to memory that was written before and to new memory.
struct CopySpeed {
  double again = 0, fresh = 0;
};

CopySpeed MeasureCopies() {
  constexpr size_t kBytes = size_t{84} << 20;
  AlignedBuffer from(kBytes), to(kBytes);
  std::memset(from.data(), 1, kBytes);
  return {kBytes / Best(30, [&] { std::memcpy(to.data(), from.data(), kBytes); }),
          kBytes / Best(30, [&] { std::memcpy(AlignedBuffer(kBytes).data(), from.data(), kBytes); })};
}

class Loads {
 public:
  explicit Loads(const std::shared_ptr<const ModelSource>& model)
      : base_(model), copy_(MeasureCopies()) {
    const ModelConfig& config = model->config();
    page_bytes_ =
        KvLayout::Make(config.layers, config.kv_heads, config.head_dim, DType::kBF16).page_bytes();
    for (const ModuleId id : base_.modules()) {
      widths_.push_back({base_.shape(id).in, base_.shape(id).out});
    }
    std::printf("memcpy of 84 MiB: %.1f GB/s, to new memory %.1f GB/s\n", copy_.again * 1e-6,
                copy_.fresh * 1e-6);
    std::printf("%-26s %8s %9s %8s %9s %9s %9s %8s %8s %8s\n", "adapter", "read, ms", "normalise",
                "image", "file, MB", "host, MB", "device", "/ own", "/ memcpy", "/ new");
  }

  void Measure(const Format& format, const fs::path& directory) {
    const int64_t file_bytes = WriteFormat(format, directory);
    const int runs = file_bytes < 200'000'000 ? 5 : 1;
    AdapterFiles files;
    const double read_ms = Best(runs, [&] {
      auto read = ReadAdapterFiles(directory, {});
      LK_CHECK_MSG(read.ok(), read.status().ToString());
      files = *std::move(read);
    });
    const auto normalise = [&](bool on_host) {
      Problems problems;
      const RawAdapter raw = ParseAdapter(files, &problems);
      LK_CHECK_MSG(problems.empty(), problems.ToStatus().ToString());
      auto adapter = Normalise(raw, base_, {.precision = FactorPrecision::kBF16, .allow_dense = true,
                                            .on_host = on_host, .blobs = &blobs_});
      LK_CHECK_MSG(adapter.ok(), adapter.status().ToString());
      return *std::move(adapter);
    };
    std::shared_ptr<const Adapter> adapter;
    double normalise_ms = Milliseconds([&] { adapter = normalise(true); });
    const int64_t host_bytes = adapter->bytes;
    const int again = format.copied ? 29 : 9;
    if (normalise_ms < 500) normalise_ms = std::min(normalise_ms, Best(again, [&] { normalise(true); }));
    adapter = normalise(false);
    auto plan = cuda::PlanImage(*adapter, widths_, {}, DType::kBF16, page_bytes_);
    LK_CHECK_MSG(plan.ok(), plan.status().ToString());
    AlignedBuffer image(plan->size.most_pages() * page_bytes_);
    const double image_ms = Best(runs, [&] {
      InParallel(static_cast<int64_t>(plan->pieces.size()), [&](int64_t i) {
        cuda::WritePiece(plan->pieces[i], image.data() + plan->pieces[i].to);
      });
    });
    int64_t shared_bytes = 0;
    if (adapter->shared != nullptr) {
      auto in_common = cuda::PlanImage(*adapter->shared, widths_, {}, DType::kBF16, page_bytes_);
      LK_CHECK_MSG(in_common.ok(), in_common.status().ToString());
      shared_bytes = in_common->size.bytes(page_bytes_);
    }
    const double device_bytes = static_cast<double>(plan->size.bytes(page_bytes_) + shared_bytes);
    std::printf("%-26s %8.1f %9.1f %8.1f %9.2f %9.2f %9.2f %8.2f", format.name.c_str(), read_ms,
                normalise_ms, image_ms, file_bytes * 1e-6, host_bytes * 1e-6, device_bytes * 1e-6,
                device_bytes / static_cast<double>(format.own_bytes));
    if (format.copied) {
      const double speed = file_bytes / normalise_ms;
      std::printf(" %8.2f %8.2f", speed / copy_.again, speed / copy_.fresh);
    }
    if (shared_bytes > 0) {
      std::printf("  %.2f MB of it in common with others", static_cast<double>(shared_bytes) * 1e-6);
    }
    std::printf("\n");
    std::fflush(stdout);
    fs::remove_all(directory);
  }

 private:
  const BaseModelView base_;
  const CopySpeed copy_;
  int64_t page_bytes_ = 0;
  std::vector<cuda::ModuleWidths> widths_;
  SharedBlobs blobs_;
};

int Run(const fs::path& folder, const std::set<std::string>& names) {
  const auto model = std::make_shared<SyntheticModel>(Llama8B());
  Loads loads(model);
  for (const Format& format : Formats(BaseModelView(model))) {
    if (names.empty() || names.contains(format.name)) loads.Measure(format, folder / "adapter");
  }
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "bench_formats FOLDER [NAME...]\n");
    return 1;
  }
  return lorikeet::bench::Run(argv[1], {argv + 2, argv + argc});
}
