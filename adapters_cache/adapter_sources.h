// Adapters from elsewhere: what a URL names, as a directory of this machine.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace lorikeet {

// Whether no part of the path is empty or leads upwards.
constexpr bool IsPlainPath(std::string_view path) {
  for (size_t begin = 0; begin <= path.size();) {
    const size_t slash = path.find('/', begin);
    const std::string_view part = path.substr(begin, slash - begin);
    if (part.empty() || part == "." || part == "..") return false;
    if (slash == std::string_view::npos) return true;
    begin = slash + 1;
  }
  return false;
}

struct FetchedAdapter {
  std::filesystem::path directory;
  std::shared_ptr<const void> hold;  // the directory stays while this lives
};

// Thread-safe.
class AdapterSources {
 public:
  virtual ~AdapterSources() = default;

  // Whether `location` is to be fetched, and no directory.
  static bool Takes(std::string_view location) {
    return location.find("://") != std::string_view::npos;
  }

  using Done = std::function<void(absl::StatusOr<FetchedAdapter>)>;
  // Brings the files of `location` here, unless `kept`, where a fetch before brought them, is still
  // there. They take of the disk of `tenant`, empty: nobody's, who is the first to fetch them. Calls
  // `done` once, on a thread of the sources' own, never on this one.
  //
  // INVALID_ARGUMENT: no location that is understood; PERMISSION_DENIED: not allowed here, or refused
  // there; NOT_FOUND: not there; DATA_LOSS: other bytes than the source says; RESOURCE_EXHAUSTED: too
  // large, too many wait, or the disk is full; UNAVAILABLE: the source cannot be reached, stalls or
  // fails, after a few attempts; CANCELLED: the server stops.
  virtual void FetchAsync(std::string location, std::filesystem::path kept, std::string tenant,
                          Done done) = 0;
};

}  // namespace lorikeet
