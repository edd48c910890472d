// What the locations of adapters mean: https://HOST/PATH, s3://BUCKET/PREFIX and
// hf://ORGANISATION/REPOSITORY[@REVISION], as one URL per file.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace lorikeet {

// Whom the server is to those services; all of it secret.
struct SourceCredentials {
  std::string s3_key, s3_secret, s3_session;  // empty: requests are not signed
  std::string hub_token;                      // empty: none

  // AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; HF_TOKEN.
  static SourceCredentials FromEnvironment();
};

struct SourceEndpoints {
  std::string s3 = "https://s3.us-east-1.amazonaws.com";  // buckets are the path's first part
  std::string s3_region = "us-east-1";
  std::string hub = "https://huggingface.co";
};

struct RemoteAdapter {
  std::string base_url;  // a '/' and a file's name follow
  enum class Service { kPlain, kS3, kHub } service = Service::kPlain;
};

// INVALID_ARGUMENT says what is wrong with the location: an unknown scheme, a missing part, a user
// or a query in it, a path that leads upwards, or a character that is none of
// A-Z a-z 0-9 . _ - ~ / : @ + =.
absl::StatusOr<RemoteAdapter> ParseLocation(std::string_view location,
                                            const SourceEndpoints& endpoints);

// The first of `allowed` that `location` is or lies below; their number if there is none.
size_t SourceOf(std::string_view location, const std::vector<std::string>& allowed);

}  // namespace lorikeet
