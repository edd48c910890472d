#include "server/file_watch.h"

#include <sys/stat.h>

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lorikeet {

FileWatch::FileWatch(std::vector<std::string> paths, std::function<void()> changed)
    : paths_(std::move(paths)),
      changed_(std::move(changed)),
      seen_(Look()),
      thread_([this] { Loop(); }) {}

FileWatch::~FileWatch() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_one();
  thread_.join();
}

std::string FileWatch::Look() const {
  std::string all;
  for (const std::string& path : paths_) {
    struct stat file{};
    if (stat(path.c_str(), &file) != 0) file = {};
    absl::StrAppend(&all, file.st_ino, " ", file.st_size, " ", file.st_mtim.tv_sec, ".",
                    file.st_mtim.tv_nsec, "\n");
  }
  return all;
}

void FileWatch::Loop() {
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, std::chrono::seconds(1), [this] { return stopping_; })) {
    std::string now = Look();
    if (now == seen_) continue;
    seen_ = std::move(now);
    changed_();
  }
}

}  // namespace lorikeet
