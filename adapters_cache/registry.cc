#include "adapters_cache/registry.h"

#include <deque>
#include <future>
#include <mutex>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "adapters_cache/registry_core.h"
#include "engine/base/status_macros.h"

namespace lorikeet {

namespace fs = std::filesystem;

absl::Status ValidateAdapterName(std::string_view name, std::string_view base_name) {
  const auto letter_or_digit = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
  };
  if (name.empty()) return absl::InvalidArgumentError("the adapter's name is empty");
  if (name.size() > AdapterRegistry::kMaxNameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the adapter's name has ", name.size(),
                                                   " bytes; at most ",
                                                   AdapterRegistry::kMaxNameBytes));
  }
  if (!letter_or_digit(name.front())) {
    return absl::InvalidArgumentError("the adapter's name must begin with a letter or digit");
  }
  for (size_t i = 0; i < name.size(); ++i) {
    if (letter_or_digit(name[i]) ||
        std::string_view("._-:/@+").find(name[i]) != std::string_view::npos) {
      continue;
    }
    return absl::InvalidArgumentError(absl::StrCat("byte ", i,
                                                   " of the adapter's name is none of A-Z a-z 0-9 "
                                                   ". _ - : / @ +"));
  }
  if (name == base_name) {
    return absl::InvalidArgumentError(QuotedName(name) + " is the base model's name");
  }
  return absl::OkStatus();
}

// ---- watching

struct AdapterRegistry::Core::Watcher {
  std::function<void()> wake;
  std::mutex mutex;
  std::deque<AdapterEvent> events;
  bool overrun = false;
};

class AdapterRegistry::Core::WatchHandle final : public AdapterWatch {
 public:
  WatchHandle(std::shared_ptr<Core> core, std::shared_ptr<Watcher> watcher)
      : core_(std::move(core)), watcher_(std::move(watcher)) {}
  ~WatchHandle() override {
    std::lock_guard lock(core_->mutex_);
    std::erase(core_->watchers_, watcher_);
  }

  absl::StatusOr<bool> Next(AdapterEvent* event) override {
    std::lock_guard lock(watcher_->mutex);
    if (watcher_->overrun) {
      return absl::ResourceExhaustedError(
          absl::StrCat("more than ", kMaxWatchedEvents, " events were left unread"));
    }
    if (watcher_->events.empty()) return false;
    *event = std::move(watcher_->events.front());
    watcher_->events.pop_front();
    return true;
  }

 private:
  std::shared_ptr<Core> core_;
  std::shared_ptr<Watcher> watcher_;
};

std::unique_ptr<AdapterWatch> AdapterRegistry::Core::Watch(std::function<void()> wake) {
  auto watcher = std::make_shared<Watcher>();
  watcher->wake = std::move(wake);
  std::lock_guard lock(mutex_);
  watchers_.push_back(watcher);
  return std::make_unique<WatchHandle>(shared_from_this(), std::move(watcher));
}

void AdapterRegistry::Core::Emit(AdapterEvent::Kind kind, const std::string& name,
                                 const std::string& version) {
  if (watchers_.empty()) return;
  const AdapterEvent event{kind, name, version, UnixMicros()};
  for (const auto& watcher : watchers_) {
    {
      std::lock_guard lock(watcher->mutex);
      watcher->overrun = watcher->overrun || watcher->events.size() >= kMaxWatchedEvents;
      if (!watcher->overrun) watcher->events.push_back(event);
    }
    watcher->wake();
  }
}

// ---- requests at the door

void AdapterRegistry::Core::Load(std::string name, fs::path path, LoadOptions options,
                                 LoadDone done) {
  absl::Status refused = ValidateAdapterName(name, options_.base_name);
  const bool remote = options_.sources != nullptr && AdapterSources::Takes(path.native());
  if (refused.ok()) {
    std::lock_guard lock(mutex_);
    if (stopping_) {
      refused = RegistryShuttingDown();
    } else if (jobs_.size() + fetching_ >= kMaxPendingLoads) {
      refused = absl::ResourceExhaustedError(absl::StrCat(
          jobs_.size() + fetching_, " adapter loads are waiting; at most ", kMaxPendingLoads));
    } else if (remote) {
      ++fetching_;
    } else {
      jobs_.push_back({.name = std::move(name),
                       .path = std::move(path),
                       .options = options,
                       .done = std::move(done)});
    }
  }
  if (!refused.ok()) return done(refused);
  if (remote) {
    return FetchThenLoad({.name = std::move(name),
                          .path = std::move(path),
                          .options = options,
                          .done = std::move(done)});
  }
  jobs_changed_.notify_one();
}

void AdapterRegistry::Core::Reload(const std::string& name, LoadDone done) {
  LoadOptions options{.replace = true};  // the name keeps its tenant
  absl::StatusOr<std::string> path = AdapterNotLoaded(name);
  {
    std::lock_guard lock(mutex_);
    if (const auto it = names_.find(name); it != names_.end()) {
      const auto& targets = it->second.targets;
      options.origin = it->second.origin;
      options.keep = it->second.kept;
      path = it->second.location;
      if (targets.size() > 1) {
        path = absl::FailedPreconditionError(
            absl::StrCat("adapter ", QuotedName(name), " is an alias of ", targets.size(),
                         " targets; reload those"));
      }
    }
  }
  if (!path.ok()) return done(path.status());
  Load(name, *path, options, std::move(done));
}

void AdapterRegistry::Core::Prefetch(std::string_view name,
                                     std::function<void(absl::Status)> done) {
  // Counts the versions still to come, and keeps the first failure.
  struct Pending {
    std::mutex mutex;
    size_t missing = 1;
    absl::Status status;
    std::function<void(absl::Status)> done;
    void End(const absl::Status& end) {
      {
        std::lock_guard lock(mutex);
        status.Update(end);
        if (--missing > 0) return;
      }
      done(status);
    }
  };
  auto pending = std::make_shared<Pending>();
  pending->done = std::move(done);
  absl::Status found = AdapterNotLoaded(name);
  {
    std::lock_guard lock(mutex_);
    if (const auto it = names_.find(name); it != names_.end()) {
      found = stopping_ ? RegistryShuttingDown() : absl::OkStatus();
      for (const Target& target : it->second.targets) {
        if (target.version->adapter != nullptr || !found.ok()) continue;
        ++pending->missing;
        ++waiting_requests_;
        target.version->waiting.push_back(
            [pending](absl::StatusOr<AdapterLease> lease) {
              const absl::Status status = lease.status();
              lease = absl::CancelledError();  // nobody holds it when the caller hears of it
              pending->End(status);
            });
        QueueRead(target.version);
      }
    }
  }
  pending->End(found);
}

// ---- the registry itself

AdapterRegistry::AdapterRegistry(std::shared_ptr<Core> core) : core_(std::move(core)) {}

AdapterRegistry::~AdapterRegistry() { core_->Stop(); }

absl::StatusOr<std::unique_ptr<AdapterRegistry>> AdapterRegistry::Create(const BaseModel& base,
                                                                         Options options) {
  for (fs::path& root : options.allowed_roots) {
    std::error_code error;
    const fs::path real = fs::canonical(root, error);
    if (error || !fs::is_directory(real, error)) {
      return absl::NotFoundError(
          absl::StrCat("adapter root ", root.string(), " is not a directory"));
    }
    root = real;
  }
  auto core = std::make_shared<Core>(base, std::move(options));
  LK_RETURN_IF_ERROR(core->Restore());
  core->Start();
  return std::unique_ptr<AdapterRegistry>(new AdapterRegistry(std::move(core)));
}

void AdapterRegistry::LoadAsync(std::string name, fs::path path, LoadOptions options,
                                LoadDone done) {
  core_->Load(std::move(name), std::move(path), options, std::move(done));
}
void AdapterRegistry::ReloadAsync(const std::string& name, LoadDone done) {
  core_->Reload(name, std::move(done));
}
void AdapterRegistry::UnloadAsync(std::string_view name, std::chrono::microseconds drain,
                                  UnloadDone done) {
  core_->Unload(name, drain, std::move(done));
}
void AdapterRegistry::AcquireAsync(std::string_view name, LeaseDone done) {
  core_->Acquire(name, std::move(done));
}
void AdapterRegistry::PrefetchAsync(std::string_view name,
                                    std::function<void(absl::Status)> done) {
  core_->Prefetch(name, std::move(done));
}
void AdapterRegistry::SetPinnedAsync(std::string_view name, bool pinned, LoadDone done) {
  core_->SetPinned(name, pinned, std::move(done));
}
void AdapterRegistry::SetAliasAsync(const std::string& alias,
                                    const std::vector<AdapterTarget>& targets,
                                    const std::string& tenant, LoadDone done) {
  core_->SetAlias(alias, targets, tenant, std::move(done));
}
std::unique_ptr<AdapterRegistry::DiskRoom> AdapterRegistry::DiskRoomFor(const std::string& name,
                                                                        const std::string& tenant) {
  return core_->DiskRoomFor(name, tenant);
}
void AdapterRegistry::TellIfUnused(const std::string& directory) {
  core_->TellIfUnused(directory);
}
void AdapterRegistry::SetDevice(DeviceTier* device) { core_->SetDevice(device); }
std::vector<AdapterInfo> AdapterRegistry::List(const AdapterFilter& filter) const {
  return core_->List(filter);
}
absl::StatusOr<AdapterInfo> AdapterRegistry::Get(std::string_view name) const {
  return core_->Get(name);
}
absl::StatusOr<std::string> AdapterRegistry::Find(std::string_view name) const {
  return core_->Find(name);
}
bool AdapterRegistry::MayAppear(std::string_view name) const { return core_->MayAppear(name); }
RegistryStats AdapterRegistry::stats() const { return core_->stats(); }
std::unique_ptr<AdapterWatch> AdapterRegistry::Watch(std::function<void()> wake) {
  return core_->Watch(std::move(wake));
}

// ---- the same, waiting

namespace {

// Starts `call` with a callback and waits for what that is given. The promise is shared: set_value
// may still touch it when the waiter is back.
template <typename Result, typename Call>
Result Await(const Call& call) {
  auto promise = std::make_shared<std::promise<Result>>();
  call([promise](Result result) { promise->set_value(std::move(result)); });
  return promise->get_future().get();
}

}  // namespace

absl::StatusOr<AdapterInfo> AdapterRegistry::Load(std::string name, fs::path path, Origin origin) {
  return Load(std::move(name), std::move(path),
              LoadOptions{.origin = origin, .keep = origin == Origin::kClient});
}
absl::StatusOr<AdapterInfo> AdapterRegistry::Load(std::string name, fs::path path,
                                                  LoadOptions options) {
  return Await<absl::StatusOr<AdapterInfo>>(
      [&](LoadDone done) { LoadAsync(name, path, options, std::move(done)); });
}
absl::StatusOr<AdapterInfo> AdapterRegistry::Reload(const std::string& name) {
  return Await<absl::StatusOr<AdapterInfo>>(
      [&](LoadDone done) { ReloadAsync(name, std::move(done)); });
}
absl::StatusOr<UnloadResult> AdapterRegistry::Unload(std::string_view name,
                                                     std::chrono::microseconds drain) {
  return Await<absl::StatusOr<UnloadResult>>(
      [&](UnloadDone done) { UnloadAsync(name, drain, std::move(done)); });
}
absl::StatusOr<AdapterLease> AdapterRegistry::Acquire(std::string_view name) {
  return Await<absl::StatusOr<AdapterLease>>(
      [&](LeaseDone done) { AcquireAsync(name, std::move(done)); });
}
absl::Status AdapterRegistry::Prefetch(std::string_view name) {
  return Await<absl::Status>(
      [&](std::function<void(absl::Status)> done) { PrefetchAsync(name, std::move(done)); });
}
absl::StatusOr<AdapterInfo> AdapterRegistry::SetPinned(std::string_view name, bool pinned) {
  return Await<absl::StatusOr<AdapterInfo>>(
      [&](LoadDone done) { SetPinnedAsync(name, pinned, std::move(done)); });
}
absl::StatusOr<AdapterInfo> AdapterRegistry::SetAlias(const std::string& alias,
                                                      const std::vector<AdapterTarget>& targets,
                                                      const std::string& tenant) {
  return Await<absl::StatusOr<AdapterInfo>>(
      [&](LoadDone done) { SetAliasAsync(alias, targets, tenant, std::move(done)); });
}

}  // namespace lorikeet
