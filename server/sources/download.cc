#include "server/sources/download.h"

#include <curl/curl.h>

#include <cctype>
#include <fstream>
#include <memory>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "adapters_cache/sha256.h"
#include "engine/base/check.h"

namespace lorikeet {
namespace {

constexpr long kConnectSeconds = 10;
constexpr long kLeastBytesPerSecond = 1024;
constexpr long kMostRedirects = 5;
constexpr long kHttpOk = 200;

struct State {
  CURL* curl = nullptr;
  std::ofstream out;
  Sha256 hash;
  Downloaded result;
  int64_t max_bytes = 0;
  bool too_large = false;
  bool disk_full = false;
  const std::atomic<bool>* cancel = nullptr;
};

size_t OnBody(char* data, size_t size, size_t count, void* user) {
  State& state = *static_cast<State*>(user);
  const size_t bytes = size * count;
  long status = 0;
  curl_easy_getinfo(state.curl, CURLINFO_RESPONSE_CODE, &status);
  if (status != kHttpOk) return bytes;  // an error's page
  state.result.bytes += static_cast<int64_t>(bytes);
  state.too_large = state.result.bytes > state.max_bytes;
  if (state.too_large) return 0;
  state.hash.Add(data, bytes);
  state.disk_full = !state.out.write(data, static_cast<std::streamsize>(bytes));
  return state.disk_full ? 0 : bytes;
}

size_t OnHeader(char* data, size_t size, size_t count, void* user) {
  constexpr absl::string_view kLinked = "x-linked-etag:";
  constexpr size_t kDigits = 64;
  const absl::string_view line(data, size * count);
  if (!absl::StartsWithIgnoreCase(line, kLinked)) return size * count;
  std::string digits;
  for (const char c : line.substr(kLinked.size())) {
    if (std::isxdigit(static_cast<unsigned char>(c))) digits += c;
  }
  if (digits.size() == kDigits) static_cast<State*>(user)->result.linked_sha256 = digits;
  return size * count;
}

int OnProgress(void* user, curl_off_t, curl_off_t, curl_off_t, curl_off_t) {
  return *static_cast<State*>(user)->cancel ? 1 : 0;
}

absl::Status Failure(const State& state, CURLcode code, long status, const Download& download) {
  const std::string& url = download.url;
  if (*state.cancel) return absl::CancelledError("the server is shutting down");
  if (state.too_large || code == CURLE_FILESIZE_EXCEEDED) {
    return absl::ResourceExhaustedError(
        absl::StrCat(url, " has more than ", download.max_bytes, " bytes"));
  }
  if (state.disk_full) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "cannot write ", url, " after ", state.result.bytes, " bytes: is the disk full?"));
  }
  if (code == CURLE_OPERATION_TIMEDOUT) {
    return absl::UnavailableError(
        absl::StrCat(url, " did not answer in time, or sent nothing for ", download.stall_s, " s"));
  }
  if (code != CURLE_OK) {
    return absl::UnavailableError(absl::StrCat(url, ": ", curl_easy_strerror(code), " after ",
                                               state.result.bytes, " bytes"));
  }
  const std::string answer = absl::StrCat(url, " was answered with status ", status);
  if (status == 401 || status == 403) return absl::PermissionDeniedError(answer);
  if (status == 404 || status == 410) return absl::NotFoundError(answer);
  if (status == 429 || status >= 500) return absl::UnavailableError(answer);
  return absl::FailedPreconditionError(answer);
}

}  // namespace

absl::StatusOr<Downloaded> RunDownload(const Download& download, const std::filesystem::path& file,
                                       const std::atomic<bool>& cancel) {
  static const CURLcode initialised = curl_global_init(CURL_GLOBAL_DEFAULT);
  LK_CHECK(initialised == CURLE_OK);
  const std::unique_ptr<CURL, decltype(&curl_easy_cleanup)> curl(curl_easy_init(),
                                                                 &curl_easy_cleanup);
  LK_CHECK(curl != nullptr);
  State state{.curl = curl.get(), .max_bytes = download.max_bytes, .cancel = &cancel};
  state.out.open(file, std::ios::binary | std::ios::trunc);
  const auto set = [&](CURLoption option, auto value) {
    LK_CHECK(curl_easy_setopt(curl.get(), option, value) == CURLE_OK);
  };
  set(CURLOPT_URL, download.url.c_str());
  set(CURLOPT_PROTOCOLS_STR, "http,https");
  set(CURLOPT_REDIR_PROTOCOLS_STR, "http,https");
  set(CURLOPT_FOLLOWLOCATION, download.follow_redirects ? 1L : 0L);
  set(CURLOPT_MAXREDIRS, kMostRedirects);
  set(CURLOPT_NOSIGNAL, 1L);
  set(CURLOPT_CONNECTTIMEOUT, kConnectSeconds);
  set(CURLOPT_LOW_SPEED_LIMIT, kLeastBytesPerSecond);
  set(CURLOPT_LOW_SPEED_TIME, static_cast<long>(download.stall_s));
  set(CURLOPT_MAXFILESIZE_LARGE, static_cast<curl_off_t>(download.max_bytes));
  set(CURLOPT_USERAGENT, "lorikeet");
  set(CURLOPT_WRITEFUNCTION, &OnBody);
  set(CURLOPT_WRITEDATA, &state);
  set(CURLOPT_HEADERFUNCTION, &OnHeader);
  set(CURLOPT_HEADERDATA, &state);
  set(CURLOPT_XFERINFOFUNCTION, &OnProgress);
  set(CURLOPT_XFERINFODATA, &state);
  set(CURLOPT_NOPROGRESS, 0L);
  std::unique_ptr<curl_slist, decltype(&curl_slist_free_all)> headers(nullptr,
                                                                      &curl_slist_free_all);
  if (!download.bearer.empty()) {
    set(CURLOPT_HTTPAUTH, CURLAUTH_BEARER);
    set(CURLOPT_XOAUTH2_BEARER, download.bearer.c_str());
  }
  if (!download.s3_region.empty()) {
    set(CURLOPT_AWS_SIGV4, absl::StrCat("aws:amz:", download.s3_region, ":s3").c_str());
    set(CURLOPT_USERPWD, download.s3_user.c_str());
    // S3 wants the hash of the body, which is empty; not every libcurl sends it by itself.
    std::vector<std::string> lines = {"x-amz-content-sha256: " + Sha256().Hex()};
    if (!download.s3_session.empty()) {
      lines.push_back("x-amz-security-token: " + download.s3_session);
    }
    for (const std::string& line : lines) {
      headers.reset(curl_slist_append(headers.release(), line.c_str()));
    }
    set(CURLOPT_HTTPHEADER, headers.get());
  }
  const CURLcode code = curl_easy_perform(curl.get());
  long status = 0;
  curl_easy_getinfo(curl.get(), CURLINFO_RESPONSE_CODE, &status);
  state.out.close();
  state.disk_full = state.disk_full || (code == CURLE_OK && !state.out);
  if (code != CURLE_OK || status != kHttpOk || state.disk_full) {
    return Failure(state, code, status, download);
  }
  state.result.sha256 = state.hash.Hex();
  return state.result;
}

}  // namespace lorikeet
