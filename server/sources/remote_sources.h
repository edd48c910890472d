// HTTP(S) servers, S3-compatible object stores and the Hugging Face hub as sources of adapters, with
// a disk cache.
//
// An adapter is adapter_config.json and adapter_model.safetensors (or adapter.safetensors) below its
// location. Fetches run on threads of their own, one for all who ask for the same, so many for each
// source that others never wait for one that stalls. Each file has a few attempts where another might
// succeed.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/adapter_sources.h"
#include "server/sources/disk_cache.h"
#include "server/sources/download.h"
#include "server/sources/location.h"

namespace lorikeet {

class RemoteSources final : public AdapterSources {
 public:
  struct Options {
    std::vector<std::string> allowed;  // locations, and what lies below them
    std::filesystem::path directory;   // of the disk cache
    int64_t disk_bytes = 0;
    int64_t tenant_disk_bytes = std::numeric_limits<int64_t>::max();  // of them, each tenant's
    SourceEndpoints endpoints;
    SourceCredentials credentials;
    int32_t threads = 4;  // of each of `allowed`
    int32_t attempts = 3;
    std::chrono::milliseconds retry_after{500};  // doubled each time
    int32_t stall_s = 20;
  };

  static absl::StatusOr<std::unique_ptr<RemoteSources>> Create(Options options);
  ~RemoteSources() override;  // nobody may ask any more

  void FetchAsync(std::string location, std::filesystem::path kept, std::string tenant,
                  Done done) override;

  // Ends what is under way and all that comes with CANCELLED. Idempotent.
  void Cancel();

  struct Stats {
    int64_t fetches = 0;  // that ended well
    int64_t failures = 0;
    int64_t bytes = 0;  // fetched
    DiskCache::Stats disk;
  };
  Stats stats() const;

 private:
  using Key = std::pair<std::string, std::filesystem::path>;  // location and `kept`

  RemoteSources(Options options, std::unique_ptr<DiskCache> cache);

  struct Wanted {
    Key key;
    size_t source = 0;  // in `allowed`; behind them: none, and it is refused
    std::string tenant;
  };

  void Loop();
  std::deque<Wanted>::iterator Next();  // whose source has a thread left
  absl::StatusOr<FetchedAdapter> Fetch(const Wanted& wanted);
  absl::StatusOr<std::string> FetchFiles(const RemoteAdapter& adapter, int64_t most,
                                         const std::filesystem::path& to);
  absl::StatusOr<Downloaded> FetchFile(const RemoteAdapter& adapter, const char* name,
                                       int64_t max_bytes, const std::filesystem::path& to);
  bool Sleep(std::chrono::milliseconds time);  // false: cancelled

  const Options options_;
  const std::unique_ptr<DiskCache> cache_;
  std::atomic<bool> cancelled_{false};

  mutable std::mutex mutex_;  // everything below
  std::condition_variable work_;
  std::condition_variable cancel_wakes_;
  bool stopping_ = false;
  std::deque<Wanted> queue_;
  std::vector<int32_t> busy_;           // threads, by source
  std::map<Key, std::vector<Done>> asked_;  // waiting or under way
  Stats stats_;
  std::vector<std::thread> threads_;
};

}  // namespace lorikeet
