#include "adapters_cache/registry_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "adapters_cache/sha256.h"
#include "engine/base/status_macros.h"
#include "nlohmann/json.hpp"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr char kVersion = '1';
constexpr size_t kHashDigits = 64;
constexpr size_t kHeaderBytes = 1 + kHashDigits + 1;

std::string HashOf(std::string_view text) {
  Sha256 hash;
  hash.Add(text);
  return hash.Hex();
}

Json ToJson(const RegistryRecords& records) {
  Json versions = Json::object(), names = Json::object();
  for (const auto& [id, v] : records.versions) {
    versions[id] = {{"variant", v.variant},   {"path", v.path},
                    {"source", v.source},
                    {"any_path", v.any_path}, {"min_rank", v.min_rank},
                    {"max_rank", v.max_rank}, {"modules", v.modules},
                    {"bytes", v.bytes},       {"warnings", v.warnings}};
  }
  for (const auto& [name, n] : records.names) {
    names[name] = {{"targets", n.targets},
                   {"pinned", n.pinned},
                   {"loaded_at", n.loaded_at_unix_us},
                   {"hits", n.hits},
                   {"tenant", n.tenant}};
  }
  return {{"versions", versions}, {"names", names}};
}

// Throws Json::exception.
RegistryRecords FromJson(const Json& json) {
  RegistryRecords records;
  for (const auto& [id, v] : json.at("versions").items()) {
    records.versions[id] = {.id = id,
                            .variant = v.at("variant"),
                            .path = v.at("path"),
                            .source = v.value("source", ""),  // younger than version 1
                            .any_path = v.at("any_path"),
                            .min_rank = v.at("min_rank"),
                            .max_rank = v.at("max_rank"),
                            .modules = v.at("modules"),
                            .bytes = v.at("bytes"),
                            .warnings = v.at("warnings")};
  }
  for (const auto& [name, n] : json.at("names").items()) {
    NameRecord& record = records.names[name];
    record = {n.at("targets"), n.at("pinned"), n.at("loaded_at"), n.value("hits", int64_t{0}),
              n.value("tenant", "")};
    for (const auto& [version, weight] : record.targets) json.at("versions").at(version);
  }
  return records;
}

absl::Status Failure(const char* what, const fs::path& path) {
  return absl::UnavailableError(
      absl::StrCat("cannot ", what, " ", path.string(), ": ", std::strerror(errno)));
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

absl::Status WriteSynced(const fs::path& path, std::string_view bytes) {
  const FileDescriptor file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (file.get() < 0) return Failure("open", path);
  while (!bytes.empty()) {
    const ssize_t written = write(file.get(), bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return Failure("write", path);
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return fsync(file.get()) == 0 ? absl::OkStatus() : Failure("sync", path);
}

absl::Status SyncDirectory(const fs::path& path) {
  const FileDescriptor directory(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory.get() < 0) return Failure("open", path);
  return fsync(directory.get()) == 0 ? absl::OkStatus() : Failure("sync", path);
}

}  // namespace

absl::StatusOr<RegistryRecords> ReadRegistryFile(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path, error) && !error) return RegistryRecords();
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (!file || !(content << file.rdbuf())) {
    return absl::DataLossError(absl::StrCat("cannot read ", path.string()));
  }
  const std::string bytes = content.str();
  if (bytes.size() < kHeaderBytes || bytes[0] < '1' || bytes[0] > '9') {
    return absl::DataLossError(absl::StrCat(path.string(), " is no registry of adapters"));
  }
  if (bytes[0] != kVersion) {
    return absl::UnimplementedError(absl::StrCat(path.string(), " has version ",
                                                 bytes.substr(0, 1), "; this server reads ",
                                                 std::string(1, kVersion)));
  }
  const std::string_view body = std::string_view(bytes).substr(kHeaderBytes);
  if (HashOf(body) != bytes.substr(1, kHashDigits)) {
    return absl::DataLossError(absl::StrCat(path.string(), " is damaged: its hash does not match"));
  }
  try {
    return FromJson(Json::parse(body.begin(), body.end()));
  } catch (const Json::exception& e) {
    return absl::DataLossError(absl::StrCat(path.string(), ": ", e.what()));
  }
}

absl::Status WriteRegistryFile(const fs::path& path, const RegistryRecords& records) {
  const std::string body = ToJson(records).dump();
  const fs::path next = path.string() + ".new";
  LK_RETURN_IF_ERROR(
      WriteSynced(next, absl::StrCat(std::string(1, kVersion), HashOf(body), "\n", body)));
  if (rename(next.c_str(), path.c_str()) != 0) return Failure("replace", path);
  return SyncDirectory(path.parent_path());
}

}  // namespace lorikeet
