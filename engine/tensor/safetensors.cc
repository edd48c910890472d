#include "engine/tensor/safetensors.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/json.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using TensorMap = std::map<std::string, TensorView, std::less<>>;

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = uint64_t{32} << 20;  // about 250,000 tensors
constexpr size_t kMaxRank = 8;

std::optional<DType> ParseDType(std::string_view name) {
  if (name == "F32") return DType::kF32;
  if (name == "F16") return DType::kF16;
  if (name == "BF16") return DType::kBF16;
  if (name == "F8_E4M3") return DType::kF8E4M3;
  if (name == "U8") return DType::kU8;
  if (name == "I16") return DType::kI16;
  if (name == "I32") return DType::kI32;
  if (name == "I64") return DType::kI64;
  return std::nullopt;
}

// JSON numbers that are exact, not negative and fit.
std::optional<int64_t> AsCount(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const auto count = value.get<uint64_t>();
  if (count > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return static_cast<int64_t>(count);
}

class HeaderReader {
 public:
  HeaderReader(std::span<const std::byte> bytes, std::string_view name)
      : bytes_(bytes), name_(name) {}

  absl::StatusOr<TensorMap> Read() {
    LK_ASSIGN_OR_RETURN(const json header, ReadHeader());
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        LK_RETURN_IF_ERROR(CheckMetadata(entry));
      } else {
        LK_RETURN_IF_ERROR(AddTensor(name, entry));
      }
    }
    LK_RETURN_IF_ERROR(CheckCoverage());
    return std::move(tensors_);
  }

 private:
  struct Extent {
    int64_t begin, end;
    const std::string* name;
  };

  template <typename... Parts>
  absl::Status Corrupt(const Parts&... parts) const {
    return absl::DataLossError(absl::StrCat(name_, ": ", parts...));
  }

  absl::StatusOr<json> ReadHeader() {
    if (bytes_.size() < kLengthBytes) {
      return Corrupt("truncated: ", bytes_.size(), " bytes; the header length alone takes ",
                     kLengthBytes);
    }
    uint64_t length = 0;
    for (size_t i = 0; i < kLengthBytes; ++i) {
      length |= uint64_t{std::to_integer<uint8_t>(bytes_[i])} << (8 * i);
    }
    if (length > bytes_.size() - kLengthBytes) {
      return Corrupt("truncated, or not a safetensors file: the header says ", length,
                     " bytes, and ", bytes_.size() - kLengthBytes, " follow");
    }
    if (length > kMaxHeaderBytes) {
      return Corrupt("header of ", length, " bytes; at most ", kMaxHeaderBytes, " are read");
    }
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + kLengthBytes,
                                length);
    data_ = bytes_.subspan(kLengthBytes + length);
    LK_ASSIGN_OR_RETURN(json header, ParseJson(text, absl::StrCat(name_, " header")));
    if (!header.is_object()) return Corrupt("the header is not a JSON object");
    return header;
  }

  absl::Status CheckMetadata(const json& metadata) const {
    if (!metadata.is_object()) return Corrupt("__metadata__ is not an object");
    for (const auto& [key, value] : metadata.items()) {
      if (!value.is_string()) return Corrupt("__metadata__ \"", key, "\" is not a string");
    }
    return absl::OkStatus();
  }

  absl::Status AddTensor(const std::string& name, const json& entry) {
    if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") ||
        !entry.contains("shape") || !entry.contains("data_offsets")) {
      return Corrupt("tensor '", name, "' must have exactly dtype, shape and data_offsets");
    }
    if (!entry["dtype"].is_string()) return Corrupt("tensor '", name, "': dtype is not a string");
    const auto& dtype_name = entry["dtype"].get_ref<const std::string&>();
    const std::optional<DType> dtype = ParseDType(dtype_name);
    if (!dtype) {
      return absl::InvalidArgumentError(absl::StrCat(name_, ": tensor '", name, "' has dtype ",
                                                     dtype_name,
                                                     "; F32, F16, BF16, F8_E4M3, U8, I16, I32 and I64 are supported"));
    }
    TensorView view;
    view.dtype = *dtype;
    LK_ASSIGN_OR_RETURN(const int64_t size, ReadShape(name, entry["shape"], view));
    LK_ASSIGN_OR_RETURN(const Extent extent, ReadExtent(name, entry["data_offsets"]));
    if (extent.end - extent.begin != size) {
      return Corrupt("tensor '", name, "': ", dtype_name, " ", ShapeString(view.shape), " takes ",
                     size, " bytes, data_offsets [", extent.begin, ", ", extent.end, "] hold ",
                     extent.end - extent.begin);
    }
    view.bytes = data_.subspan(extent.begin, size);
    const auto it = tensors_.emplace(name, std::move(view)).first;
    extents_.push_back({extent.begin, extent.end, &it->first});
    return absl::OkStatus();
  }

  // Sets view.shape; the tensor's size in bytes.
  absl::StatusOr<int64_t> ReadShape(const std::string& name, const json& shape,
                                    TensorView& view) const {
    if (!shape.is_array() || shape.size() > kMaxRank) {
      return Corrupt("tensor '", name, "': shape is not an array of at most ", kMaxRank, " sizes");
    }
    // The product leaves out zeros, so that [0, huge, huge] cannot overflow elements() either.
    int64_t bytes = Info(view.dtype).block_bytes;
    bool empty = false;
    for (const json& dimension : shape) {
      const std::optional<int64_t> size = AsCount(dimension);
      if (!size) return Corrupt("tensor '", name, "': shape has the size ", Excerpt(dimension));
      view.shape.push_back(*size);
      empty |= *size == 0;
      if (*size != 0 && __builtin_mul_overflow(bytes, *size, &bytes)) {
        return Corrupt("tensor '", name, "': shape ", ShapeString(view.shape), " overflows");
      }
    }
    return empty ? 0 : bytes;
  }

  absl::StatusOr<Extent> ReadExtent(const std::string& name, const json& offsets) const {
    if (!offsets.is_array() || offsets.size() != 2) {
      return Corrupt("tensor '", name, "': data_offsets is not [begin, end]");
    }
    const std::optional<int64_t> begin = AsCount(offsets[0]);
    const std::optional<int64_t> end = AsCount(offsets[1]);
    if (!begin || !end || *begin > *end || *end > static_cast<int64_t>(data_.size())) {
      return Corrupt("tensor '", name, "': data_offsets [", Excerpt(offsets[0]), ", ",
                     Excerpt(offsets[1]), "] do not lie within the ", data_.size(),
                     " bytes of data");
    }
    return Extent{*begin, *end, nullptr};
  }

  // As the format demands, the tensors fill the data without gap or overlap.
  absl::Status CheckCoverage() {
    std::sort(extents_.begin(), extents_.end(), [](const Extent& a, const Extent& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    int64_t at = 0;
    for (const Extent& extent : extents_) {
      if (extent.begin != at) {
        return Corrupt("tensor '", *extent.name, "' begins at data offset ", extent.begin,
                       extent.begin < at ? ", inside the tensor before it, which ends at "
                                         : ", leaving a gap after ",
                       at);
      }
      at = extent.end;
    }
    if (at != static_cast<int64_t>(data_.size())) {
      return Corrupt("the tensors end at data offset ", at, ", the file at ", data_.size());
    }
    return absl::OkStatus();
  }

  static std::string Excerpt(const json& value) {
    return value.dump(-1, ' ', true, json::error_handler_t::replace).substr(0, 40);
  }

  std::span<const std::byte> bytes_;
  std::string name_;
  std::span<const std::byte> data_;
  TensorMap tensors_;
  std::vector<Extent> extents_;
};

// "tensor name" -> "file name", both checked.
absl::StatusOr<std::map<std::string, std::string>> ReadIndex(const std::filesystem::path& path) {
  LK_ASSIGN_OR_RETURN(const json index, ReadJsonFile(path));
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return absl::DataLossError(absl::StrCat(path.string(), ": has no \"weight_map\" object"));
  }
  std::map<std::string, std::string> shard_of;
  for (const auto& [name, value] : index["weight_map"].items()) {
    // A shard lies beside its index: a path that leads elsewhere is not followed.
    if (!value.is_string() ||
        std::filesystem::path(value.get<std::string>()).filename() != value.get<std::string>()) {
      return absl::DataLossError(
          absl::StrCat(path.string(), ": tensor '", name, "' is in no plain file name"));
    }
    shard_of[name] = value.get<std::string>();
  }
  return shard_of;
}

absl::StatusOr<TensorFile> ReadShards(const std::filesystem::path& index_path) {
  LK_ASSIGN_OR_RETURN(const auto shard_of, ReadIndex(index_path));
  std::set<std::string> shards;
  for (const auto& [name, shard] : shard_of) shards.insert(shard);

  std::vector<std::shared_ptr<const MappedFile>> files;
  TensorMap tensors;
  std::map<std::string, std::string> found_in;
  for (const std::string& shard : shards) {
    const std::filesystem::path path = index_path.parent_path() / shard;
    LK_ASSIGN_OR_RETURN(auto file, MappedFile::Open(path, FileAccess::kMap));
    LK_ASSIGN_OR_RETURN(TensorMap part, ParseSafetensors(file->bytes(), path.string()));
    files.push_back(std::move(file));
    for (auto& [name, view] : part) {
      const auto [it, added] = found_in.emplace(name, shard);
      if (!added) {
        return absl::DataLossError(
            absl::StrCat(path.string(), ": tensor '", name, "' is also in ", it->second));
      }
      tensors.emplace(name, std::move(view));
    }
  }
  for (const auto& [name, shard] : shard_of) {
    const auto it = found_in.find(name);
    if (it == found_in.end() || it->second != shard) {
      return absl::DataLossError(
          absl::StrCat(index_path.string(), ": tensor '", name, "' is not in ", shard));
    }
  }
  return TensorFile(std::move(files), std::move(tensors));
}

}  // namespace

absl::StatusOr<TensorMap> ParseSafetensors(std::span<const std::byte> bytes,
                                           std::string_view name) {
  return HeaderReader(bytes, name).Read();
}

absl::StatusOr<TensorFile> ReadSafetensors(const std::filesystem::path& path) {
  LK_ASSIGN_OR_RETURN(auto file, MappedFile::Open(path, FileAccess::kMap));
  LK_ASSIGN_OR_RETURN(TensorMap tensors, ParseSafetensors(file->bytes(), path.string()));
  return TensorFile({std::move(file)}, std::move(tensors));
}

absl::StatusOr<TensorFile> ReadSafetensorsModel(const std::filesystem::path& directory) {
  const std::filesystem::path single = directory / "model.safetensors";
  const std::filesystem::path index = directory / "model.safetensors.index.json";
  std::error_code ignored;
  if (std::filesystem::exists(single, ignored)) return ReadSafetensors(single);
  if (std::filesystem::exists(index, ignored)) return ReadShards(index);
  return absl::NotFoundError(
      absl::StrCat(directory.string(), " has neither ", single.filename().string(), " nor ",
                   index.filename().string(), " (pickled weights, *.bin, are not read)"));
}

}  // namespace lorikeet
