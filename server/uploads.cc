#include "server/uploads.h"

#include <fcntl.h>
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

}  // namespace

// The registry knows directories by their real paths.
Uploads::Uploads(const fs::path& directory, const AdapterRegistry* registry)
    : directory_(directory.empty() ? directory : fs::weakly_canonical(directory)),
      registry_(registry) {
  std::error_code ignored;
  std::vector<fs::path> partial;
  for (const auto& entry : fs::directory_iterator(directory_, ignored)) {
    if (entry.path().filename().string().starts_with(kPartial)) partial.push_back(entry.path());
  }
  for (const fs::path& path : partial) fs::remove_all(path, ignored);
}

absl::StatusOr<fs::path> Uploads::Scratch() const {
  if (directory_.empty()) {
    return absl::FailedPreconditionError(
        "this server has no directory to keep uploads in; it is started with --adapter-dir");
  }
  std::error_code ignored;
  fs::create_directories(directory_, ignored);
  std::string pattern = (directory_ / absl::StrCat(kPartial, "XXXXXX")).string();
  if (mkdtemp(pattern.data()) == nullptr) return Failure("write below", directory_, errno);
  return fs::path(pattern);
}

absl::StatusOr<fs::path> Uploads::Keep(const fs::path& scratch, const std::string& name) {
  for (const auto& file : fs::directory_iterator(scratch)) LK_RETURN_IF_ERROR(Sync(file.path()));
  LK_RETURN_IF_ERROR(Sync(scratch));
  fs::path place = directory_ / name;
  std::lock_guard lock(mutex_);
  std::error_code error;
  if (fs::exists(place, error)) {
    fs::remove_all(scratch, error);
  } else {
    fs::rename(scratch, place, error);
    if (error) return Failure("make", place, error.value());
    LK_RETURN_IF_ERROR(Sync(directory_));
  }
  ++loading_[place];
  return place;
}

void Uploads::LoadEnded(const fs::path& place) {
  std::lock_guard lock(mutex_);
  if (--loading_.at(place) > 0) return;
  loading_.erase(place);
  RemoveUnusedLocked(place);
}

void Uploads::RemoveUnused(const fs::path& path) {
  std::lock_guard lock(mutex_);
  RemoveUnusedLocked(path);
}

void Uploads::RemoveUnusedLocked(const fs::path& path) {
  if (directory_.empty() || path.parent_path() != directory_ || loading_.contains(path) ||
      registry_->Uses(path.native())) {
    return;
  }
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

}  // namespace lorikeet
