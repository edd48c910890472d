// Paged attention of the CUDA backend against plain double-precision loops, in steps that decode some sequences
// and bring several tokens of others. Seeds are in the failure messages.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "tests/gpu/device_rows.h"
#include "tests/support/random_adapter.h"

namespace lorikeet {
namespace {

// Sequences of a random history: some decode, some bring several tokens.
struct AttentionCase {
  int32_t head_dim, kv_heads, heads, window, layer, layers = 3;
  struct Sequence {
    std::vector<float> q, k, v;  // [tokens, heads or kv_heads, head_dim]
    std::vector<int32_t> pages;
    int32_t tokens = 0;
  };
  std::vector<Sequence> sequences;
  KvLayout layout;
  std::unique_ptr<LinearWeight> weight;
};

std::vector<double> ReferenceHead(const AttentionCase& c, const AttentionCase::Sequence& s,
                                  int32_t t, int32_t head) {
  const int32_t kv_head = head / (c.heads / c.kv_heads), dim = c.head_dim;
  const int32_t from = c.window > 0 ? std::max(0, t - c.window + 1) : 0;
  std::vector<double> weights, out(dim, 0.0);
  double total = 0, top = -INFINITY;
  for (int32_t at = from; at <= t; ++at) {
    double dot = 0;
    for (int32_t d = 0; d < dim; ++d) {
      dot += double{s.q[(t * c.heads + head) * dim + d]} *
             s.k[(at * c.kv_heads + kv_head) * dim + d];
    }
    weights.push_back(dot / std::sqrt(dim));
    top = std::max(top, weights.back());
  }
  for (double& w : weights) total += w = std::exp(w - top);
  for (int32_t at = from; at <= t; ++at) {
    for (int32_t d = 0; d < dim; ++d) {
      out[d] += weights[at - from] / total * s.v[(at * c.kv_heads + kv_head) * dim + d];
    }
  }
  return out;
}

// Of the type's activations, with pages for all tokens.
AttentionCase RandomAttention(const TypeCase& type, Backend* backend, uint32_t seed) {
  std::mt19937 rng(seed);
  AttentionCase c;
  const int32_t dims[] = {64, 128, 80, 8, 256, 96};
  c.head_dim = dims[rng() % 6];
  c.kv_heads = 1 + rng() % 3;
  const int32_t groups[] = {1, 3, 4, 8, 9};
  c.heads = c.kv_heads * groups[rng() % 5];
  c.window = seed % 3 == 1 ? 1 + rng() % 300 : 0;
  c.layer = rng() % c.layers;
  c.layout = KvLayout::Make(c.layers, c.kv_heads, c.head_dim, type.dtype);
  // The weight of q, k and v tells the backend how many query heads share a KV head.
  std::vector<TensorView> views;
  const std::vector<std::byte> zeros(ByteSize(type.dtype, int64_t{8} * c.heads * c.head_dim));
  for (const int32_t heads : {c.heads, c.kv_heads, c.kv_heads}) {
    const int64_t bytes = ByteSize(type.dtype, int64_t{8} * heads * c.head_dim);
    views.push_back({type.dtype, {heads * c.head_dim, 8}, std::span(zeros).first(bytes)});
  }
  const LinearSource sources[] = {{&views[0]}, {&views[1]}, {&views[2]}};
  c.weight = backend->LoadLinear(0, sources);

  c.sequences.resize(1 + rng() % 4);
  int32_t pages = 0;
  for (AttentionCase::Sequence& s : c.sequences) {
    s.tokens = 1 + rng() % 700;
    s.q = RandomFloats(int64_t{s.tokens} * c.heads * c.head_dim, rng);
    s.k = RandomFloats(int64_t{s.tokens} * c.kv_heads * c.head_dim, rng);
    s.v = RandomFloats(int64_t{s.tokens} * c.kv_heads * c.head_dim, rng);
    for (auto* values : {&s.q, &s.k, &s.v}) RoundTo(type.dtype, values);
    pages += c.layout.PagesFor(s.tokens);
  }
  LK_CHECK(backend->AllocatePages(c.layout, pages * c.layout.page_bytes()) == pages);
  std::vector<int32_t> ids(pages);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), rng);
  for (AttentionCase::Sequence& s : c.sequences) {
    const int32_t count = c.layout.PagesFor(s.tokens);
    s.pages.assign(ids.end() - count, ids.end());
    ids.resize(ids.size() - count);
  }
  return c;
}

// One step: `counts[i]` tokens of sequence i from `done[i]` on. Returns [rows, heads * head_dim].
std::vector<float> AttendStep(const AttentionCase& c, const TypeCase& type, const std::vector<int32_t>& done,
                              const std::vector<int32_t>& counts, Backend* backend) {
  std::vector<int32_t> positions, begin = {0}, page_begin = {0}, page_ids;
  std::vector<float> q, k, v;
  for (size_t i = 0; i < c.sequences.size(); ++i) {
    if (counts[i] == 0) continue;
    const AttentionCase::Sequence& s = c.sequences[i];
    for (int32_t r = 0; r < counts[i]; ++r) positions.push_back(done[i] + r);
    const auto append = [&](const std::vector<float>& from, int32_t heads, auto* to) {
      const auto first = from.begin() + int64_t{done[i]} * heads * c.head_dim;
      to->insert(to->end(), first, first + int64_t{counts[i]} * heads * c.head_dim);
    };
    append(s.q, c.heads, &q);
    append(s.k, c.kv_heads, &k);
    append(s.v, c.kv_heads, &v);
    begin.push_back(static_cast<int32_t>(positions.size()));
    page_ids.insert(page_ids.end(), s.pages.begin(), s.pages.begin() + c.layout.PagesFor(done[i] + counts[i]));
    page_begin.push_back(static_cast<int32_t>(page_ids.size()));
  }
  const int32_t rows = backend->BeginStep({.tokens = positions,
                                           .positions = positions,
                                           .sequence_begin = begin,
                                           .page_begin = page_begin,
                                           .page_ids = page_ids});
  const auto rows_of = [&](std::vector<float>* values, int32_t heads) {
    DeviceRows device(backend, rows, heads * c.head_dim, type.dtype);
    values->resize(int64_t{rows} * heads * c.head_dim, NAN);
    device.Write(*values);
    return device;
  };
  const DeviceRows dq = rows_of(&q, c.heads), dk = rows_of(&k, c.kv_heads), dv = rows_of(&v, c.kv_heads);
  DeviceRows out(backend, rows, c.heads * c.head_dim, type.dtype);
  RopeStoreArgs store{.q = dq.matrix, .k = dk.matrix, .v = dv.matrix};
  store.head_dim = c.head_dim;
  store.layer = c.layer;
  backend->RopeStore(store);
  const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  backend->Attention({dq.matrix, out.matrix, c.heads, c.layer, c.window, scale});
  LK_CHECK_MSG(backend->status().ok(), backend->status().ToString());
  return out.Read();
}

// All tokens, in steps that `rng` cuts; [sequence][tokens, heads * head_dim].
std::vector<std::vector<float>> Attend(const AttentionCase& c, const TypeCase& type, std::mt19937& rng,
                                       Backend* backend) {
  int32_t pages = 0;
  for (const AttentionCase::Sequence& s : c.sequences) pages += c.layout.PagesFor(s.tokens);
  cudaMemset(backend->pages(), 0xff, pages * c.layout.page_bytes());  // NaN in every type
  std::vector<std::vector<float>> results(c.sequences.size());
  std::vector<int32_t> done(c.sequences.size()), counts(c.sequences.size());
  while (true) {
    for (size_t i = 0; i < c.sequences.size(); ++i) {
      // Mostly single tokens at the end, so that decoding sees long histories.
      const int32_t left = c.sequences[i].tokens - done[i];
      counts[i] = left > 3 ? std::min<int32_t>(left - 2, 1 + rng() % 300) : std::min(left, 1);
    }
    if (std::all_of(counts.begin(), counts.end(), [](int32_t n) { return n == 0; })) return results;
    const std::vector<float> got = AttendStep(c, type, done, counts, backend);
    auto at = got.begin();
    for (size_t i = 0; i < counts.size(); ++i) {
      const int64_t values = int64_t{counts[i]} * c.heads * c.head_dim;
      results[i].insert(results[i].end(), at, at + values);
      at += values;
      done[i] += counts[i];
    }
  }
}

TEST(CudaAttention, MixedPagedStepsMatchTheDefinition) {
  for (const TypeCase& type : kTypes) {
    for (uint32_t seed = 0; seed < 24; ++seed) {
      const std::unique_ptr<Backend> backend = CudaBackendFor(type);
      const AttentionCase c = RandomAttention(type, backend.get(), seed);
      std::mt19937 rng(seed);
      const std::vector<std::vector<float>> got = Attend(c, type, rng, backend.get());
      for (size_t i = 0; i < c.sequences.size(); ++i) {
        const AttentionCase::Sequence& s = c.sequences[i];
        for (int32_t t = 0; t < s.tokens; ++t) {
          if (t % 23 != 0 && t + 4 < s.tokens) continue;  // a few of many
          for (int32_t h = 0; h < c.heads; ++h) {
            const std::vector<double> expected = ReferenceHead(c, s, t, h);
            for (int32_t d = 0; d < c.head_dim; ++d) {
              // Probabilities and result are rounded once each; values are about 1.
              ASSERT_NEAR(got[i][(int64_t{t} * c.heads + h) * c.head_dim + d], expected[d],
                          4 * type.step + 4e-6 * std::sqrt(c.head_dim))
                  << Info(type.dtype).name << " seed " << seed << " head_dim " << c.head_dim << " group "
                  << c.heads / c.kv_heads << " window " << c.window << " sequence " << i << " position " << t
                  << " head " << h << " dim " << d;
            }
          }
        }
      }
    }
  }
}

TEST(CudaAttention, BatchInvariantResultsDoNotDependOnHowStepsAreCut) {
  for (const TypeCase& type : {kTypes[0], kTypes[1]}) {
    for (uint32_t seed = 0; seed < 24; ++seed) {
      const std::unique_ptr<Backend> backend = CudaBackendFor(type, true, Quantization::kNone, /*batch_invariant=*/true);
      const AttentionCase c = RandomAttention(type, backend.get(), seed);
      std::mt19937 rng(seed);
      const std::vector<std::vector<float>> once = Attend(c, type, rng, backend.get());
      const std::vector<std::vector<float>> again = Attend(c, type, rng, backend.get());
      for (size_t i = 0; i < c.sequences.size(); ++i) {
        ASSERT_EQ(std::memcmp(once[i].data(), again[i].data(), once[i].size() * sizeof(float)), 0)
            << Info(type.dtype).name << " seed " << seed << " head_dim " << c.head_dim << " window " << c.window
            << " sequence " << i;
      }
    }
  }
}

}  // namespace
}  // namespace lorikeet
