// What a directory takes on disk.
#pragma once

#include <cstdint>
#include <filesystem>
#include <system_error>

namespace lorikeet {

// Bytes of the files in it and below; what cannot be read counts nothing. Links are not followed.
inline int64_t DirectoryBytes(const std::filesystem::path& directory) {
  int64_t bytes = 0;
  std::error_code error;
  std::filesystem::recursive_directory_iterator files(directory, error);
  for (; !error && files != end(files); files.increment(error)) {
    std::error_code ignored;
    if (files->symlink_status(ignored).type() != std::filesystem::file_type::regular) continue;
    const auto size = files->file_size(ignored);
    if (!ignored) bytes += static_cast<int64_t>(size);
  }
  return bytes;
}

}  // namespace lorikeet
