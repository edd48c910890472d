// The parts of adapters beyond low-rank pairs: the CUDA backend against the CPU's float32, with random
// shapes, segments and sets of parts, on poisoned outputs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "tests/gpu/device_rows.h"
#include "tests/support/load_images.h"
#include "tests/support/random_parts.h"

namespace lorikeet {
namespace {

// One step of a model with rows of several adapters, on both backends.
class Parts {
 public:
  // `hidden`: 0 for any.
  Parts(const TypeCase& type, uint32_t seed, int32_t hidden = 0)
      : type_(type), seed_(seed), rng_(seed), cuda_(CudaBackendFor(type)) {
    auto cpu = MakeCpuBackend({.precision = Precision::kExact, .threads = 2, .max_rows = 2048});
    LK_CHECK_MSG(cpu.ok(), cpu.status().ToString());
    cpu_ = *std::move(cpu);
    const int32_t dims[] = {8, 16, 64, 80};
    model_.head_dim = dims[rng_() % 4];
    model_.kv_heads = 1 + rng_() % 2;
    model_.heads = model_.kv_heads * (1 + rng_() % 3);
    model_.hidden = hidden > 0 ? hidden : 8 * (1 + rng_() % 40);
    model_.vocab = 8 * (1 + rng_() % 30);
    LoadModel();
    for (int i = 0; i < 5; ++i) random_.emplace_back(model_, type.dtype, rng_);
    LoadAdapters();
    MakeStep();
  }

  void CheckEmbedding() {
    Compare("embedding", model_.hidden, {}, {}, DType::kF32, [](Backend* backend, Matrix, Matrix y) {
      backend->Embed(y);
    });
  }
  void CheckNorms() {
    const std::vector<float> x = Values(model_.hidden), delta = Values(model_.hidden);
    const std::vector<float> weight = RandomFloats(model_.hidden, rng_);
    for (int32_t norm = 0; norm < FinalNorm(1); ++norm) {
      Compare("norm", model_.hidden, delta, x, type_.dtype,
              [&](Backend* backend, Matrix delta, Matrix out, Matrix residual) {
                const DeviceMemory w = backend->Upload(weight);
                const auto* weights = reinterpret_cast<const float*>(w.get());
                backend->AddRmsNorm({residual, delta, weights, norm, 1e-5f, out});
                float done = 0;  // before the weight goes
                LK_CHECK(backend->Download(residual.row(0), {&done, 1}).ok());
              });
    }
  }
  void CheckLinear() {
    const std::vector<float> x = Values(model_.hidden);
    Compare("linear", cpu_qkv_->width(), x, {}, type_.dtype,
            [&](Backend* backend, Matrix x, Matrix y) {
              const auto& weight = backend == cpu_.get() ? cpu_qkv_ : cuda_qkv_;
              backend->LinearProducts({.weight = weight.get(), .x = x, .y = y});
            });
  }
  // Keys and values of prefixes are seen by what attends to them.
  void CheckAttention() {
    const std::vector<float> qkv = Values(cpu_qkv_->width());
    const int32_t q = model_.q_width(), kv = model_.kv_width();
    Compare("attention", q, qkv, {}, type_.dtype, [&](Backend* backend, Matrix x, Matrix out) {
      RopeStoreArgs store{.q = x.Columns(0, q), .k = x.Columns(q, kv), .v = x.Columns(q + kv, kv)};
      store.head_dim = model_.head_dim;
      backend->RopeStore(store);
      const float scale = 1 / std::sqrt(static_cast<float>(model_.head_dim));
      backend->Attention({store.q, out, model_.heads, 0, 0, scale});
    });
  }
  void CheckBottlenecks() {
    const std::vector<float> x = Values(model_.hidden), h = Values(model_.hidden);
    for (int32_t block = 0; block < 2; ++block) {
      Compare("bottleneck", model_.hidden, h, x, type_.dtype,
              [&](Backend* backend, Matrix h, Matrix, Matrix residual) {
                backend->Bottlenecks({residual, h, block});
              }, /*in_place=*/true);
    }
  }

 private:
  std::vector<float> Values(int32_t width) {
    std::vector<float> values = RandomFloats(int64_t{count_} * width, rng_);
    RoundTo(type_.dtype, &values);
    return values;
  }

  TensorView Weight(int32_t rows, int32_t width) {
    std::vector<float> values = RandomFloats(int64_t{rows} * width, rng_);
    for (float& v : values) v /= std::sqrt(static_cast<float>(width));
    stored_.push_back(Encode(type_.dtype, values));
    return {type_.dtype, {rows, width}, stored_.back()};
  }

  void LoadModel() {
    for (const int32_t out : model_.outs()) views_.push_back(Weight(out, model_.hidden));
    views_.push_back(Weight(model_.vocab, model_.hidden));
    std::vector<float>& bias = biases_.emplace_back(RandomFloats(model_.q_width(), rng_));
    const TensorView bias_view{DType::kF32, {model_.q_width()}, std::as_bytes(std::span(bias))};
    const LinearSource qkv[] = {{&views_[0], &bias_view}, {&views_[1]}, {&views_[2]}};
    const LinearSource head[] = {{&views_[3]}};
    cpu_qkv_ = cpu_->LoadLinear(0, qkv);
    cuda_qkv_ = cuda_->LoadLinear(0, qkv);
    cuda_head_ = cuda_->LoadLinear(HeadModule(1), head);
    cpu_->LoadEmbedding(views_[3]);
    cuda_->LoadEmbedding(views_[3]);
  }

  // Behind the pages of the step's one sequence. Pages that matrices do not fit in.
  void LoadAdapters() {
    const auto layout = [&](DType dtype) {
      return KvLayout::Make(1, model_.kv_heads, model_.head_dim, dtype);
    };
    const int32_t kv_pages = layout(type_.dtype).PagesFor(kMostRows);
    const int64_t least = 4 * (model_.hidden + 64 + cpu_qkv_->width());
    KvLayout cuda = layout(type_.dtype);
    while (cuda.page_bytes() < least) ++cuda.layers_per_page;
    cpu_->AllocatePages(layout(DType::kF32), kv_pages * layout(DType::kF32).page_bytes());
    cuda_->AllocatePages(cuda, 1 << 30);
    std::vector<std::shared_ptr<const Adapter>> adapters;
    for (const RandomParts& random : random_) adapters.push_back(random.adapter);
    LoadImages(cuda_->images(), adapters, kv_pages);
  }

  void MakeStep() {
    count_ = 1 + rng_() % kMostRows;
    for (int32_t r = rng_() % 3; r < count_;) {
      const Adapter* adapter = std::next(random_.begin(), rng_() % random_.size())->adapter.get();
      const int32_t end = std::min<int32_t>(count_, r + 1 + rng_() % 20);
      segments_.push_back({r, end, adapter});
      r = end + rng_() % 2;
    }
    for (int32_t r = 0; r < count_; ++r) tokens_.push_back(rng_() % model_.vocab);
    for (const AdapterSegment& s : segments_) {
      const int32_t virtuals = s.adapter->virtual_tokens.count;
      for (int32_t r = s.row_begin; virtuals > 0 && r < s.row_end; r += 2) {
        tokens_[r] = -1 - static_cast<int32_t>(rng_() % virtuals);
      }
    }
    positions_.resize(count_);
    std::iota(positions_.begin(), positions_.end(), 0);
    pages_.resize((count_ + KvLayout::kPageTokens - 1) / KvLayout::kPageTokens);
    std::iota(pages_.rbegin(), pages_.rend(), 0);
  }

  // y of run(backend, x, y, residual) on both; x of the activation type, `residual` float32. Errors
  // are roundings to the type of intermediate results, none of them far larger than the largest
  // value of a row, at most eight in turn; then float32 sums.
  template <typename Run>
  void Compare(const char* what, int32_t width, const std::vector<float>& x,
               const std::vector<float>& residual, DType dtype, const Run& run,
               bool in_place = false) {
    std::vector<float> y[2];
    for (const bool cuda : {false, true}) {
      Backend* backend = cuda ? cuda_.get() : cpu_.get();
      const std::vector<int32_t> begin = {0, count_};
      const std::vector<int32_t> page_begin = {0, static_cast<int32_t>(pages_.size())};
      const int32_t rows = backend->BeginStep({.tokens = tokens_,
                                               .positions = positions_,
                                               .sequence_begin = begin,
                                               .page_begin = page_begin,
                                               .page_ids = pages_,
                                               .segments = segments_});
      y[cuda] = cuda ? RunOn<DeviceRows>(backend, rows, width, x, residual, dtype, run, in_place)
                     : RunOn<HostRows>(backend, rows, width, x, residual, DType::kF32, run, in_place);
      ASSERT_TRUE(backend->status().ok()) << backend->status();
    }
    const double step = dtype == DType::kF32 ? 0x1p-23 : type_.step;
    for (int32_t r = 0; r < count_; ++r) {
      const float* expected = &y[0][int64_t{r} * width];
      double largest = 0;
      for (int32_t i = 0; i < width; ++i) largest = std::max(largest, double{std::abs(expected[i])});
      const double tolerance = (8 * step + 0x1p-20 * std::sqrt(model_.hidden)) * largest;
      for (int32_t i = 0; i < width; ++i) {
        ASSERT_NEAR(y[1][int64_t{r} * width + i], expected[i], tolerance)
            << what << ", " << Info(type_.dtype).name << " seed " << seed_ << " row " << r << " of "
            << count_ << " column " << i << " hidden " << model_.hidden << " heads " << model_.heads
            << "/" << model_.kv_heads << " of " << model_.head_dim;
      }
    }
  }

  struct HostRows {
    std::vector<float> values;
    Matrix matrix;
    HostRows(Backend*, int32_t rows, int32_t width, DType)
        : values(Poisoned(int64_t{rows} * width)), matrix(values.data(), rows, width) {}
    void Write(const std::vector<float>& from) { std::copy(from.begin(), from.end(), values.begin()); }
    std::vector<float> Read() const { return values; }
  };

  // Rows past the step's are computed for nothing: NaN, they must touch no other.
  template <typename Rows, typename Run>
  std::vector<float> RunOn(Backend* backend, int32_t rows, int32_t width, std::vector<float> x,
                           std::vector<float> residual, DType dtype, const Run& run, bool in_place) {
    const int32_t x_width = static_cast<int32_t>(x.size()) / count_;
    const int32_t residual_width = static_cast<int32_t>(residual.size()) / count_;
    x.resize(int64_t{rows} * x_width, NAN);
    residual.resize(int64_t{rows} * residual_width, NAN);
    const DType x_dtype = std::is_same_v<Rows, HostRows> ? DType::kF32 : type_.dtype;
    Rows from(backend, rows, x_width, x_dtype), to(backend, rows, width, dtype),
        beside(backend, rows, residual_width, DType::kF32);
    from.Write(x);
    beside.Write(residual);
    if constexpr (std::is_invocable_v<Run, Backend*, Matrix, Matrix, Matrix>) {
      run(backend, from.matrix, to.matrix, beside.matrix);
    } else {
      run(backend, from.matrix, to.matrix);
    }
    return in_place ? from.Read() : to.Read();
  }

  static constexpr int32_t kMostRows = 90;

  const TypeCase type_;
  const uint32_t seed_;
  std::mt19937 rng_;
  std::unique_ptr<Backend> cpu_, cuda_;
  PartsModel model_;
  std::list<std::vector<std::byte>> stored_;
  std::list<std::vector<float>> biases_;
  std::vector<TensorView> views_;
  std::unique_ptr<LinearWeight> cpu_qkv_, cuda_qkv_, cuda_head_;
  std::list<RandomParts> random_;
  int32_t count_ = 0;
  std::vector<AdapterSegment> segments_;
  std::vector<int32_t> tokens_, positions_, pages_;
};

TEST(CudaAdapters, EveryPartIsWhatTheCpuMakesOfIt) {
  for (const TypeCase& type : kTypes) {
    for (uint32_t seed = 0; seed < 25; ++seed) {
      Parts parts(type, seed);
      parts.CheckEmbedding();
      parts.CheckNorms();
      parts.CheckLinear();
      parts.CheckAttention();
      parts.CheckBottlenecks();
      if (HasFatalFailure()) return;
    }
  }
}

// More than a block of threads has of a circulant delta's inputs at a time.
TEST(CudaAdapters, LinearsOfManyInputsAreWhatTheCpuMakesOfThem) {
  for (const TypeCase& type : kTypes) {
    for (uint32_t seed = 0; seed < 6; ++seed) {
      Parts parts(type, seed, seed % 2 == 0 ? 4608 : 6144);
      parts.CheckLinear();
      if (HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace lorikeet
