// One file over HTTP(S), to disk. libcurl: it knows the protocol's corners, signs for S3 and takes
// proxies and certificates as the rest of the system does.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lorikeet {

struct Download {
  std::string url;
  int64_t max_bytes = 0;
  bool follow_redirects = false;      // secrets do not go to other hosts
  std::string bearer;                 // secret; empty: none
  std::string s3_region;              // empty: not signed
  std::string s3_user;                // secret: "key:secret key"
  std::string s3_session;             // secret
  int32_t stall_s = 20;               // without a kilobyte a second, and it is given up
};

struct Downloaded {
  int64_t bytes = 0;
  std::string sha256;         // 64 hexadecimal digits
  std::string linked_sha256;  // what the hub says it should be; empty: it does not
};

// Writes to `file`. PERMISSION_DENIED: 401, 403; NOT_FOUND: 404, 410; RESOURCE_EXHAUSTED: more than
// max_bytes, or the disk is full; UNAVAILABLE: anything that may be over another time; CANCELLED:
// `cancel` became true. Messages name the URL and never a secret.
absl::StatusOr<Downloaded> RunDownload(const Download& download, const std::filesystem::path& file,
                                       const std::atomic<bool>& cancel);

}  // namespace lorikeet
