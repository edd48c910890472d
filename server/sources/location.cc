#include "server/sources/location.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "adapters_cache/adapter_sources.h"

namespace lorikeet {
namespace {

bool Unreserved(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
         std::string_view("._-~").find(c) != std::string_view::npos;
}

absl::Status Invalid(std::string_view location, std::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("'", std::string(location), "' ", std::string(why)));
}

// RFC 3986; what S3 signs is encoded the same way.
std::string EncodePath(std::string_view path) {
  std::string encoded;
  for (const char c : path) {
    if (Unreserved(c) || c == '/') {
      encoded += c;
    } else {
      absl::StrAppendFormat(&encoded, "%%%02X", static_cast<unsigned char>(c));
    }
  }
  return encoded;
}

std::string FromEnvironmentOr(const char* name, std::string fallback) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : std::move(fallback);
}

absl::StatusOr<RemoteAdapter> HubAdapter(std::string_view location, std::string_view rest,
                                         const SourceEndpoints& endpoints) {
  std::string_view repository = rest, revision = "main";
  if (const size_t at = rest.find('@'); at != std::string_view::npos) {
    repository = rest.substr(0, at);
    revision = rest.substr(at + 1);
  }
  if (std::ranges::count(repository, '/') != 1 || revision.empty()) {
    return Invalid(location, "is not of the form hf://ORGANISATION/REPOSITORY[@REVISION]");
  }
  std::string encoded = EncodePath(revision);
  for (size_t at = 0; (at = encoded.find('/', at)) != std::string::npos;) {
    encoded.replace(at, 1, "%2F");  // of a branch's name
  }
  return RemoteAdapter{
      absl::StrCat(endpoints.hub, "/", EncodePath(repository), "/resolve/", encoded),
      RemoteAdapter::Service::kHub};
}

}  // namespace

SourceCredentials SourceCredentials::FromEnvironment() {
  return {.s3_key = FromEnvironmentOr("AWS_ACCESS_KEY_ID", ""),
          .s3_secret = FromEnvironmentOr("AWS_SECRET_ACCESS_KEY", ""),
          .s3_session = FromEnvironmentOr("AWS_SESSION_TOKEN", ""),
          .hub_token = FromEnvironmentOr("HF_TOKEN", "")};
}

absl::StatusOr<RemoteAdapter> ParseLocation(std::string_view location,
                                            const SourceEndpoints& endpoints) {
  const size_t colon = location.find("://");
  const std::string_view scheme = location.substr(0, colon);
  if (colon == std::string_view::npos) return Invalid(location, "is no URL");
  std::string_view rest = location.substr(colon + 3);
  while (rest.ends_with('/')) rest.remove_suffix(1);
  const bool http = scheme == "http" || scheme == "https";
  const std::string_view host = rest.substr(0, rest.find('/'));
  if (http && host.find('@') != std::string_view::npos) {
    // What is before the '@' may be a password.
    return absl::InvalidArgumentError("the URL of an adapter must not hold a user or password");
  }
  for (const char c : rest) {
    if (Unreserved(c) || std::string_view("/:@+=").find(c) != std::string_view::npos) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("the URL of an adapter at ", std::string(host),
                     " holds a character that is none of A-Z a-z 0-9 . _ - ~ / : @ + ="));
  }
  if (!IsPlainPath(rest)) return Invalid(location, "has an empty part, or one that leads upwards");
  if (http) {
    const std::string_view path = rest.substr(host.size());
    return RemoteAdapter{absl::StrCat(std::string(scheme), "://", std::string(host), EncodePath(path)),
                         RemoteAdapter::Service::kPlain};
  }
  if (scheme == "s3") {
    return RemoteAdapter{absl::StrCat(endpoints.s3, "/", EncodePath(rest)),
                         RemoteAdapter::Service::kS3};
  }
  if (scheme == "hf") return HubAdapter(location, rest, endpoints);
  return Invalid(location, "has a scheme that is none of http, https, s3, hf");
}

size_t SourceOf(std::string_view location, const std::vector<std::string>& allowed) {
  const auto source = std::ranges::find_if(allowed, [location](std::string_view prefix) {
    const bool whole_scheme = prefix.ends_with("://");
    while (!whole_scheme && prefix.ends_with('/')) prefix.remove_suffix(1);
    if (!location.starts_with(prefix)) return false;
    const std::string_view rest = location.substr(prefix.size());
    return whole_scheme || rest.empty() || rest.starts_with('/') ||
           (prefix.starts_with("hf://") && rest.starts_with('@'));
  });
  return source - allowed.begin();
}

}  // namespace lorikeet
