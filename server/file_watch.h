// Notices that files an operator replaces have changed: keys and certificates.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace lorikeet {

// Looks once a second, because what is replaced by a rename or behind a symbolic link, as mounted
// secrets are, does not show in the file that was opened.
class FileWatch {
 public:
  // `changed` is called on a thread of its own after any of `paths` has changed, not at first.
  FileWatch(std::vector<std::string> paths, std::function<void()> changed);
  ~FileWatch();

 private:
  void Loop();
  std::string Look() const;  // something that differs once a file does

  const std::vector<std::string> paths_;
  const std::function<void()> changed_;
  std::string seen_;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace lorikeet
