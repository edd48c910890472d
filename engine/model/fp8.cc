#include "engine/model/fp8.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

constexpr int64_t kUnit = Info(DType::kScaledF8E4M3).block_elements;
constexpr int64_t kUnitBytes = Info(DType::kScaledF8E4M3).block_bytes;
static_assert(kFp8Block % kUnit == 0);

// What is beside a weight and not read.
constexpr const char* kInputScales[] = {".input_scale", ".input_scale_ub", ".k_scale", ".v_scale"};

int64_t Blocks(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

// Scales that `shape` has of a weight [out, in], by the rows and columns that share one.
struct Scales {
  std::vector<float> values;
  int64_t rows_each = 0, columns_each = 0, across = 0;

  float At(int64_t row, int64_t column) const {
    return values[row / rows_each * across + column / columns_each];
  }
};

absl::StatusOr<Scales> ReadScales(const std::string& name, const TensorView& weight,
                                  const TensorView& view) {
  const int64_t out = weight.rows(), in = weight.row_elements();
  const std::vector<int64_t> row_column = {out, 1}, blocks = {Blocks(out), Blocks(in)};
  if (IsCode(view.dtype) || IsQuantized(view.dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", Info(view.dtype).name,
                                                   "; F32, F16 and BF16 are supported"));
  }
  Scales scales;
  if (view.elements() == 1) {
    scales = {.rows_each = out, .columns_each = in, .across = 1};
  } else if (view.shape == row_column || view.shape == std::vector<int64_t>{out}) {
    scales = {.rows_each = 1, .columns_each = in, .across = 1};
  } else if (view.shape == blocks) {
    scales = {.rows_each = kFp8Block, .columns_each = kFp8Block, .across = blocks[1]};
  } else {
    return absl::InvalidArgumentError(absl::StrCat(
        name, " is ", ShapeString(view.shape), "; of a weight ", ShapeString(weight.shape),
        " one scale, [", out, "] or ", ShapeString(blocks), " are supported"));
  }
  LK_RETURN_IF_ERROR(CheckFinite(name, view));
  scales.values.resize(view.elements());
  Dequantize(view.dtype, view.bytes.data(), view.elements(), scales.values.data());
  return scales;
}

// INVALID_ARGUMENT: some code is none of a number.
absl::Status CheckCodes(const std::string& name, const TensorView& codes) {
  constexpr std::byte kMagnitude{0x7f};
  const auto nan = std::ranges::find_if(codes.bytes, [](std::byte code) {
    return (code & kMagnitude) == kMagnitude;
  });
  if (nan == codes.bytes.end()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, "[", nan - codes.bytes.begin(), "] is NaN; weights must be finite"));
}

AlignedBuffer Interleave(const TensorView& codes, const Scales& scales) {
  const int64_t in = codes.row_elements();
  AlignedBuffer packed(ByteSize(DType::kScaledF8E4M3, codes.elements()));
  std::byte* to = packed.data();
  for (int64_t row = 0; row < codes.rows(); ++row) {
    for (int64_t column = 0; column < in; column += kUnit, to += kUnitBytes) {
      const float scale = scales.At(row, column);
      std::memcpy(to, &scale, sizeof(scale));
      std::memcpy(to + sizeof(scale), codes.row(row) + column, kUnit);
    }
  }
  return packed;
}

absl::Status RepackWeight(const std::string& name, TensorFile* tensors,
                          std::deque<AlignedBuffer>* buffers) {
  const TensorView codes = *tensors->Find(name);
  if (codes.shape.size() != 2 || codes.elements() == 0 || codes.row_elements() % kUnit != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is F8_E4M3 ", ShapeString(codes.shape),
                     "; a matrix whose width is a multiple of ", kUnit, " is supported"));
  }
  std::string scale_name = absl::StrCat(name, "_scale");
  if (tensors->Find(scale_name) == nullptr) scale_name += "_inv";
  const TensorView* scale = tensors->Find(scale_name);
  if (scale == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is F8_E4M3, and ", name, "_scale is missing"));
  }
  LK_ASSIGN_OR_RETURN(const Scales scales, ReadScales(scale_name, codes, *scale));
  LK_RETURN_IF_ERROR(CheckCodes(name, codes));
  buffers->push_back(Interleave(codes, scales));
  tensors->Erase(scale_name);
  tensors->Put(name, {DType::kScaledF8E4M3, codes.shape,
                      {buffers->back().data(), buffers->back().size()}});
  return absl::OkStatus();
}

}  // namespace

absl::Status RepackFp8(TensorFile* tensors, std::deque<AlignedBuffer>* buffers) {
  std::vector<std::string> weights, unread;
  for (const auto& [name, view] : tensors->tensors()) {
    if (absl::EndsWith(name, ".weight") && view.dtype == DType::kF8E4M3) weights.push_back(name);
    for (const char* suffix : kInputScales) {
      if (absl::EndsWith(name, suffix)) unread.push_back(name);
    }
  }
  if (weights.empty()) return absl::OkStatus();
  for (const std::string& name : weights) {
    LK_RETURN_IF_ERROR(RepackWeight(name, tensors, buffers));
  }
  for (const std::string& name : unread) tensors->Erase(name);
  return absl::OkStatus();
}

}  // namespace lorikeet
