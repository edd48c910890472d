#include "adapters_cache/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/store_factors.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

absl::Status CheckVectors(const std::string& path, const Lowered& lowered) {
  for (const auto* values :
       {&lowered.out_scale, &lowered.bias, &lowered.rotation, &lowered.output_scale,
        &lowered.output_cross, &lowered.kronecker1.values, &lowered.kronecker2.values,
        &lowered.circulant, &lowered.sparse_value}) {
    const auto bad = std::find_if_not(values->begin(), values->end(),
                                      [](float value) { return std::isfinite(value); });
    if (bad == values->end()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": what the adapter's tensors come to is not finite (", *bad, ")"));
  }
  return absl::OkStatus();
}

// Everything into b.
void Fold(LoweredPair* pair) {
  if (!pair->rank_scale.empty()) ScaleColumns(pair->rank_scale, &pair->b);
  if (pair->rank_mix.rows > 0) pair->b = Multiply(pair->b, pair->rank_mix);
  if (!pair->delta_scale.empty()) ScaleRows(pair->delta_scale, &pair->b);
}

}  // namespace

std::byte* Packer::Take(int64_t bytes) {
  auto block = std::make_shared<AlignedBuffer>(bytes);
  std::byte* data = block->data();
  adapter_->bytes += bytes;
  adapter_->blocks.push_back(std::move(block));
  return data;
}

const float* Packer::Floats(const std::vector<float>& values) {
  if (values.empty()) return nullptr;
  std::byte* data = Take(static_cast<int64_t>(values.size() * sizeof(float)));
  std::memcpy(data, values.data(), values.size() * sizeof(float));
  return reinterpret_cast<const float*>(data);
}

const int32_t* Packer::Integers(const std::vector<int32_t>& values) {
  // Never nullptr: an empty array is there too.
  std::byte* data = Take(static_cast<int64_t>((values.size() + 1) * sizeof(int32_t)));
  std::copy(values.begin(), values.end(), reinterpret_cast<int32_t*>(data));
  return reinterpret_cast<const int32_t*>(data);
}

absl::Status Packer::Store(const std::string& name, DType dtype, const float* values, int64_t count,
                           std::byte* to) const {
  const int64_t bad = StoreFloats(values, count, dtype, to);
  if (bad == count) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": a value of ", values[bad], " is not finite in ", Info(dtype).name));
}

absl::Status Packer::Rows(const std::string& name, const Matrix2& rows, DenseRows* out) {
  out->dtype = dtype();
  out->rows = static_cast<int32_t>(rows.rows);
  std::byte* data = Take(ByteSize(out->dtype, rows.rows * rows.columns));
  out->data = data;
  return Store(name, out->dtype, rows.values.data(), rows.rows * rows.columns, data);
}

absl::Status Packer::Finish() const {
  if (refused_dense_bytes_ == 0) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("this adapter is a dense delta, which takes ", refused_dense_bytes_,
                   " bytes; a server started with --allow-dense loads it"));
}

absl::Status Packer::Dense(const std::string& path, const Lowered& lowered, DenseRows* out) {
  if (options_.allow_dense) return Rows(path, lowered.dense, out);
  refused_dense_bytes_ += ByteSize(dtype(), lowered.dense.rows * lowered.dense.columns);
  return absl::OkStatus();
}

// What is shared is kept once for all adapters that have it, and not among this one's bytes.
const std::byte* Packer::Keep(std::shared_ptr<const AlignedBuffer> block, bool shared) {
  if (shared && options_.blobs != nullptr) block = options_.blobs->Share(std::move(block));
  else adapter_->bytes += static_cast<int64_t>(block->size());
  adapter_->blocks.push_back(std::move(block));
  return adapter_->blocks.back()->data();
}

// What stands beside shared factors goes beside them.
absl::Status Packer::Beside(const std::string& path, LoweredPair* pair, LowRank* out) {
  const auto most = [](const std::vector<float>& values) {
    float largest = 0;
    for (const float value : values) largest = std::max(largest, std::abs(value));
    return values.empty() ? 1 : largest;
  };
  const float mixed = most(pair->rank_mix.values) * static_cast<float>(pair->b.columns);
  if (!std::isfinite(most(pair->b.values) * mixed * most(pair->rank_scale) * most(pair->delta_scale))) {
    return absl::InvalidArgumentError(path + ": the product of its factors is not finite");
  }
  out->rank_mix = Floats(pair->rank_mix.values);
  out->rank_scale = Floats(pair->rank_scale);
  if (!pair->delta_scale.empty()) pair->delta_scale.resize(out->b_stride);
  out->delta_scale = Floats(pair->delta_scale);
  return absl::OkStatus();
}

absl::Status Packer::Pairs(const std::string& path, std::vector<LoweredPair> pairs, LowRank* out) {
  int64_t rank = 0;
  for (const LoweredPair& pair : pairs) rank += pair.a.rows;
  if (rank > Limits::kMaxAdapterRank) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": rank ", rank, "; at most ", Limits::kMaxAdapterRank));
  }
  if (rank == 0) return absl::OkStatus();
  const int64_t width = Info(dtype()).block_bytes;
  const int64_t unit = static_cast<int64_t>(AlignedBuffer::kAlignment) / width;
  out->rank = static_cast<int32_t>(rank);
  out->dtype = dtype();
  out->a_stride = (pairs[0].a.columns + unit - 1) / unit * unit;
  out->b_stride = (pairs[0].b.rows + unit - 1) / unit * unit;
  auto block = std::make_shared<AlignedBuffer>(rank * out->a_stride * width);
  std::byte* a = block->data();
  auto b_block = std::make_shared<AlignedBuffer>(rank * out->b_stride * width);
  std::byte* b = b_block->data();
  adapter_->max_rank = std::max(adapter_->max_rank, out->rank);
  const bool shared = pairs.size() == 1 && pairs[0].shared;
  const bool beside = shared && options_.on_host;
  for (LoweredPair& pair : pairs) {
    if (beside) LK_RETURN_IF_ERROR(Beside(path, &pair, out));
    else Fold(&pair);
    const Matrix2 by_rank = Transpose(pair.b);
    for (int64_t k = 0; k < pair.a.rows; ++k) {
      LK_RETURN_IF_ERROR(Store(path, out->dtype, pair.a.row(k), pair.a.columns, a));
      LK_RETURN_IF_ERROR(Store(path, out->dtype, by_rank.row(k), by_rank.columns, b));
      a += out->a_stride * width;
      b += out->b_stride * width;
    }
  }
  out->a = Keep(std::move(block), shared);
  out->b = Keep(std::move(b_block), beside);
  return absl::OkStatus();
}

absl::Status Packer::Module(const std::string& path, Lowered lowered, ModuleDelta* delta) {
  LK_RETURN_IF_ERROR(CheckVectors(path, lowered));
  const bool dense = !lowered.dense.values.empty();
  if (dense && (options_.allow_dense || !lowered.dense_is_choice)) {
    LK_RETURN_IF_ERROR(Dense(path, lowered, &delta->dense));
    if (lowered.dense_is_choice) lowered.pairs.clear();
  }
  LK_RETURN_IF_ERROR(Pairs(path, std::move(lowered.pairs), &delta->low_rank));
  delta->out_scale = Floats(lowered.out_scale);
  delta->bias = Floats(lowered.bias);
  delta->input_rotation = {lowered.rotation_block, Floats(lowered.rotation)};
  delta->output_rotation = {Floats(lowered.output_scale), Floats(lowered.output_cross),
                            lowered.output_half};
  const Matrix2& w1 = lowered.kronecker1;
  const Matrix2& w2 = lowered.kronecker2;
  delta->kronecker = {static_cast<int32_t>(w1.columns), static_cast<int32_t>(w2.columns),
                      static_cast<int32_t>(w1.rows), static_cast<int32_t>(w2.rows),
                      Floats(w1.values), Floats(w2.values)};
  delta->circulant = {lowered.circulant_block, Floats(lowered.circulant)};
  if (lowered.has_sparse) {
    delta->sparse = {Integers(lowered.sparse_row_begin), Integers(lowered.sparse_column),
                     Floats(lowered.sparse_value)};
  }
  return absl::OkStatus();
}

}  // namespace lorikeet
