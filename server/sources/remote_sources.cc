#include "server/sources/remote_sources.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "adapters_cache/sha256.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;

constexpr char kConfigName[] = "adapter_config.json";
constexpr int64_t kMaxConfigBytes = 1 << 20;
constexpr size_t kNameDigits = 48;

std::string Join(const std::vector<std::string>& parts) {
  std::string all;
  for (const std::string& part : parts) absl::StrAppend(&all, all.empty() ? "" : ", ", part);
  return all;
}

// What was written is on disk when its directory gets its name.
void Sync(const fs::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return;
  fsync(file);
  close(file);
}

}  // namespace

absl::StatusOr<std::unique_ptr<RemoteSources>> RemoteSources::Create(Options options) {
  for (const std::string& allowed : options.allowed) {
    if (!Takes(allowed)) {
      return absl::InvalidArgumentError(absl::StrCat("adapter source '", allowed, "' is no URL"));
    }
  }
  LK_ASSIGN_OR_RETURN(std::unique_ptr<DiskCache> cache,
                      DiskCache::Open(options.directory, options.disk_bytes,
                                      options.tenant_disk_bytes));
  return std::unique_ptr<RemoteSources>(new RemoteSources(std::move(options), std::move(cache)));
}

RemoteSources::RemoteSources(Options options, std::unique_ptr<DiskCache> cache)
    : options_(std::move(options)), cache_(std::move(cache)), busy_(options_.allowed.size() + 1) {
  const size_t threads = options_.threads * options_.allowed.size();
  for (size_t i = 0; i < threads; ++i) threads_.emplace_back([this] { Loop(); });
}

RemoteSources::~RemoteSources() {
  Cancel();
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void RemoteSources::Cancel() {
  {
    std::lock_guard lock(mutex_);
    cancelled_ = true;
  }
  cancel_wakes_.notify_all();
}

void RemoteSources::FetchAsync(std::string location, fs::path kept, std::string tenant, Done done) {
  const size_t source = SourceOf(location, options_.allowed);
  {
    std::lock_guard lock(mutex_);
    Key key(std::move(location), std::move(kept));
    std::vector<Done>& asked = asked_[key];
    asked.push_back(std::move(done));
    if (asked.size() == 1) queue_.push_back({std::move(key), source, std::move(tenant)});
  }
  work_.notify_one();
}

std::deque<RemoteSources::Wanted>::iterator RemoteSources::Next() {
  return std::ranges::find_if(
      queue_, [this](const Wanted& wanted) { return busy_[wanted.source] < options_.threads; });
}

void RemoteSources::Loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    auto next = queue_.end();
    work_.wait(lock, [&] { return (next = Next()) != queue_.end() || stopping_; });
    if (next == queue_.end()) return;
    const Wanted wanted = std::move(*next);
    queue_.erase(next);
    ++busy_[wanted.source];
    lock.unlock();
    absl::StatusOr<FetchedAdapter> fetched = Fetch(wanted);
    lock.lock();
    --busy_[wanted.source];
    ++(fetched.ok() ? stats_.fetches : stats_.failures);
    const std::vector<Done> asked = std::move(asked_.extract(wanted.key).mapped());
    lock.unlock();
    for (const Done& done : asked) done(fetched);
    fetched = absl::CancelledError();  // its hold goes before the next wait
    lock.lock();
  }
}

absl::StatusOr<FetchedAdapter> RemoteSources::Fetch(const Wanted& wanted) {
  const auto& [location, kept] = wanted.key;
  if (cancelled_) return absl::CancelledError("the server is shutting down");
  if (std::optional<FetchedAdapter> there = cache_->Find(kept, wanted.tenant)) return *there;
  LK_ASSIGN_OR_RETURN(const RemoteAdapter adapter, ParseLocation(location, options_.endpoints));
  if (wanted.source == options_.allowed.size()) {
    return absl::PermissionDeniedError(absl::StrCat(
        location, " is outside the allowed sources: ", Join(options_.allowed)));
  }
  LK_ASSIGN_OR_RETURN(const fs::path scratch, cache_->Scratch());
  absl::StatusOr<FetchedAdapter> fetched = [&]() -> absl::StatusOr<FetchedAdapter> {
    const int64_t most = std::min(Limits::kMaxAdapterFileBytes, cache_->MostFor(wanted.tenant));
    LK_ASSIGN_OR_RETURN(const std::string name, FetchFiles(adapter, most, scratch));
    return cache_->Keep(scratch, name, wanted.tenant);
  }();
  std::error_code ignored;
  if (!fetched.ok()) fs::remove_all(scratch, ignored);
  return fetched;
}

// Returns a name made of what the files hold.
absl::StatusOr<std::string> RemoteSources::FetchFiles(const RemoteAdapter& adapter,
                                                      int64_t most, const fs::path& to) {
  LK_ASSIGN_OR_RETURN(const Downloaded config,
                      FetchFile(adapter, kConfigName, kMaxConfigBytes, to));
  absl::StatusOr<Downloaded> weights = absl::NotFoundError("");
  for (const char* name : {"adapter_model.safetensors", "adapter.safetensors"}) {
    weights = FetchFile(adapter, name, most, to);
    if (!absl::IsNotFound(weights.status())) break;
  }
  LK_RETURN_IF_ERROR(weights.status());
  Sync(to);
  Sha256 name;
  name.Add(config.sha256);
  name.Add(weights->sha256);
  return name.Hex().substr(0, kNameDigits);
}

absl::StatusOr<Downloaded> RemoteSources::FetchFile(const RemoteAdapter& adapter, const char* name,
                                                    int64_t max_bytes, const fs::path& to) {
  using Service = RemoteAdapter::Service;
  Download download{.url = absl::StrCat(adapter.base_url, "/", name),
                    .max_bytes = max_bytes,
                    .follow_redirects = adapter.service == Service::kHub,
                    .stall_s = options_.stall_s};
  const SourceCredentials& credentials = options_.credentials;
  if (adapter.service == Service::kHub) download.bearer = credentials.hub_token;
  if (adapter.service == Service::kS3 && !credentials.s3_key.empty()) {
    download.s3_region = options_.endpoints.s3_region;
    download.s3_user = absl::StrCat(credentials.s3_key, ":", credentials.s3_secret);
    download.s3_session = credentials.s3_session;
  }
  std::chrono::milliseconds wait = options_.retry_after;
  for (int32_t attempt = 1;; ++attempt, wait *= 2) {
    absl::StatusOr<Downloaded> got = RunDownload(download, to / name, cancelled_);
    if (got.ok() && !got->linked_sha256.empty() && got->linked_sha256 != got->sha256) {
      got = absl::DataLossError(absl::StrCat(download.url, " has SHA-256 ", got->sha256,
                                             "; the hub says ", got->linked_sha256));
    }
    const bool again = absl::IsUnavailable(got.status()) || absl::IsDataLoss(got.status());
    if (again && attempt < options_.attempts && Sleep(wait)) continue;
    std::error_code ignored;
    if (!got.ok()) fs::remove(to / name, ignored);
    if (!got.ok()) return got.status();
    Sync(to / name);
    std::lock_guard lock(mutex_);
    stats_.bytes += got->bytes;
    return got;
  }
}

bool RemoteSources::Sleep(std::chrono::milliseconds time) {
  std::unique_lock lock(mutex_);
  return !cancel_wakes_.wait_for(lock, time, [this] { return cancelled_.load(); });
}

RemoteSources::Stats RemoteSources::stats() const {
  std::lock_guard lock(mutex_);
  Stats stats = stats_;
  stats.disk = cache_->stats();
  return stats;
}

}  // namespace lorikeet
