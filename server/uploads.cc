#include "server/uploads.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/file_descriptor.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;

constexpr char kPartial[] = "partial-";

absl::Status Failure(const char* what, const fs::path& path, int error) {
  return absl::UnavailableError(
      absl::StrCat("cannot ", what, " ", path.string(), ": ", std::strerror(error)));
}

absl::Status Sync(const fs::path& path) {
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() >= 0 && fsync(file.get()) == 0) return absl::OkStatus();
  return Failure("sync", path, errno);
}

// What is there already changes places with it in one step, since a name may be about to read it: it is
// not simply left, for its files may have been damaged since. Where the file system cannot do that they are.
absl::Status MoveInto(const fs::path& place, const fs::path& scratch) {
  const auto move = [&](unsigned flags) {
    return renameat2(AT_FDCWD, scratch.c_str(), AT_FDCWD, place.c_str(), flags) == 0;
  };
  if (!move(RENAME_EXCHANGE) && !move(0) && errno != ENOTEMPTY && errno != EEXIST) {
    return Failure("make", place, errno);
  }
  std::error_code ignored;
  fs::remove_all(scratch, ignored);
  return absl::OkStatus();
}

}  // namespace

// The registry knows directories by their real paths.
Uploads::Uploads(const fs::path& directory) : directory_(fs::weakly_canonical(directory)) {
  std::error_code ignored;
  std::vector<fs::path> partial;
  for (const auto& entry : fs::directory_iterator(directory_, ignored)) {
    if (entry.path().filename().string().starts_with(kPartial)) partial.push_back(entry.path());
  }
  for (const fs::path& path : partial) fs::remove_all(path, ignored);
}

absl::StatusOr<fs::path> Uploads::Scratch() const {
  std::error_code ignored;
  fs::create_directories(directory_, ignored);
  std::string pattern = (directory_ / absl::StrCat(kPartial, "XXXXXX")).string();
  if (mkdtemp(pattern.data()) == nullptr) return Failure("write below", directory_, errno);
  return fs::path(pattern);
}

absl::StatusOr<fs::path> Uploads::Keep(const fs::path& scratch, const std::string& name) {
  for (const auto& entry : fs::recursive_directory_iterator(scratch)) {
    LK_RETURN_IF_ERROR(Sync(entry.path()));
  }
  LK_RETURN_IF_ERROR(Sync(scratch));
  fs::path place = directory_ / name;
  std::lock_guard lock(mutex_);
  LK_RETURN_IF_ERROR(MoveInto(place, scratch));
  LK_RETURN_IF_ERROR(Sync(directory_));
  ++loading_[place];
  return place;
}

void Uploads::LoadEnded(const fs::path& place) {
  std::lock_guard lock(mutex_);
  if (--loading_.at(place) > 0) return;
  loading_.erase(place);
}

void Uploads::Remove(const fs::path& place) {
  std::lock_guard lock(mutex_);
  if (loading_.contains(place)) return;
  std::error_code ignored;
  fs::remove_all(place, ignored);
}

}  // namespace lorikeet
