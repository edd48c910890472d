// The bytes of a file, read-only, unmapped when the last owner lets go. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <utility>

#include "absl/status/statusor.h"

namespace lorikeet {

enum class FileAccess : uint8_t {
  // Pages come from the file on demand: right for a model of many gigabytes. Whoever truncates the
  // file while it is mapped ends the process (SIGBUS), so only the operator's files are mapped.
  kMap,
  // The whole file is read now: nothing that happens to it later matters. Right for adapters, which
  // may be replaced on disk at any time.
  kCopy,
};

class MappedFile {
 public:
  // NOT_FOUND, PERMISSION_DENIED; INVALID_ARGUMENT: not a regular file; DATA_LOSS: the file changed
  // while it was copied.
  static absl::StatusOr<std::shared_ptr<const MappedFile>> Open(const std::filesystem::path& path,
                                                                FileAccess access);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Starts at a page boundary.
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // Where the file lay that was opened, whatever links the path went through; empty: unknown.
  const std::filesystem::path& real_path() const { return real_path_; }

 private:
  MappedFile(const std::byte* data, size_t size, std::filesystem::path real_path)
      : data_(data), size_(size), real_path_(std::move(real_path)) {}

  const std::byte* data_;
  size_t size_;
  std::filesystem::path real_path_;
};

}  // namespace lorikeet
