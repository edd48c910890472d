#include "server/log.h"

#include <array>
#include <atomic>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array kNames = {"debug", "info", "warning", "error"};  // by LogLevel

std::atomic<bool> as_json{false};
std::atomic<LogLevel> least_level{LogLevel::kInfo};

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string JsonLine(LogLevel level, const std::string& message, const Json& fields) {
  Json line = {{"time", absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone())},
               {"level", LogLevelName(level)},
               {"message", message}};
  line.update(fields);
  return Dump(line);
}

std::string TextLine(LogLevel level, const std::string& message, const Json& fields) {
  std::string line = level == LogLevel::kInfo ? message
                                              : absl::StrCat(LogLevelName(level), ": ", message);
  for (const auto& [key, value] : fields.items()) absl::StrAppend(&line, " ", key, "=", Dump(value));
  return line;
}

}  // namespace

absl::StatusOr<LogLevel> ParseLogLevel(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<LogLevel>(i);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("level: '", std::string(name), "'; it must be debug, info, warning or error"));
}

const char* LogLevelName(LogLevel level) { return kNames[static_cast<size_t>(level)]; }

void SetLogJson(bool json) { as_json = json; }
void SetLogLevel(LogLevel least) { least_level = least; }
LogLevel CurrentLogLevel() { return least_level; }

void Log(LogLevel level, const std::string& message, const Json& fields) {
  if (level < least_level) return;
  const std::string line =
      (as_json ? JsonLine(level, message, fields) : TextLine(level, message, fields)) + "\n";
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fflush(stdout);
}

}  // namespace lorikeet
