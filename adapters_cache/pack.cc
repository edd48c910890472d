#include "adapters_cache/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/store_factors.h"
#include "engine/api/limits.h"
#include "engine/base/check.h"
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

const Matrix2& FactorA(const LoweredPair& pair) { return pair.shared_a ? *pair.shared_a : pair.a; }
const Matrix2& FactorB(const LoweredPair& pair) { return pair.shared_b ? *pair.shared_b : pair.b; }

// Magnitude; 1 where there are none.
float Largest(const std::vector<float>& values) {
  float largest = values.empty() ? 1 : 0;
  for (const float value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

}  // namespace

bool IsShared(const LoweredPair& pair) { return pair.shared_a != nullptr || pair.shared_b != nullptr; }

void Fold(LinearShape shape, LoweredPair* pair) {
  if (!IsShared(*pair)) return;
  Matrix2 b = RowsOf(FactorB(*pair), 0, shape.out);
  if (!pair->rank_scale.empty()) ScaleColumns(pair->rank_scale, &b);
  if (pair->rank_mix.rows > 0) b = Multiply(b, pair->rank_mix);
  if (!pair->delta_scale.empty()) ScaleRows(pair->delta_scale, &b);
  *pair = {.a = ColumnsOf(FactorA(*pair), 0, shape.in), .b = std::move(b), .blocks = pair->blocks};
}

std::byte* Packer::Take(int64_t bytes) {
  auto block = std::make_shared<AlignedBuffer>(bytes);
  std::byte* data = block->data();
  std::lock_guard lock(mutex_);
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
  std::lock_guard lock(mutex_);
  refused_dense_bytes_ += ByteSize(dtype(), lowered.dense.rows * lowered.dense.columns);
  return absl::OkStatus();
}

// What is shared is kept once for all adapters that have it, and not among this one's bytes.
const std::byte* Packer::Keep(std::shared_ptr<const AlignedBuffer> block, bool shared) {
  const bool own = !shared || options_.blobs == nullptr;
  if (!own) block = options_.blobs->Share(std::move(block));
  std::lock_guard lock(mutex_);
  if (own) adapter_->bytes += static_cast<int64_t>(block->size());
  adapter_->blocks.push_back(std::move(block));
  return adapter_->blocks.back()->data();
}

// Rank k of a pair's factors at k strides.
absl::Status Packer::StoreA(const std::string& path, const Matrix2& a, const LowRank& out, std::byte* to) const {
  for (int64_t k = 0; k < a.rows; ++k, to += ByteSize(out.dtype, out.a_stride)) {
    LK_RETURN_IF_ERROR(Store(path, out.dtype, a.row(k), a.columns, to));
  }
  return absl::OkStatus();
}

absl::Status Packer::StoreB(const std::string& path, const Matrix2& b, const LowRank& out, std::byte* to) const {
  const Matrix2 by_rank = Transpose(b);
  for (int64_t k = 0; k < by_rank.rows; ++k, to += ByteSize(out.dtype, out.b_stride)) {
    LK_RETURN_IF_ERROR(Store(path, out.dtype, by_rank.row(k), by_rank.columns, to));
  }
  return absl::OkStatus();
}

Packer::PackedFactor& Packer::PackedOf(const Matrix2& factor) {
  std::lock_guard lock(mutex_);
  return packed_[&factor];
}

// A factor of `ranks` strides, packed once for all linears that have it if it is shared.
absl::StatusOr<const std::byte*> Packer::Factor(const std::shared_ptr<const Matrix2>& shared, int64_t stride,
                                                const LowRank& pair,
                                                const std::function<absl::Status(std::byte*)>& store) {
  const auto pack = [&]() -> absl::StatusOr<const std::byte*> {
    auto block = std::make_shared<AlignedBuffer>(ByteSize(pair.dtype, pair.rank * stride));
    LK_RETURN_IF_ERROR(store(block->data()));
    return Keep(std::move(block), shared != nullptr);
  };
  if (shared == nullptr) return pack();
  PackedFactor& packed = PackedOf(*shared);
  std::lock_guard lock(packed.mutex);
  if (packed.factor.expired()) {
    LK_ASSIGN_OR_RETURN(packed.data, pack());
    packed.factor = shared;
    packed.largest = -1;
  }
  return packed.data;
}

// Of a pair alone in its linear: what is shared is packed once, what is this linear's own stands beside it.
absl::Status Packer::Share(const std::string& path, LoweredPair* pair, LowRank* out) {
  const Matrix2& a = FactorA(*pair);
  const Matrix2& b = FactorB(*pair);
  out->shares_a = pair->shared_a != nullptr;
  out->shares_b = pair->shared_b != nullptr;
  LK_ASSIGN_OR_RETURN(out->a, Factor(pair->shared_a, out->a_stride, *out,
                                     [&](std::byte* to) { return StoreA(path, a, *out, to); }));
  LK_ASSIGN_OR_RETURN(out->b, Factor(pair->shared_b, out->b_stride, *out,
                                     [&](std::byte* to) { return StoreB(path, b, *out, to); }));
  if (pair->rank_mix.rows == 0 && pair->rank_scale.empty() && pair->delta_scale.empty()) {
    return absl::OkStatus();
  }
  const float mixed = Largest(pair->rank_mix.values) * static_cast<float>(out->rank);
  if (!std::isfinite(LargestOf(pair->shared_b) * mixed * Largest(pair->rank_scale) * Largest(pair->delta_scale))) {
    return absl::InvalidArgumentError(path + ": the product of its factors is not finite");
  }
  out->rank_mix = Floats(pair->rank_mix.values);
  out->rank_scale = Floats(pair->rank_scale);
  pair->delta_scale.resize((pair->delta_scale.size() + 15) / 16 * 16);
  out->delta_scale = Floats(pair->delta_scale);
  return absl::OkStatus();
}

// Of a packed factor, found once.
float Packer::LargestOf(const std::shared_ptr<const Matrix2>& shared) {
  PackedFactor& packed = PackedOf(*shared);
  std::lock_guard lock(packed.mutex);
  if (packed.largest < 0) packed.largest = Largest(shared->values);
  return packed.largest;
}

void Packer::NoteRank(int32_t rank) {
  std::lock_guard lock(mutex_);
  adapter_->max_rank = std::max(adapter_->max_rank, rank);
}

absl::Status Packer::Pairs(const std::string& path, std::vector<LoweredPair> pairs, LowRank* out) {
  int64_t rank = 0;
  for (const LoweredPair& pair : pairs) rank += FactorA(pair).rows;
  if (rank > Limits::kMaxAdapterRank) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": rank ", rank, "; at most ", Limits::kMaxAdapterRank));
  }
  if (rank == 0) return absl::OkStatus();
  const int64_t unit = static_cast<int64_t>(AlignedBuffer::kAlignment) / Info(dtype()).block_bytes;
  const auto stride = [unit](int64_t width) { return (width + unit - 1) / unit * unit; };
  out->rank = static_cast<int32_t>(rank);
  out->dtype = dtype();
  out->a_stride = stride(FactorA(pairs[0]).columns);
  out->b_stride = stride(FactorB(pairs[0]).rows);
  NoteRank(out->rank);
  if (pairs.size() == 1) {
    out->blocks = pairs[0].blocks;
    return Share(path, &pairs[0], out);
  }
  auto a = std::make_shared<AlignedBuffer>(ByteSize(out->dtype, rank * out->a_stride));
  auto b = std::make_shared<AlignedBuffer>(ByteSize(out->dtype, rank * out->b_stride));
  int64_t k = 0;
  for (const LoweredPair& pair : pairs) {
    LK_CHECK(!IsShared(pair));
    LK_RETURN_IF_ERROR(StoreA(path, pair.a, *out, a->data() + ByteSize(out->dtype, k * out->a_stride)));
    LK_RETURN_IF_ERROR(StoreB(path, pair.b, *out, b->data() + ByteSize(out->dtype, k * out->b_stride)));
    out->blocks |= pair.blocks;
    k += pair.a.rows;
  }
  out->a = Keep(std::move(a), false);
  out->b = Keep(std::move(b), false);
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
