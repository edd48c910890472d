#include "engine/tensor/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/file_descriptor.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

absl::Status ErrnoError(const std::filesystem::path& path) {
  return absl::ErrnoToStatus(errno, absl::StrCat("cannot read ", path.string()));
}

absl::Status ReadAll(int fd, const std::filesystem::path& path, std::byte* out, size_t size) {
  size_t done = 0;
  while (done < size) {
    const ssize_t got = pread(fd, out + done, size - done, static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoError(path);
    if (got == 0) {
      return absl::DataLossError(absl::StrCat(path.string(), ": shrank from ", size, " to ", done,
                                              " bytes while it was read"));
    }
    done += static_cast<size_t>(got);
  }
  return absl::OkStatus();
}

std::filesystem::path RealPath(int fd) {
  std::error_code error;
  return std::filesystem::read_symlink(absl::StrCat("/proc/self/fd/", fd), error);
}

// Someone wrote to the file between the two: what was copied may be half old and half new.
absl::Status CheckUnchanged(int fd, const struct stat& before, const std::filesystem::path& path) {
  struct stat now;
  if (fstat(fd, &now) != 0) return ErrnoError(path);
  const auto same = [](const timespec& a, const timespec& b) {
    return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
  };
  if (now.st_size == before.st_size && same(now.st_mtim, before.st_mtim)) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(path.string(), ": changed while it was read"));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const MappedFile>> MappedFile::Open(
    const std::filesystem::path& path, FileAccess access) {
  // O_NONBLOCK: a FIFO must be refused below, not waited for.
  const FileDescriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) return ErrnoError(path);
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return ErrnoError(path);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path.string(), " is not a regular file"));
  }
  const size_t size = static_cast<size_t>(info.st_size);
  if (size == 0) {
    return std::shared_ptr<const MappedFile>(new MappedFile(nullptr, 0, RealPath(fd.get())));
  }

  const bool copy = access == FileAccess::kCopy;
  void* data = copy
                   ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                   : mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) return ErrnoError(path);
  auto* bytes = static_cast<std::byte*>(data);
  std::shared_ptr<const MappedFile> file(new MappedFile(bytes, size, RealPath(fd.get())));
  if (!copy) return file;
  madvise(data, size, MADV_HUGEPAGE);  // a hint: one fault for 2 MiB, not for 4 KiB
  LK_RETURN_IF_ERROR(ReadAll(fd.get(), path, bytes, size));
  LK_RETURN_IF_ERROR(CheckUnchanged(fd.get(), info, path));
  return file;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace lorikeet
