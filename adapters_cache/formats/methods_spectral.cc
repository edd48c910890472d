// Methods with values at trained or random places of a delta or of its transform.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <random>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/methods.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

struct Place {
  int64_t row = 0;
  int64_t column = 0;
  float value = 0;
};

absl::Status MakeSparse(const ModuleTensors& m, std::vector<Place> places, Lowered* out) {
  std::stable_sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
    return a.row != b.row ? a.row < b.row : a.column < b.column;
  });
  out->has_sparse = true;
  out->sparse_row_begin.assign(m.out() + 1, 0);
  for (const Place& place : places) {
    if (place.row < 0 || place.row >= m.out() || place.column < 0 || place.column >= m.in()) {
      return m.Invalid(absl::StrCat("an index [", place.row, ", ", place.column, "] outside [",
                                    m.out(), ", ", m.in(), "]"));
    }
    ++out->sparse_row_begin[place.row + 1];
    out->sparse_column.push_back(static_cast<int32_t>(place.column));
    out->sparse_value.push_back(place.value);
  }
  std::partial_sum(out->sparse_row_begin.begin(), out->sparse_row_begin.end(),
                   out->sparse_row_begin.begin());
  return absl::OkStatus();
}

// The first `count` of torch.randperm(n) on the CPU: Fisher-Yates on MT19937, entries that moved in
// a map.
absl::StatusOr<std::vector<int64_t>> RandomPermutation(int64_t n, int64_t count, uint32_t seed) {
  constexpr int64_t kMost = (int64_t{1} << 32) / 20;  // beyond, torch draws 64 bits a step
  if (n >= kMost || count > n) {
    return absl::InvalidArgumentError(absl::StrCat(
        count, " random places of ", n, "; at most ", kMost - 1, " can be drawn as PyTorch does"));
  }
  std::mt19937 generator(seed);
  std::unordered_map<int64_t, int64_t> moved;
  const auto at = [&moved](int64_t i) {
    const auto it = moved.find(i);
    return it == moved.end() ? i : it->second;
  };
  std::vector<int64_t> first(count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t other = k + (k + 1 < n ? static_cast<int64_t>(generator() % (n - k)) : 0);
    const int64_t here = at(k);
    first[k] = at(other);
    moved[other] = here;
  }
  return first;
}

absl::StatusOr<std::vector<Place>> SpectrumPlaces(const ModuleTensors& m, const char* name) {
  LK_ASSIGN_OR_RETURN(const auto spectrum, m.Get(name, {-1}));
  const double seed = m.Number("random_loc_seed", 777);
  LK_RETURN_IF_ERROR(m.status());
  if (!(seed >= 0 && seed < 0x1p32)) return m.Invalid("random_loc_seed is out of range");
  LK_ASSIGN_OR_RETURN(const auto order,
                      RandomPermutation(int64_t{m.out()} * m.in(),
                                        static_cast<int64_t>(spectrum.size()),
                                        static_cast<uint32_t>(seed)));
  std::vector<Place> places;
  for (size_t k = 0; k < order.size(); ++k) {
    places.push_back({order[k] / m.in(), order[k] % m.in(), spectrum[k]});
  }
  return places;
}

// value · cos(2π (row·o / out + column·i / in)) of every place, as
// cos(a + b) = cos a cos b − sin a sin b: two ranks a value.
LoweredPair Cosines(const ModuleTensors& m, const std::vector<Place>& places, double factor) {
  const int64_t n = static_cast<int64_t>(places.size());
  Matrix2 a(2 * n, m.in()), b(m.out(), 2 * n);
  constexpr double kTurn = 2 * std::numbers::pi;
  for (int64_t k = 0; k < n; ++k) {
    const double value = factor * places[k].value;
    for (int64_t i = 0; i < m.in(); ++i) {
      const double angle = kTurn * static_cast<double>(places[k].column * i % m.in()) / m.in();
      a.at(2 * k, i) = static_cast<float>(std::cos(angle));
      a.at(2 * k + 1, i) = static_cast<float>(std::sin(angle));
    }
    for (int64_t o = 0; o < m.out(); ++o) {
      const double angle = kTurn * static_cast<double>(places[k].row * o % m.out()) / m.out();
      b.at(o, 2 * k) = static_cast<float>(value * std::cos(angle));
      b.at(o, 2 * k + 1) = static_cast<float>(-value * std::sin(angle));
    }
  }
  return {std::move(a), std::move(b)};
}

}  // namespace

// FourierFT (Gao et al. 2024): the real part of an inverse DFT of a sparse spectrum, as the cosine
// each of its values is.
absl::Status LowerFourierFt(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto places, SpectrumPlaces(m, "fourierft_spectrum"));
  const double scaling = m.Number("scaling", 150);
  const double share = scaling / (static_cast<double>(m.out()) * m.in());
  LK_RETURN_IF_ERROR(m.status());
  const int64_t n = static_cast<int64_t>(places.size());
  const bool costly = 2 * n * (m.in() + m.out()) > int64_t{m.in()} * m.out();
  if (!costly) {
    out->pairs.push_back(Cosines(m, places, share));
    return absl::OkStatus();
  }
  constexpr int64_t kAtATime = 256;  // so that memory stays within the dense delta's
  out->dense = Matrix2(m.out(), m.in());
  for (int64_t first = 0; first < n; first += kAtATime) {
    const auto begin = places.begin() + first;
    const LoweredPair pair =
        Cosines(m, {begin, begin + std::min(kAtATime, n - first)}, share);
    const Matrix2 part = Multiply(pair.b, pair.a);
    for (size_t i = 0; i < part.values.size(); ++i) out->dense.values[i] += part.values[i];
  }
  return absl::OkStatus();
}

// SHiRA (Bhardwaj et al. 2024): a sparse delta.
absl::Status LowerShira(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto values, m.Get("shira_weight", {-1}));
  const int64_t n = static_cast<int64_t>(values.size());
  LK_ASSIGN_OR_RETURN(const auto indices, m.GetIndices("shira_indices", {2, n}));
  std::vector<Place> places;
  for (int64_t k = 0; k < n; ++k) places.push_back({indices[k], indices[n + k], values[k]});
  return MakeSparse(m, std::move(places), out);
}

// SuperTuning: a sparse delta at flat places, and a low-rank pair beside it.
absl::Status LowerSuperTuning(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(const auto values, m.Get("supertuning_values", {-1}));
  const int64_t n = static_cast<int64_t>(values.size());
  if (!m.Has("supertuning_indices")) {
    return m.Invalid("the file has no supertuning_indices, and ties make them ambiguous");
  }
  LK_ASSIGN_OR_RETURN(const auto indices, m.GetIndices("supertuning_indices", {n}));
  std::vector<Place> places;
  for (int64_t k = 0; k < n; ++k) {
    if (indices[k] < 0) return m.Invalid(absl::StrCat("index ", indices[k]));
    places.push_back({indices[k] / m.in(), indices[k] % m.in(), values[k]});
  }
  if (m.Has("supertuning_lora_A.weight")) {
    LK_ASSIGN_OR_RETURN(Matrix2 a, m.GetMatrix("supertuning_lora_A.weight", -1, m.in()));
    LK_ASSIGN_OR_RETURN(Matrix2 b, m.GetMatrix("supertuning_lora_B.weight", m.out(), a.rows));
    const double alpha = m.Number("lora_alpha", 8);
    LK_RETURN_IF_ERROR(m.status());
    Scale(alpha / static_cast<double>(std::max<int64_t>(a.rows, 1)), &b);
    out->pairs.push_back({std::move(a), std::move(b)});
  } else if (m.Number("r", 0) > 0) {
    return m.Invalid("r asks for supertuning_lora_A, which the file does not have");
  }
  LK_RETURN_IF_ERROR(m.status());
  return MakeSparse(m, std::move(places), out);
}

// WaveFT: values at random places, as they are or through an inverse Haar transform.
absl::Status LowerWaveFt(const ModuleTensors& m, Lowered* out) {
  LK_ASSIGN_OR_RETURN(auto places, SpectrumPlaces(m, "waveft_spectrum"));
  const double scaling = m.Number("scaling", 25);
  const bool inverse = m.Flag("use_idwt", true);
  const std::string family = m.Text("wavelet_family", "db1");
  LK_RETURN_IF_ERROR(m.status());
  for (Place& place : places) place.value = static_cast<float>(place.value * scaling);
  if (!inverse) return MakeSparse(m, std::move(places), out);
  if (family != "db1") {
    return absl::UnimplementedError("wavelet_family '" + family + "' is not served; db1 is");
  }
  if (m.out() % 2 || m.in() % 2) return m.Invalid("an odd width has no db1 transform here");
  // Each value spreads over a 2×2 tile, with the signs of its quadrant.
  std::vector<Place> spread;
  for (const Place& place : places) {
    const int64_t p = place.row % (m.out() / 2), q = place.column % (m.in() / 2);
    const bool lower = place.row >= m.out() / 2, right = place.column >= m.in() / 2;
    for (int64_t dr = 0; dr < 2; ++dr) {
      for (int64_t dc = 0; dc < 2; ++dc) {
        const bool minus = (lower && dc == 1) != (right && dr == 1);
        spread.push_back({2 * p + dr, 2 * q + dc, (minus ? -0.5f : 0.5f) * place.value});
      }
    }
  }
  return MakeSparse(m, std::move(spread), out);
}

}  // namespace lorikeet
