#include "server/sources/directory_watch.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
using std::chrono::steady_clock;

constexpr int kMostLoading = 16;
constexpr int kRestShare = 20;  // of the time that looking takes

}  // namespace

DirectoryWatch::DirectoryWatch(AdapterRegistry* registry, std::vector<fs::path> directories,
                               std::function<void(const Loaded&)> tell,
                               std::chrono::milliseconds pause)
    : registry_(registry),
      directories_(std::move(directories)),
      tell_(std::move(tell)),
      pause_(pause),
      thread_([this] { Loop(); }) {}

DirectoryWatch::~DirectoryWatch() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return loading_ == 0; });
}

void DirectoryWatch::Loop() {
  while (true) {
    const auto start = steady_clock::now();
    Look();
    const auto rest = std::max<steady_clock::duration>(pause_,
                                                       kRestShare * (steady_clock::now() - start));
    std::unique_lock lock(mutex_);
    if (changed_.wait_for(lock, rest, [this] { return stopping_; })) return;
  }
}

void DirectoryWatch::Look() {
  std::map<std::string, Folder> folders;
  if (!FindFolders(&folders)) return;
  std::vector<std::string> gone;
  std::vector<std::string> fresh;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [name, folder] : folders) {
      Seen& seen = seen_[name];
      const bool still = folder.quiet || seen.look == folder.look;
      seen.look = folder.look;
      if (still && seen.tried != folder.look) fresh.push_back(name);
    }
    for (const auto& [name, seen] : seen_) {
      if (!folders.contains(name)) gone.push_back(name);
    }
  }
  for (const std::string& name : gone) Unload(name);
  for (const std::string& name : fresh) Load(name, folders.at(name));
}

// The first directory that has a name counts. False: a directory cannot be read.
bool DirectoryWatch::FindFolders(std::map<std::string, Folder>* folders) const {
  const auto now = fs::file_time_type::clock::now();
  for (const fs::path& directory : directories_) {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(directory, error)) {
      const std::string name = entry.path().filename().string();
      std::error_code ignored;
      if (name.starts_with('.') || !entry.is_directory(ignored)) continue;
      Folder folder = LookInto(entry.path(), now);
      if (folder.files >= 2) folders->emplace(name, std::move(folder));
    }
    if (error) return false;
  }
  return true;
}

// Files that cannot be looked at count: the load says what is wrong with them.
DirectoryWatch::Folder DirectoryWatch::LookInto(const fs::path& path, fs::file_time_type now) {
  Folder folder{.path = path, .look = "", .quiet = true};
  for (const char* file :
       {"adapter_config.json", "adapter_model.safetensors", "adapter.safetensors"}) {
    std::error_code error;
    const auto bytes = fs::file_size(path / file, error);
    if (error == std::errc::no_such_file_or_directory) continue;
    ++folder.files;
    const auto time = error ? fs::file_time_type() : fs::last_write_time(path / file, error);
    absl::StrAppend(&folder.look, file, " ", error ? 0 : bytes, " ",
                    time.time_since_epoch().count(), " ");
    folder.quiet = folder.quiet && now - time > std::chrono::seconds(1);
  }
  return folder;
}

void DirectoryWatch::Load(const std::string& name, const Folder& folder) {
  bool replace = false;
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return loading_ < kMostLoading || stopping_; });
    if (stopping_) return;
    ++loading_;
    Seen& seen = seen_[name];
    seen.tried = folder.look;
    replace = seen.loaded;
  }
  const auto start = steady_clock::now();
  registry_->LoadAsync(
      name, folder.path, {.replace = replace, .keep = false},
      [this, name, folder, start](const absl::StatusOr<AdapterInfo>& info) {
        const auto took = steady_clock::now() - start;
        bool told = false;
        {
          std::lock_guard lock(mutex_);
          Seen& seen = seen_[name];
          told = !info.ok() && seen.told == info.status().message();
          seen.told = std::string(info.status().message());
          seen.loaded = seen.loaded || info.ok();
          // What had no room now may have some another time.
          if (absl::IsResourceExhausted(info.status())) seen.tried.clear();
        }
        if (!told) {
          tell_({folder.path.string(), info.status(),
                 std::chrono::duration_cast<std::chrono::microseconds>(took).count()});
        }
        std::lock_guard lock(mutex_);
        --loading_;
        changed_.notify_all();
      });
}

// At once: running requests keep what they have.
void DirectoryWatch::Unload(const std::string& name) {
  bool loaded = false;
  {
    std::lock_guard lock(mutex_);
    loaded = seen_[name].loaded;
    seen_.erase(name);
  }
  if (!loaded) return;
  registry_->UnloadAsync(name, std::chrono::microseconds(0),
                         [](const absl::StatusOr<UnloadResult>&) {});
}

}  // namespace lorikeet
