// Rotary embedding, key/value store and paged attention on the CPU.
//
// Inside a head's block of a page, K lies transposed, [head_dim, kPageTokens], so that the scores
// of a page's 16 tokens come out of plain vector FMAs; V is [kPageTokens, head_dim].
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/kernels/cpu/cpu_backend.h"
#include "engine/kernels/cpu/simd.h"
#include "engine/kernels/cpu/widen.h"

namespace lorikeet {
namespace {

constexpr int32_t kPageTokens = KvLayout::kPageTokens;
constexpr int32_t kQueryRows = 8;  // rows of a sequence that share a pass over its pages
static_assert(kPageTokens == 16, "a page's scores are two AVX2 vectors");

void RmsNormHead(float* x, const float* weight, float eps, int32_t width) {
  float squares = 0;
  for (int32_t i = 0; i < width; ++i) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / width + eps);
  for (int32_t i = 0; i < width; ++i) x[i] *= scale * weight[i];
}

// Rotates pairs (i, i + width/2), Hugging Face's order.
void RotateHead(float* x, const float* cos, const float* sin, int32_t width) {
  const int32_t half = width / 2;
  for (int32_t i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

// The step's sequences and where their pages are.
struct KvView {
  const StepInput& step;
  const KvLayout& layout;
  std::byte* pages;

  // Sequence that owns row `row`.
  int32_t SequenceOf(int32_t row) const {
    const auto it = std::upper_bound(step.sequence_begin.begin(), step.sequence_begin.end(), row);
    return static_cast<int32_t>(it - step.sequence_begin.begin()) - 1;
  }
};

// K (or V) block of `head` for tokens [16 * block, ...) of a sequence.
std::byte* HeadBlock(const KvView& kv, int32_t sequence, int32_t block, int32_t layer, bool value,
                     int32_t head) {
  const int32_t page = kv.step.page_ids[kv.step.page_begin[sequence] + block * kv.layout.pages_per_block +
                                   kv.layout.PageOfLayer(layer)];
  return kv.pages + page * kv.layout.page_bytes() + kv.layout.Offset(layer, value, head);
}

void StoreElement(DType dtype, std::byte* base, int32_t index, float value) {
  if (dtype == DType::kF32) {
    reinterpret_cast<float*>(base)[index] = value;
  } else {
    reinterpret_cast<uint16_t*>(base)[index] =
        static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
  }
}

void StoreKv(const RopeStoreArgs& args, const KvView& kv, int32_t row) {
  const int32_t sequence = kv.SequenceOf(row);
  const int32_t position = kv.step.positions[row];
  const int32_t block = position / kPageTokens;
  const int32_t slot = position % kPageTokens;
  const DType dtype = kv.layout.dtype;
  for (int32_t h = 0; h < kv.layout.kv_heads; ++h) {
    const float* k = args.k.row(row) + h * args.head_dim;
    const float* v = args.v.row(row) + h * args.head_dim;
    std::byte* keys = HeadBlock(kv, sequence, block, args.layer, false, h);
    std::byte* values = HeadBlock(kv, sequence, block, args.layer, true, h);
    for (int32_t d = 0; d < args.head_dim; ++d) {
      StoreElement(dtype, keys, d * kPageTokens + slot, k[d]);
      StoreElement(dtype, values, slot * args.head_dim + d, v[d]);
    }
  }
}

// One head group's attention for a few rows of one sequence: running softmax over pages.
struct HeadTask {
  const AttentionArgs& args;
  const KvView& kv;
  int32_t sequence;
  int32_t kv_head;
  int32_t row_begin;  // rows of the step
  int32_t row_end;

  int32_t group() const { return args.heads / kv.layout.kv_heads; }
  int32_t queries() const { return (row_end - row_begin) * group(); }
  int32_t position(int32_t row) const { return kv.step.positions[row]; }
  int32_t row_of(int32_t query) const { return row_begin + query / group(); }
  int64_t offset_of(int32_t query) const {  // into the row, of the query's head
    return int64_t{kv_head * group() + query % group()} * kv.layout.head_dim;
  }
};

struct Scratch {
  float* keys;    // [head_dim, 16] widened
  float* values;  // [16, head_dim] widened
  float* top;     // [queries] running maximum
  float* total;   // [queries] running sum of exponentials
  float* sums;    // [queries, head_dim] running weighted values
  float* scores;  // [16]

  static int64_t Floats(int32_t head_dim, int32_t queries) {
    return 2 * kPageTokens * head_dim + queries * (2 + head_dim) + kPageTokens;
  }
};

Scratch Carve(float* memory, int32_t head_dim, int32_t queries) {
  Scratch s;
  s.keys = memory;
  s.values = s.keys + kPageTokens * head_dim;
  s.scores = s.values + kPageTokens * head_dim;
  s.sums = s.scores + kPageTokens;
  s.top = s.sums + int64_t{queries} * head_dim;
  s.total = s.top + queries;
  return s;
}

// Scaled scores of one query against the 16 keys of a page, those outside [first, last] at -inf.
void PageScores(const float* query, const float* keys, int32_t head_dim, float scale,
                int32_t first, int32_t last, float* scores) {
  __m256 low[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  __m256 high[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int32_t d = 0; d < head_dim; d += 2) {
    for (int i = 0; i < 2; ++i) {
      const __m256 q = _mm256_set1_ps(query[d + i]);
      low[i] = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys + (d + i) * kPageTokens), low[i]);
      high[i] = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys + (d + i) * kPageTokens + 8), high[i]);
    }
  }
  const __m256 factor = _mm256_set1_ps(scale);
  _mm256_storeu_ps(scores, _mm256_mul_ps(factor, _mm256_add_ps(low[0], low[1])));
  _mm256_storeu_ps(scores + 8, _mm256_mul_ps(factor, _mm256_add_ps(high[0], high[1])));
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  for (int32_t t = 0; t < std::min(first, kPageTokens); ++t) scores[t] = kNone;
  for (int32_t t = std::max(last + 1, 0); t < kPageTokens; ++t) scores[t] = kNone;
}

// Folds the scores and values of a page's first `tokens` tokens into the running softmax of one
// query. What lies behind them is another request's leftovers, perhaps NaN: it is never read.
void Accumulate(const Scratch& s, int32_t query, int32_t tokens, int32_t head_dim) {
  __m256 a = _mm256_loadu_ps(s.scores);
  __m256 b = _mm256_loadu_ps(s.scores + 8);
  const float page_top = simd::Max(_mm256_max_ps(a, b));
  if (page_top == -std::numeric_limits<float>::infinity()) return;  // no key of it is visible
  const float top = std::max(s.top[query], page_top);
  const float shrink = std::exp(s.top[query] - top);
  a = simd::Exp(_mm256_sub_ps(a, _mm256_set1_ps(top)));
  b = simd::Exp(_mm256_sub_ps(b, _mm256_set1_ps(top)));
  _mm256_storeu_ps(s.scores, a);
  _mm256_storeu_ps(s.scores + 8, b);
  s.top[query] = top;
  s.total[query] = s.total[query] * shrink + simd::Sum(_mm256_add_ps(a, b));
  float* sums = s.sums + int64_t{query} * head_dim;
  for (int32_t d = 0; d < head_dim; d += 8) {
    __m256 acc = _mm256_mul_ps(_mm256_loadu_ps(sums + d), _mm256_set1_ps(shrink));
    __m256 odd = _mm256_setzero_ps();
    const float* v = s.values + d;
    int32_t t = 0;
    for (; t + 2 <= tokens; t += 2, v += 2 * head_dim) {
      acc = _mm256_fmadd_ps(_mm256_set1_ps(s.scores[t]), _mm256_loadu_ps(v), acc);
      odd = _mm256_fmadd_ps(_mm256_set1_ps(s.scores[t + 1]), _mm256_loadu_ps(v + head_dim), odd);
    }
    if (t < tokens) acc = _mm256_fmadd_ps(_mm256_set1_ps(s.scores[t]), _mm256_loadu_ps(v), acc);
    _mm256_storeu_ps(sums + d, _mm256_add_ps(acc, odd));
  }
}

const float* Widened(const KvView& kv, const std::byte* block, float* scratch) {
  if (kv.layout.dtype == DType::kF32) return reinterpret_cast<const float*>(block);
  Widen(kv.layout.dtype, block, int64_t{kPageTokens} * kv.layout.head_dim, scratch);
  return scratch;
}

void WriteOutput(const HeadTask& task, const Scratch& s) {
  const int32_t head_dim = task.kv.layout.head_dim;
  for (int32_t q = 0; q < task.queries(); ++q) {
    float* out = task.args.out.row(task.row_of(q)) + task.offset_of(q);
    const float inverse = 1.0f / s.total[q];
    for (int32_t d = 0; d < head_dim; ++d) out[d] = s.sums[int64_t{q} * head_dim + d] * inverse;
  }
}

void Attend(const HeadTask& task, float* memory) {
  const AttentionArgs& args = task.args;
  const int32_t head_dim = task.kv.layout.head_dim;
  const int32_t queries = task.queries();
  const Scratch owned = Carve(memory, head_dim, queries);
  std::fill_n(owned.top, queries, -std::numeric_limits<float>::infinity());
  std::fill_n(owned.total, queries, 0.0f);
  std::fill_n(owned.sums, int64_t{queries} * head_dim, 0.0f);
  const int32_t last_position = task.position(task.row_end - 1);
  const int32_t first_position =
      args.window > 0 ? std::max(0, task.position(task.row_begin) - args.window + 1) : 0;
  Scratch s = owned;
  for (int32_t block = first_position / kPageTokens; block <= last_position / kPageTokens;
       ++block) {
    const float* keys = Widened(
        task.kv, HeadBlock(task.kv, task.sequence, block, args.layer, false, task.kv_head),
        owned.keys);
    s.values = const_cast<float*>(Widened(
        task.kv, HeadBlock(task.kv, task.sequence, block, args.layer, true, task.kv_head),
        owned.values));
    for (int32_t q = 0; q < queries; ++q) {
      const int32_t position = task.position(task.row_of(q));
      const int32_t last = position - block * kPageTokens;
      const int32_t first = args.window > 0 ? last - args.window + 1 : 0;
      if (last < 0 || first >= kPageTokens) continue;
      PageScores(args.q.row(task.row_of(q)) + task.offset_of(q), keys, head_dim, args.scale,
                 first, last, s.scores);
      Accumulate(s, q, std::min(last + 1, kPageTokens), head_dim);
    }
  }
  WriteOutput(task, s);
}

}  // namespace

// cos and sin of position · frequency for every row, in double so that far positions stay exact.
void CpuBackend::Rotate(const float* inverse_frequencies, int32_t half) {
  const size_t rows = step_.positions.size();
  cos_.resize(rows * half);
  sin_.resize(rows * half);
  for (size_t t = 0; t < rows; ++t) {
    for (int32_t i = 0; i < half; ++i) {
      // Hugging Face multiplies in float32; so does this, then takes the exact cosine of that.
      const float angle = static_cast<float>(step_.positions[t]) * inverse_frequencies[i];
      cos_[t * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sin_[t * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

void CpuBackend::RopeStore(const RopeStoreArgs& args) {
  const KvView kv{step_, kv_.layout, kv_.pages.data()};
  const int32_t heads = args.q.width / args.head_dim;
  const int32_t half = args.head_dim / 2;
  if (args.inverse_frequencies && cos_.empty()) Rotate(args.inverse_frequencies, half);
  const auto prepare = [&](float* head, const float* norm, int32_t row) {
    if (norm) RmsNormHead(head, norm, args.norm_eps, args.head_dim);
    if (args.inverse_frequencies) {
      RotateHead(head, &cos_[int64_t{row} * half], &sin_[int64_t{row} * half], args.head_dim);
    }
  };
  ForRows(args.q.rows, [&](int32_t row) {
    for (int32_t h = 0; h < heads; ++h) {
      prepare(args.q.row(row) + h * args.head_dim, args.q_norm, row);
    }
    for (int32_t h = 0; h < kv.layout.kv_heads; ++h) {
      prepare(args.k.row(row) + h * args.head_dim, args.k_norm, row);
    }
    StorePrefix(args, row);
    StoreKv(args, kv, row);
  });
}

void CpuBackend::Attention(const AttentionArgs& args) {
  const KvView kv{step_, kv_.layout, kv_.pages.data()};
  attention_tasks_.clear();
  const std::span<const int32_t> begin = step_.sequence_begin;
  for (int32_t s = 0; s + 1 < static_cast<int32_t>(begin.size()); ++s) {
    for (int32_t row = begin[s]; row < begin[s + 1]; row += kQueryRows) {
      for (int32_t h = 0; h < kv.layout.kv_heads; ++h) attention_tasks_.push_back({s, row, h});
    }
  }
  const int32_t group = args.heads / kv.layout.kv_heads;
  const int64_t floats = Scratch::Floats(kv.layout.head_dim, kQueryRows * group);
  const int32_t tasks = static_cast<int32_t>(attention_tasks_.size());
  pool_.ParallelFor(tasks, [&](int32_t i, int32_t thread) {
    const AttentionTask& t = attention_tasks_[i];
    std::vector<float>& scratch = attention_scratch_[thread];
    if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(floats);
    const int32_t row_end = std::min(begin[t.sequence + 1], t.row + kQueryRows);
    Attend({args, kv, t.sequence, t.kv_head, t.row, row_end}, scratch.data());
  });
  AttendPrompts(args);
}

}  // namespace lorikeet
