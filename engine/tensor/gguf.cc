#include "engine/tensor/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/mapped_file.h"

namespace lorikeet {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read as little-endian");

// Everything before the tensor data must lie in this many bytes, which bounds what a hostile file
// can make us allocate. A vocabulary of 256,000 tokens with its merges takes about 12 MB.
constexpr size_t kMaxHeaderBytes = size_t{256} << 20;
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = uint64_t{1} << 20;
constexpr uint32_t kMaxRank = 4;

enum ValueType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
  kValueTypeCount
};

// Fewest bytes a value of the type takes in the file.
constexpr uint64_t kMinBytes[kValueTypeCount] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};

struct TensorType {
  uint32_t id;
  const char* name;
  std::optional<DType> dtype;  // of those this server reads
};

constexpr TensorType kTensorTypes[] = {
    {0, "F32", DType::kF32},
    {1, "F16", DType::kF16},
    {2, "Q4_0", DType::kQ4_0},
    {3, "Q4_1", DType::kQ4_1},
    {6, "Q5_0", {}},
    {7, "Q5_1", {}},
    {8, "Q8_0", DType::kQ8_0},
    {9, "Q8_1", {}},
    {10, "Q2_K", {}},
    {11, "Q3_K", {}},
    {12, "Q4_K", DType::kQ4_K},
    {13, "Q5_K", DType::kQ5_K},
    {14, "Q6_K", DType::kQ6_K},
    {15, "Q8_K", {}},
    {16, "IQ2_XXS", {}},
    {17, "IQ2_XS", {}},
    {18, "IQ3_XXS", {}},
    {19, "IQ1_S", {}},
    {20, "IQ4_NL", {}},
    {21, "IQ3_S", {}},
    {22, "IQ2_S", {}},
    {23, "IQ4_XS", {}},
    {24, "I8", {}},
    {25, "I16", {}},
    {26, "I32", {}},
    {27, "I64", {}},
    {28, "F64", {}},
    {29, "IQ1_M", {}},
    {30, "BF16", DType::kBF16},
    {34, "TQ1_0", {}},
    {35, "TQ2_0", {}},
    {39, "MXFP4", {}},
    {40, "NVFP4", {}},
    {41, "Q1_0", {}},
};

class GgufReader {
 public:
  GgufReader(std::span<const std::byte> bytes, std::string_view name)
      : bytes_(bytes), header_(bytes.first(std::min(bytes.size(), kMaxHeaderBytes))), name_(name) {}

  absl::StatusOr<GgufContent> Read() {
    LK_RETURN_IF_ERROR(ReadMagicAndVersion());
    LK_ASSIGN_OR_RETURN(const auto tensor_count, Scalar<uint64_t>());
    LK_ASSIGN_OR_RETURN(const auto metadata_count, Scalar<uint64_t>());
    for (uint64_t i = 0; i < metadata_count; ++i) LK_RETURN_IF_ERROR(ReadMetadataEntry());
    LK_RETURN_IF_ERROR(ReadAlignment());

    // A tensor's entry takes at least 24 bytes, so the loop ends with the header however large
    // the count is.
    for (uint64_t i = 0; i < tensor_count; ++i) LK_RETURN_IF_ERROR(ReadTensorEntry());
    LK_RETURN_IF_ERROR(PlaceTensors());
    return std::move(content_);
  }

 private:
  struct Extent {
    uint64_t offset, size;
    const std::string* name;
    TensorView* view;
  };

  template <typename... Parts>
  absl::Status Corrupt(const Parts&... parts) const {
    return absl::DataLossError(absl::StrCat(name_, ": ", parts..., " (at byte ", at_, ")"));
  }
  template <typename... Parts>
  absl::Status Unsupported(const Parts&... parts) const {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": ", parts...));
  }

  absl::Status Need(uint64_t count, uint64_t bytes_each) const {
    const uint64_t left = header_.size() - at_;
    if (count <= left / bytes_each) return absl::OkStatus();
    if (header_.size() < bytes_.size()) {
      return Corrupt("metadata larger than ", kMaxHeaderBytes, " bytes");
    }
    return Corrupt("truncated: ", count, " x ", bytes_each, " bytes expected, ", left, " left");
  }

  template <typename T>
  absl::StatusOr<T> Scalar() {
    LK_RETURN_IF_ERROR(Need(1, sizeof(T)));
    return TakeScalar<T>();
  }
  // REQUIRES: Need() allowed it.
  template <typename T>
  T TakeScalar() {
    T value;
    std::memcpy(&value, header_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

  absl::StatusOr<std::string> String() {
    LK_ASSIGN_OR_RETURN(const auto length, Scalar<uint64_t>());
    LK_RETURN_IF_ERROR(Need(length, 1));
    std::string text(reinterpret_cast<const char*>(header_.data() + at_), length);
    at_ += length;
    return text;
  }

  absl::Status ReadMagicAndVersion() {
    if (bytes_.size() < 8 || std::memcmp(bytes_.data(), "GGUF", 4) != 0) {
      return Unsupported("not a GGUF file");
    }
    at_ = 4;
    const auto version = TakeScalar<uint32_t>();
    if (version == 2 || version == 3) return absl::OkStatus();
    if (version >> 24 != 0 && __builtin_bswap32(version) <= 3)
      return Unsupported("big-endian GGUF is not supported");
    return Unsupported("GGUF version ", version, "; versions 2 and 3 are supported");
  }

  absl::Status ReadMetadataEntry() {
    LK_ASSIGN_OR_RETURN(std::string key, String());
    LK_ASSIGN_OR_RETURN(const auto type, Scalar<uint32_t>());
    absl::StatusOr<GgufValue> value = type == kArray ? ReadArray(key) : ReadValue(key, type);
    if (!value.ok()) return value.status();
    const auto [it, added] = content_.metadata.emplace(std::move(key), *std::move(value));
    if (!added) return Corrupt("metadata key '", it->first, "' appears twice");
    return absl::OkStatus();
  }

  absl::StatusOr<GgufValue> ReadValue(const std::string& key, uint32_t type) {
    if (type == kString) {
      LK_ASSIGN_OR_RETURN(std::string text, String());
      return GgufValue(std::move(text));
    }
    if (type >= kValueTypeCount) return Corrupt("metadata '", key, "' has unknown type ", type);
    LK_RETURN_IF_ERROR(Need(1, kMinBytes[type]));
    if (type == kFloat32 || type == kFloat64) return GgufValue(TakeFloat(type));
    LK_ASSIGN_OR_RETURN(const int64_t value, TakeInteger(key, type));
    return GgufValue(value);
  }

  // REQUIRES (both): Need() allowed it.
  double TakeFloat(uint32_t type) {
    return type == kFloat32 ? static_cast<double>(TakeScalar<float>()) : TakeScalar<double>();
  }
  absl::StatusOr<int64_t> TakeInteger(const std::string& key, uint32_t type) {
    switch (type) {
      case kUint8:
        return TakeScalar<uint8_t>();
      case kInt8:
        return TakeScalar<int8_t>();
      case kUint16:
        return TakeScalar<uint16_t>();
      case kInt16:
        return TakeScalar<int16_t>();
      case kUint32:
        return TakeScalar<uint32_t>();
      case kInt32:
        return TakeScalar<int32_t>();
      case kInt64:
        return TakeScalar<int64_t>();
      case kBool: {
        const auto value = TakeScalar<uint8_t>();
        if (value > 1) return Corrupt("metadata '", key, "': a bool is ", int{value});
        return value;
      }
      default: {
        const auto value = TakeScalar<uint64_t>();
        if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
          return Corrupt("metadata '", key, "': ", value, " is beyond 63 bits");
        }
        return static_cast<int64_t>(value);
      }
    }
  }

  absl::StatusOr<GgufValue> ReadArray(const std::string& key) {
    LK_ASSIGN_OR_RETURN(const auto type, Scalar<uint32_t>());
    LK_ASSIGN_OR_RETURN(const auto count, Scalar<uint64_t>());
    if (type >= kValueTypeCount) return Corrupt("array '", key, "' has unknown type ", type);
    if (type == kArray) return Unsupported("metadata '", key, "' is an array of arrays");
    LK_RETURN_IF_ERROR(Need(count, kMinBytes[type]));
    if (type == kString) {
      std::vector<std::string> texts;
      texts.reserve(count);
      for (uint64_t i = 0; i < count; ++i) {
        LK_ASSIGN_OR_RETURN(std::string text, String());
        texts.push_back(std::move(text));
      }
      return GgufValue(std::move(texts));
    }
    if (type == kFloat32 || type == kFloat64) {
      std::vector<double> values(count);
      for (double& value : values) value = TakeFloat(type);
      return GgufValue(std::move(values));
    }
    std::vector<int64_t> values(count);
    for (int64_t& value : values) {
      LK_ASSIGN_OR_RETURN(value, TakeInteger(key, type));
    }
    return GgufValue(std::move(values));
  }

  absl::Status ReadAlignment() {
    const auto it = content_.metadata.find("general.alignment");
    if (it == content_.metadata.end()) return absl::OkStatus();
    const int64_t* value = std::get_if<int64_t>(&it->second);
    if (value == nullptr || *value <= 0 || static_cast<uint64_t>(*value) > kMaxAlignment ||
        !std::has_single_bit(static_cast<uint64_t>(*value))) {
      return Corrupt("general.alignment is not a power of two up to ", kMaxAlignment);
    }
    alignment_ = static_cast<uint64_t>(*value);
    return absl::OkStatus();
  }

  absl::Status ReadTensorEntry() {
    LK_ASSIGN_OR_RETURN(std::string name, String());
    LK_ASSIGN_OR_RETURN(const auto rank, Scalar<uint32_t>());
    if (rank > kMaxRank) {
      return Corrupt("tensor '", name, "' has ", rank, " dimensions; at most ", kMaxRank);
    }
    TensorView view;
    LK_RETURN_IF_ERROR(Need(rank, 8));
    for (uint32_t i = 0; i < rank; ++i) {
      const auto size = TakeScalar<uint64_t>();
      if (size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return Corrupt("tensor '", name, "': dimension ", i, " is ", size);
      }
      view.shape.insert(view.shape.begin(), static_cast<int64_t>(size));
    }
    LK_ASSIGN_OR_RETURN(const auto type, Scalar<uint32_t>());
    LK_ASSIGN_OR_RETURN(const auto offset, Scalar<uint64_t>());
    LK_ASSIGN_OR_RETURN(view.dtype, TensorDType(name, type));
    LK_ASSIGN_OR_RETURN(const uint64_t size, TensorBytes(name, view));
    const auto [it, added] = content_.tensors.emplace(std::move(name), std::move(view));
    if (!added) return Corrupt("tensor '", it->first, "' appears twice");
    extents_.push_back({offset, size, &it->first, &it->second});
    return absl::OkStatus();
  }

  absl::StatusOr<DType> TensorDType(const std::string& name, uint32_t type) const {
    std::string supported;
    for (const TensorType& known : kTensorTypes) {
      if (known.id == type && known.dtype) return *known.dtype;
      if (known.dtype) absl::StrAppend(&supported, supported.empty() ? "" : ", ", known.name);
    }
    for (const TensorType& known : kTensorTypes) {
      if (known.id != type) continue;
      return Unsupported("tensor '", name, "' has type ", known.name, "; supported are ",
                         supported);
    }
    return Corrupt("tensor '", name, "' has unknown type ", type);
  }

  absl::StatusOr<uint64_t> TensorBytes(const std::string& name, const TensorView& view) const {
    const DTypeInfo info = Info(view.dtype);
    if (view.row_elements() % info.block_elements != 0) {
      return Corrupt("tensor '", name, "' ", ShapeString(view.shape), ": rows of ", info.name,
                     " are a multiple of ", info.block_elements, " values");
    }
    // Zeros are left out of the product, so that elements() of [0, huge, huge] cannot overflow.
    int64_t elements = 1;
    bool empty = false;
    for (const int64_t size : view.shape) {
      empty |= size == 0;
      if (size != 0 && __builtin_mul_overflow(elements, size, &elements)) {
        return Corrupt("tensor '", name, "': shape ", ShapeString(view.shape), " overflows");
      }
    }
    if (empty) return uint64_t{0};
    int64_t bytes;
    if (__builtin_mul_overflow(elements / info.block_elements, int64_t{info.block_bytes}, &bytes)) {
      return Corrupt("tensor '", name, "': shape ", ShapeString(view.shape), " overflows");
    }
    return static_cast<uint64_t>(bytes);
  }

  // Points every view into the file: aligned, inside, and no two over the same bytes.
  absl::Status PlaceTensors() {
    if (extents_.empty()) return absl::OkStatus();
    const uint64_t data_begin = (at_ + alignment_ - 1) / alignment_ * alignment_;
    if (data_begin > bytes_.size()) return Corrupt("truncated before the tensor data");
    const std::span<const std::byte> data = bytes_.subspan(data_begin);
    for (const Extent& extent : extents_) {
      if (extent.offset % alignment_ != 0) {
        return Corrupt("tensor '", *extent.name, "' at data offset ", extent.offset,
                       " is not aligned to ", alignment_);
      }
      if (extent.offset > data.size() || extent.size > data.size() - extent.offset) {
        return Corrupt("truncated: tensor '", *extent.name, "' takes ", extent.size,
                       " bytes from data offset ", extent.offset, " of ", data.size());
      }
      extent.view->bytes = data.subspan(extent.offset, extent.size);
    }
    std::sort(extents_.begin(), extents_.end(), [](const Extent& a, const Extent& b) {
      return std::pair(a.offset, a.size) < std::pair(b.offset, b.size);
    });
    for (size_t i = 1; i < extents_.size(); ++i) {
      if (extents_[i - 1].offset + extents_[i - 1].size > extents_[i].offset) {
        return Corrupt("tensors '", *extents_[i - 1].name, "' and '", *extents_[i].name,
                       "' overlap");
      }
    }
    return absl::OkStatus();
  }

  std::span<const std::byte> bytes_;
  std::span<const std::byte> header_;  // the part of bytes_ that may hold metadata
  std::string name_;
  size_t at_ = 0;  // in header_
  uint64_t alignment_ = kDefaultAlignment;
  GgufContent content_;
  std::vector<Extent> extents_;
};

}  // namespace

absl::StatusOr<GgufContent> ParseGguf(std::span<const std::byte> bytes, std::string_view name) {
  return GgufReader(bytes, name).Read();
}

absl::StatusOr<GgufFile> ReadGguf(const std::filesystem::path& path) {
  LK_ASSIGN_OR_RETURN(auto file, MappedFile::Open(path, FileAccess::kMap));
  LK_ASSIGN_OR_RETURN(GgufContent content, ParseGguf(file->bytes(), path.string()));
  return GgufFile{std::move(content.metadata),
                  TensorFile({std::move(file)}, std::move(content.tensors))};
}

}  // namespace lorikeet
