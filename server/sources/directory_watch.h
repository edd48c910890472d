// Directories whose folders are adapters: what appears is loaded under its folder's name, what
// changes is loaded again, what goes is unloaded.
#pragma once

#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "adapters_cache/registry.h"

namespace lorikeet {

// Looks at sizes and times, once a second or less often where that takes long: it works on every
// file system. A folder is taken when nothing in it changed for a second; folders that begin with
// a dot are left alone, so that whoever copies can rename at the end. What a client loaded under
// the same name stays the client's. While a directory cannot be read nothing is unloaded.
class DirectoryWatch {
 public:
  struct Loaded {
    std::string path;
    absl::Status status;
    int64_t took_us = 0;
  };

  // `registry` outlives it and allows `directories` as roots. `tell` hears of every load, and of a
  // failure that repeats itself once; on any thread.
  DirectoryWatch(AdapterRegistry* registry, std::vector<std::filesystem::path> directories,
                 std::function<void(const Loaded&)> tell,
                 std::chrono::milliseconds pause = std::chrono::seconds(1));
  ~DirectoryWatch();  // waits for loads under way

 private:
  struct Folder {
    std::filesystem::path path;
    std::string look;  // sizes and times; changes with the files
    bool quiet = false;
    int files = 0;
  };
  struct Seen {
    std::string look;     // when it was last looked at
    std::string tried;    // when it was last loaded, with success or not
    std::string told;     // of the failure then
    bool loaded = false;  // by this watch
  };

  void Loop();
  void Look();
  static Folder LookInto(const std::filesystem::path& path, std::filesystem::file_time_type now);
  bool FindFolders(std::map<std::string, Folder>* folders) const;
  void Load(const std::string& name, const Folder& folder);
  void Unload(const std::string& name);

  AdapterRegistry* const registry_;
  const std::vector<std::filesystem::path> directories_;
  const std::function<void(const Loaded&)> tell_;
  const std::chrono::milliseconds pause_;

  std::mutex mutex_;  // everything below
  std::condition_variable changed_;
  std::map<std::string, Seen> seen_;  // by name
  int loading_ = 0;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace lorikeet
