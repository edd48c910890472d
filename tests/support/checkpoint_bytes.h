// Writes safetensors and GGUF bytes for tests, valid or not, independently of our readers.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lorikeet::testing {

template <typename T>
std::string Raw(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <typename T>
std::string RawVector(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

inline std::span<const std::byte> AsBytes(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

inline std::string Safetensors(std::string_view header, std::string_view data) {
  return Raw(uint64_t{header.size()}) + std::string(header) + std::string(data);
}

// GGUF version 3. Keys and tensors are appended in order; nothing is checked.
class GgufBytes {
 public:
  static std::string String(std::string_view text) {
    return Raw(uint64_t{text.size()}) + std::string(text);
  }

  // `type` as in the format: 4 is uint32, 6 float32, 8 string, 9 array.
  GgufBytes& Value(std::string_view key, uint32_t type, std::string_view raw) {
    metadata_ += String(key) + Raw(type) + std::string(raw);
    ++metadata_count;
    return *this;
  }
  GgufBytes& Uint(std::string_view key, uint32_t value) { return Value(key, 4, Raw(value)); }
  GgufBytes& Float(std::string_view key, float value) { return Value(key, 6, Raw(value)); }
  GgufBytes& Text(std::string_view key, std::string_view value) {
    return Value(key, 8, String(value));
  }
  GgufBytes& Array(std::string_view key, uint32_t type, uint64_t count, std::string_view raw) {
    return Value(key, 9, Raw(type) + Raw(count) + std::string(raw));
  }

  // `dims` innermost first, as the format has them; `type` 0 is F32.
  GgufBytes& Entry(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type,
                   uint64_t offset) {
    entries_ += String(name) + Raw(static_cast<uint32_t>(dims.size())) + RawVector(dims) +
                Raw(type) + Raw(offset);
    ++tensor_count;
    return *this;
  }
  // The entry and its bytes, after the tensors before it.
  GgufBytes& Tensor(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type,
                    std::string_view raw) {
    data_.resize((data_.size() + alignment - 1) / alignment * alignment);
    Entry(name, dims, type, data_.size());
    data_ += raw;
    return *this;
  }

  std::string Build() const {
    std::string file = "GGUF" + Raw(version) + Raw(tensor_count) + Raw(metadata_count);
    file += metadata_ + entries_;
    file.resize((file.size() + alignment - 1) / alignment * alignment);
    return file + data_;
  }

  uint32_t version = 3;
  uint64_t tensor_count = 0;
  uint64_t metadata_count = 0;
  uint64_t alignment = 32;

 private:
  std::string metadata_, entries_, data_;
};

// A folder under the system's temporary one, removed with everything in it.
class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "lorikeet-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::abort();
    path_ = name;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path Write(std::string_view name, std::string_view bytes) const {
    const std::filesystem::path file = path_ / name;
    std::ofstream(file, std::ios::binary).write(bytes.data(), bytes.size());
    return file;
  }

 private:
  std::filesystem::path path_;
};

inline std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace lorikeet::testing
