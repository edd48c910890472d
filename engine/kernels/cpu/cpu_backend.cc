#include "engine/kernels/cpu/cpu_backend.h"

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/clock.h"
#include "engine/kernels/cpu/float_gemm.h"
#include "engine/kernels/cpu/simd.h"

namespace lorikeet {
namespace {

constexpr int64_t kDefaultPagesBytes = int64_t{1} << 30;

void AddRmsNormRow(float* x, const float* delta, const float* weight, float eps, int32_t width,
                   float* out) {
  __m256 squares = _mm256_setzero_ps();
  for (int32_t i = 0; i < width; i += 8) {
    __m256 v = _mm256_loadu_ps(x + i);
    if (delta) {
      v = _mm256_add_ps(v, _mm256_loadu_ps(delta + i));
      _mm256_storeu_ps(x + i, v);
    }
    squares = _mm256_fmadd_ps(v, v, squares);
  }
  const float scale = 1.0f / std::sqrt(simd::Sum(squares) / width + eps);
  for (int32_t i = 0; i < width; i += 8) {
    const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(scale));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(v, _mm256_loadu_ps(weight + i)));
  }
}

void SwiGluRow(const float* gate, const float* up, int32_t width, float* out) {
  const __m256 one = _mm256_set1_ps(1.0f);
  for (int32_t i = 0; i < width; i += 8) {
    const __m256 g = _mm256_loadu_ps(gate + i);
    const __m256 denominator = _mm256_add_ps(one, simd::Exp(_mm256_sub_ps(_mm256_setzero_ps(), g)));
    const __m256 silu = _mm256_div_ps(g, denominator);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
  }
}

// __builtin_cpu_supports does not know it in every compiler.
bool HasF16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const BackendOptions& options) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !HasF16c()) {
    return absl::FailedPreconditionError(
        "this processor lacks AVX2, FMA or F16C; the CPU backend needs all three");
  }
  const int32_t cores = static_cast<int32_t>(std::thread::hardware_concurrency());
  if (options.threads < 0 || options.threads > 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads is ", options.threads, "; it must be 0 (all cores) to 1024"));
  }
  const int32_t threads = options.threads > 0 ? options.threads : cores > 0 ? cores : 1;
  return std::make_unique<CpuBackend>(options, threads,
                                      CpuBackend::Features::OfThisMachine());
}

CpuBackend::Features CpuBackend::Features::OfThisMachine() {
  __builtin_cpu_init();
  Features features;
  features.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl");
  features.avx512_vnni = features.avx512 && __builtin_cpu_supports("avx512vnni");
  features.avx512_bf16 = features.avx512 && __builtin_cpu_supports("avx512bf16");
  return features;
}

CpuBackend::CpuBackend(const BackendOptions& options, int32_t threads, Features features)
    : options_(options),
      features_(features),
      pool_(threads),
      panels_(threads),
      attention_scratch_(threads),
      sampler_scratch_(threads) {}

std::string CpuBackend::Describe() const {
  return absl::StrCat("cpu (", features_.avx512 ? "avx512" : "avx2",
                      features_.avx512_vnni ? " vnni" : "", features_.avx512_bf16 ? " bf16" : "",
                      ", ", pool_.threads(), pool_.threads() == 1 ? " thread, " : " threads, ",
                      options_.precision == Precision::kExact ? "exact" : "fast", ")");
}

DType CpuBackend::kv_dtype() const {
  return options_.precision == Precision::kExact ? DType::kF32 : DType::kF16;
}

void CpuBackend::ParallelFor(int32_t n, const std::function<void(int32_t, int32_t)>& fn) {
  pool_.ParallelFor(n, fn);
}

DeviceMemory CpuBackend::Allocate(int64_t bytes) {
  auto memory = std::make_shared<AlignedBuffer>(bytes);
  return DeviceMemory(memory, memory->data());
}

DeviceMemory CpuBackend::Upload(std::span<const float> values) {
  DeviceMemory memory = Allocate(values.size_bytes());
  std::memcpy(memory.get(), values.data(), values.size_bytes());
  return memory;
}

int32_t CpuBackend::AllocatePages(const KvLayout& layout, int64_t bytes) {
  if (bytes == 0) bytes = kDefaultPagesBytes;
  const int64_t pages = std::min<int64_t>(bytes / layout.page_bytes(), INT32_MAX);
  kv_ = {layout, AlignedBuffer(pages * layout.page_bytes())};
  return static_cast<int32_t>(pages);
}

// All threads read a buffer that no cache holds, each its share of it.
double CpuBackend::MeasureBandwidth() {
  constexpr int64_t kBytes = int64_t{256} << 20;
  constexpr int32_t kReads = 3;
  constexpr int32_t kTasks = 64;
  constexpr int64_t kWords = kBytes / kTasks / int64_t{sizeof(uint64_t)};
  AlignedBuffer buffer(kBytes);
  std::memset(buffer.data(), 1, kBytes);
  std::array<uint64_t, kTasks> sums{};
  const SteadyClock clock;
  int64_t best_us = std::numeric_limits<int64_t>::max();
  for (int32_t i = 0; i < kReads; ++i) {
    const int64_t begin_us = clock.NowMicros();
    ParallelFor(kTasks, [&](int32_t task, int32_t) {
      const uint64_t* words = buffer.as<uint64_t>() + task * kWords;
      sums[task] += std::accumulate(words, words + kWords, uint64_t{0});
    });
    best_us = std::min(best_us, clock.NowMicros() - begin_us);
  }
  LK_CHECK(std::accumulate(sums.begin(), sums.end(), uint64_t{0}) != 0);
  return 1e6 * kBytes / static_cast<double>(std::max<int64_t>(best_us, 1));
}

int32_t CpuBackend::BeginStep(const StepInput& step) {
  step_ = step;
  cos_.clear();
  logit_segments_ = SegmentsOf(step.logit_rows);
  return static_cast<int32_t>(step.tokens.size());
}

std::vector<AdapterSegment> CpuBackend::SegmentsOf(std::span<const int32_t> rows) const {
  std::vector<AdapterSegment> segments;
  const auto index_of = [&](int32_t row) {
    return static_cast<int32_t>(std::lower_bound(rows.begin(), rows.end(), row) - rows.begin());
  };
  for (const AdapterSegment& segment : step_.segments) {
    const int32_t begin = index_of(segment.row_begin);
    const int32_t end = index_of(segment.row_end);
    if (begin < end) segments.push_back({begin, end, segment.adapter});
  }
  return segments;
}

void CpuBackend::AddRmsNorm(const NormArgs& args) {
  ForRows(args.out.rows, [&](int32_t i) {
    const int32_t r = args.rows == RowSet::kAll ? i : step_.logit_rows[i];
    const Adapter* adapter = AdapterOf(r);
    const float* own = adapter && !adapter->norms.empty() ? adapter->norms[args.norm] : nullptr;
    AddRmsNormRow(args.x.row(r), args.delta.data ? args.delta.row(r) : nullptr,
                  own ? own : args.weight, args.eps, args.x.width, args.out.row(i));
  });
}

void CpuBackend::SwiGlu(Matrix gate_up, Matrix out) {
  ForRows(out.rows, [&](int32_t r) {
    SwiGluRow(gate_up.row(r), gate_up.row(r) + out.width, out.width, out.row(r));
  });
}

absl::Status CpuBackend::Sample(Matrix logits, std::span<const LogitRow> rows,
                                std::span<SampledToken> out) {
  pool_.ParallelFor(static_cast<int32_t>(rows.size()), [&](int32_t i, int32_t thread) {
    lorikeet::Sample(std::span<const float>(logits.row(i), rows[i].width(logits.width)), rows[i],
                     &sampler_scratch_[thread], &out[i]);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::Download(const float* from, std::span<float> to) {
  std::copy_n(from, to.size(), to.data());
  return absl::OkStatus();
}

}  // namespace lorikeet
