#include "adapters_cache/registry_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "adapters_cache/sha256.h"
#include "engine/base/file_descriptor.h"
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
                   {"location", n.location},
                   {"any_path", n.any_path},
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
    record = {.targets = n.at("targets"),
              // Younger than version 1, as are hits and tenant.
              .location = n.value("location", ""),
              .pinned = n.at("pinned"),
              .loaded_at_unix_us = n.at("loaded_at"),
              .hits = n.value("hits", int64_t{0}),
              .tenant = n.value("tenant", "")};
    for (const auto& [version, weight] : record.targets) json.at("versions").at(version);
    const VersionRecord& first = records.versions.at(record.targets.at(0).first);
    record.any_path = n.value("any_path", first.any_path);
    if (record.location.empty()) record.location = first.location();
  }
  return records;
}

// The log belongs to one file, by the beginning of its hash: that of an older file is none.
fs::path LogOf(const fs::path& path) {
  constexpr size_t kDigits = 16;
  char header[kHeaderBytes] = {};
  std::ifstream(path, std::ios::binary).read(header, kHeaderBytes);
  return absl::StrCat(path.string(), ".log-", std::string(header + 1, kDigits));
}

absl::Status Failure(const char* what, const fs::path& path) {
  return absl::UnavailableError(
      absl::StrCat("cannot ", what, " ", path.string(), ": ", std::strerror(errno)));
}

absl::Status WriteAll(int file, const fs::path& path, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = write(file, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return Failure("write", path);
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return fsync(file) == 0 ? absl::OkStatus() : Failure("sync", path);
}

absl::Status WriteSynced(const fs::path& path, std::string_view bytes) {
  const FileDescriptor file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (file.get() < 0) return Failure("open", path);
  return WriteAll(file.get(), path, bytes);
}

absl::Status SyncDirectory(const fs::path& path) {
  const FileDescriptor directory(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory.get() < 0) return Failure("open", path);
  return fsync(directory.get()) == 0 ? absl::OkStatus() : Failure("sync", path);
}

absl::StatusOr<std::string> ReadAll(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (!file || (fs::file_size(path) > 0 && !(content << file.rdbuf()))) {
    return absl::DataLossError(absl::StrCat("cannot read ", path.string()));
  }
  return content.str();
}

absl::StatusOr<RegistryRecords> ReadSnapshot(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path, error) && !error) return RegistryRecords();
  LK_ASSIGN_OR_RETURN(const std::string bytes, ReadAll(path));
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

absl::Status ApplyLine(std::string_view line, const std::string& where, RegistryRecords* records) {
  const std::string_view body = line.substr(std::min(kHashDigits, line.size()));
  if (HashOf(body) != line.substr(0, kHashDigits)) {
    return absl::DataLossError(where + " is damaged: its hash does not match");
  }
  try {
    const Json json = Json::parse(body.begin(), body.end());
    RegistryRecords changed = FromJson(json);
    for (auto& [id, version] : changed.versions) records->versions[id] = std::move(version);
    for (auto& [name, record] : changed.names) records->names[name] = std::move(record);
    for (const Json& name : json.at("gone")) records->names.erase(name.get<std::string>());
    return absl::OkStatus();
  } catch (const Json::exception& e) {
    return absl::DataLossError(absl::StrCat(where, ": ", e.what()));
  }
}

absl::Status ApplyLog(const fs::path& path, RegistryRecords* records) {
  std::error_code error;
  if (!fs::exists(path, error) && !error) return absl::OkStatus();
  LK_ASSIGN_OR_RETURN(const std::string bytes, ReadAll(path));
  size_t begin = 0;
  for (size_t end; (end = bytes.find('\n', begin)) != std::string::npos; begin = end + 1) {
    LK_RETURN_IF_ERROR(ApplyLine(std::string_view(bytes).substr(begin, end - begin),
                                 absl::StrCat(path.string(), " at byte ", begin), records));
  }
  std::set<std::string> used;
  for (const auto& [name, record] : records->names) {
    for (const auto& [version, weight] : record.targets) used.insert(version);
  }
  std::erase_if(records->versions, [&](const auto& entry) { return !used.contains(entry.first); });
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<RegistryRecords> ReadRegistryFile(const fs::path& path) {
  LK_ASSIGN_OR_RETURN(RegistryRecords records, ReadSnapshot(path));
  LK_RETURN_IF_ERROR(ApplyLog(LogOf(path), &records));
  return records;
}

absl::Status WriteRegistryFile(const fs::path& path, const RegistryRecords& records) {
  Json json = ToJson(records);
  json["written_at"] = std::chrono::system_clock::now().time_since_epoch().count();  // no hash twice
  const std::string body = json.dump();
  const fs::path next = path.string() + ".new";
  LK_RETURN_IF_ERROR(
      WriteSynced(next, absl::StrCat(std::string(1, kVersion), HashOf(body), "\n", body)));
  const fs::path old_log = LogOf(path);
  if (rename(next.c_str(), path.c_str()) != 0) return Failure("replace", path);
  LK_RETURN_IF_ERROR(SyncDirectory(path.parent_path()));
  std::error_code ignored;
  fs::remove(old_log, ignored);
  return absl::OkStatus();
}

absl::Status AppendToRegistryLog(const fs::path& path, const RegistryRecords& changed,
                                 const std::vector<std::string>& gone) {
  Json json = ToJson(changed);
  json["gone"] = gone;
  const std::string body = json.dump();
  const fs::path log = LogOf(path);
  std::error_code error;
  const bool fresh = !fs::exists(log, error);
  const FileDescriptor file(open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  if (file.get() < 0) return Failure("open", log);
  const off_t before = lseek(file.get(), 0, SEEK_END);
  const absl::Status written = WriteAll(file.get(), log, absl::StrCat(HashOf(body), body, "\n"));
  if (!written.ok()) {
    if (ftruncate(file.get(), before) != 0) return Failure("cut", log);
    return written;
  }
  return fresh ? SyncDirectory(path.parent_path()) : absl::OkStatus();
}

}  // namespace lorikeet
